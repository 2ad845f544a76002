"""A supervised run comes to its end by itself, is started again only where that helps, and ends when it is told to."""

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.command import REPOSITORY, is_generating, overnight, read_output, start, wait_until, write_job
from tests.test_poison import PROMPTS, errors

AGAIN = "starting it again"


def spoilt(directory: Path, program: str) -> dict[str, str]:
    """An environment in which every process of Python runs these lines first."""
    (directory / "sitecustomize.py").write_text(program)
    return {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{directory}"}


def records(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "out.jsonl.journal").read_bytes().splitlines()
    return [json.loads(line.split(b" ", 2)[2]) for line in lines]


@pytest.mark.parametrize(
    ("echo", "run_section", "cause", "attempts"),
    [
        ({"crash_at": 5}, {"max_attempts": 3}, "crashed", 3),
        ({"hang_at": 5}, {"max_attempts": 2, "stall_timeout": "1s"}, "stalled", 2),
        ({"oom_at": 5}, {}, "out_of_memory", 1),
    ],
)
def test_one_command_gives_the_bad_line_up_and_answers_the_others(
    tmp_path: Path, echo: dict[str, Any], run_section: dict[str, Any], cause: str, attempts: int
) -> None:
    job = write_job(tmp_path, PROMPTS, model={"echo": echo}, batch={"slots": 4}, run=run_section)
    run = overnight("run", job, "--supervise", "--json")
    assert run.returncode == 3, run.stderr
    assert json.loads(run.stdout)["failed"] == 1  # of the last process alone
    answers, _ = read_output(tmp_path / "out.jsonl")
    assert errors(answers) == {5: (cause, attempts)}
    assert [a["completion"] for a in answers if not a["error"]] == [f"prompt {i}" for i in range(12) if i != 5]
    num_deaths = attempts if cause != "out_of_memory" else 0
    assert run.stderr.count(AGAIN) == num_deaths
    assert [record["kind"] for record in records(tmp_path)].count("session") == num_deaths + 1


def test_nothing_is_loaded_when_all_that_is_left_is_to_give_up(tmp_path: Path) -> None:
    job = write_job(tmp_path, PROMPTS[:3], model={"echo": {"crash_at": 2}}, run={"max_attempts": 2})
    assert overnight("run", job, "--supervise").returncode == 3
    kinds = [record["kind"] for record in records(tmp_path)]
    assert (kinds.count("session"), kinds.count("loaded")) == (3, 2)


def test_one_attempt_is_not_enough_to_find_the_line_that_kills_others(tmp_path: Path) -> None:
    """At the first death it was not alone, and before the second, of itself alone, nothing is saved."""
    job = write_job(tmp_path, PROMPTS[:3], run={"max_attempts": 1})
    environment = spoilt(
        tmp_path,
        """
import os, signal
from pipeline.engines import echo

def write(answer, write=echo._Answer.write):
    if answer.request.item.index == 0:
        os.kill(os.getpid(), signal.SIGSEGV)
    return write(answer)

echo._Answer.write = write
""",
    )
    run = overnight("run", job, "--supervise", **environment)
    assert run.returncode == 3, run.stderr
    assert errors(read_output(tmp_path / "out.jsonl")[0]) == {0: ("crashed", 2)}


@pytest.mark.parametrize(
    ("words", "code"),
    [(["--set", "input.path=nowhere.jsonl"], 66), (["--set", "generation.seed=8"], 78), (["--time-limit", "1s"], 75)],
)
def test_an_end_that_would_come_again_is_the_end(tmp_path: Path, words: list[str], code: int) -> None:
    job = write_job(tmp_path, PROMPTS, model={"echo": {"delay": "1s"}})
    assert overnight("run", job, "--time-limit", "1s").returncode == 75
    run = overnight("run", job, "--supervise", *words)
    assert run.returncode == code, run.stderr
    assert AGAIN not in run.stderr


@pytest.mark.slow
def test_where_another_has_the_run_it_leaves(tmp_path: Path) -> None:
    job = write_job(tmp_path, PROMPTS, model={"echo": {"delay": "1s"}})
    holder = start("run", job)
    wait_until(lambda: is_generating(tmp_path))
    run = overnight("run", job, "--supervise")
    holder.kill()
    holder.communicate()
    assert (run.returncode, AGAIN in run.stderr) == (75, False)


def children(process: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_a_signal_stops_both_and_the_supervisor_is_light(tmp_path: Path) -> None:
    job = write_job(tmp_path, PROMPTS, model={"echo": {"delay": "1s"}})
    supervisor = start("run", job, "--supervise")
    wait_until(lambda: is_generating(tmp_path))
    (child,) = children(supervisor.pid)
    assert not re.search(r"torch|numpy|tokenizers", Path(f"/proc/{supervisor.pid}/maps").read_text())
    resident = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{supervisor.pid}/status").read_text())
    assert resident and int(resident[1]) < 100 << 10
    supervisor.send_signal(signal.SIGTERM)
    _, talk = supervisor.communicate(timeout=60)
    assert (supervisor.returncode, AGAIN in talk) == (75, False), talk
    assert not Path(f"/proc/{child}").exists()
    assert [record["ended"] for record in records(tmp_path) if record["kind"] == "end"] == ["stopped"]


@pytest.mark.slow
def test_when_the_supervisor_is_killed_its_run_stops_in_good_order(tmp_path: Path) -> None:
    job = write_job(tmp_path, PROMPTS, model={"echo": {"delay": "1s"}})
    supervisor = start("run", job, "--supervise")
    wait_until(lambda: is_generating(tmp_path))
    (child,) = children(supervisor.pid)
    supervisor.kill()
    wait_until(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text())
    supervisor.communicate()
    assert records(tmp_path)[-1]["ended"] == "stopped"


def test_a_killed_process_is_started_again_and_held_against_nobody(tmp_path: Path) -> None:
    job = write_job(tmp_path, PROMPTS, model={"echo": {"delay": "200ms"}})
    supervisor = start("run", job, "--supervise")
    for number in range(3):
        wait_until(lambda number=number: is_generating(tmp_path) and len(sessions(tmp_path)) > number)
        time.sleep(0.2)
        os.kill(children(supervisor.pid)[0], signal.SIGKILL)
    _, talk = supervisor.communicate(timeout=60)
    assert supervisor.returncode == 0, talk
    assert talk.count("killed by SIGKILL") == 3
    assert len(read_output(tmp_path / "out.jsonl")[0]) == 12


def sessions(directory: Path) -> list[dict[str, Any]]:
    return [record for record in records(directory) if record["kind"] == "session"]


@pytest.mark.slow
def test_a_fatal_signal_of_which_the_interpreter_says_nothing_is_seen_by_the_supervisor(tmp_path: Path) -> None:
    environment = spoilt(
        tmp_path,
        "import os, signal, sys\n"
        "if '--supervise' not in sys.argv:\n"
        "    import pipeline.engines.echo as echo\n"
        "    begin = echo.EchoEngine._begin\n"
        "    def _begin(self, request):\n"
        "        if request.item.index == 5:\n"
        "            os.kill(os.getpid(), signal.SIGSYS)\n"
        "        return begin(self, request)\n"
        "    echo.EchoEngine._begin = _begin\n",
    )
    job = write_job(tmp_path, PROMPTS, run={"max_attempts": 2})
    run = overnight("run", job, "--supervise", **environment)
    assert run.returncode == 3, run.stderr
    assert errors(read_output(tmp_path / "out.jsonl")[0]) == {5: ("crashed", 2)}


@pytest.mark.slow
def test_deaths_that_nobody_can_explain_and_that_save_nothing_come_to_an_end(tmp_path: Path) -> None:
    """As where a killer of the system's leaves no trace: no line is blamed for it, and it is not tried for ever."""
    environment = spoilt(
        tmp_path,
        "import os, signal, sys\n"
        "if '--supervise' not in sys.argv:\n"
        "    import pipeline.engines.echo as echo\n"
        "    echo.EchoEngine._begin = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n",
    )
    job = write_job(tmp_path, PROMPTS, run={"max_attempts": 2})
    run = overnight("run", job, "--supervise", **environment)
    assert run.returncode == 70
    assert run.stderr.count(AGAIN) == 2
    assert "given up: 3 processes in a row ended and had saved nothing, the last one: killed by SIGKILL" in run.stderr
    assert "Traceback" not in run.stderr
    assert overnight("run", job).returncode == 0  # and nothing is lost


@pytest.mark.slow
def test_a_run_that_stopped_for_lack_of_memory_is_taken_up_again(tmp_path: Path) -> None:
    """The first process sees the memory shrink, the second has enough."""
    environment = spoilt(
        tmp_path,
        "import sys, pathlib\n"
        "if '--supervise' not in sys.argv:\n"
        "    import pipeline.probe, pipeline.watch\n"
        "    pipeline.watch._LOOK_S = 0.1\n"
        f"    journal = pathlib.Path({str(tmp_path / 'out.jsonl.journal')!r})\n"
        "    is_second = journal.exists()\n"
        "    left = lambda: 1 << 20 if journal.exists() and b'commit' in journal.read_bytes() else 1 << 33\n"
        "    pipeline.probe.memory_left = (lambda: 1 << 33) if is_second else left\n",
    )
    job = write_job(tmp_path, PROMPTS, model={"echo": {"delay": "200ms"}})
    run = overnight("run", job, "--supervise", **environment)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count(AGAIN) == 1
    assert [session["ended"] for session in read_output(tmp_path / "out.jsonl")[1]["sessions"]] == [
        "low_memory",
        "finished",
    ]


@pytest.mark.slow
def test_an_earlier_run_is_moved_aside_once(tmp_path: Path) -> None:
    job = write_job(tmp_path, PROMPTS)
    assert overnight("run", job).returncode == 0
    run = overnight("run", job, "--supervise", "--fresh", "--set", "model.echo.crash_at=5")
    assert run.returncode == 3, run.stderr
    assert len(read_output(tmp_path / "out.jsonl")[0]) == 12
    assert (tmp_path / "out.jsonl.old-1").exists() and not (tmp_path / "out.jsonl.journal.old-2").exists()
