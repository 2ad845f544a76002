"""The main job, end to end with the echo engine: every line answered, in order, whatever interrupts it."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import load_job, read_results, run_job
from tests.command import (
    is_generating,
    kill_after,
    overnight,
    read_output,
    start,
    wait_until,
    without_times,
    write_job,
)

PROMPTS = [{"id": f"p{i}", "prompt": "word " * (i % 7 + 1) + str(i)} for i in range(60)]


def test_every_line_has_its_answer_in_input_order_and_the_summary_comes_last(tmp_path: Path) -> None:
    job = write_job(tmp_path, PROMPTS, generation={"num_samples": 2, "temperature": 1.0})
    outcome = run_job(load_job(job), quiet=True)
    assert outcome.exit_code == 0
    answers, summary = read_output(outcome.output)
    assert [(a["index"], a["sample"]) for a in answers] == [(i, s) for i in range(60) for s in range(2)]
    assert [a["id"] for a in answers[::2]] == [p["id"] for p in PROMPTS]
    assert summary["completed"] == 120 and summary["failed"] == 0
    assert json.loads((tmp_path / "out.jsonl.summary.json").read_text()) == summary
    assert len(list(read_results(outcome.output))) == 120


def test_bad_lines_are_answered_with_their_place_and_the_run_ends_with_3(tmp_path: Path) -> None:
    job = write_job(tmp_path, [{"prompt": "good"}, b"{not json", b"\xff\xfe", {"text": 1}, {"prompt": "also good"}])
    run = overnight("run", job)
    assert run.returncode == 3, run.stderr
    answers, summary = read_output(tmp_path / "out.jsonl")
    assert [a["completion"] for a in answers] == ["good", None, None, None, "also good"]
    assert [a["error"] and (a["error"]["type"], a["error"]["line"]) for a in answers] == [
        None,
        ("invalid_json", 2),
        ("invalid_utf8", 3),
        ("missing_field", 4),
        None,
    ]
    assert (summary["completed"], summary["failed"]) == (2, 3)
    assert overnight("run", job).returncode == 3


def test_a_finished_job_says_so_at_once_and_touches_nothing(tmp_path: Path) -> None:
    job = write_job(tmp_path, PROMPTS)
    assert overnight("run", job).returncode == 0
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    again = overnight("run", job)
    assert again.returncode == 0
    assert "finished already" in again.stderr
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("seed", range(2))
def test_killed_again_and_again_the_output_is_that_of_an_undisturbed_run(tmp_path: Path, seed: int) -> None:
    moments = random.Random(seed)
    (tmp_path / "whole").mkdir()
    whole = write_job(tmp_path / "whole", PROMPTS)
    assert overnight("run", whole).returncode == 0
    expected, _ = read_output(tmp_path / "whole" / "out.jsonl")

    job = write_job(tmp_path, PROMPTS, model={"engine": "echo", "echo": {"delay": "100ms"}})
    journal = tmp_path / "out.jsonl.journal"
    for num_commits in range(1, 4):  # each kill comes at a random moment after a commit of that session
        process = start("run", job)
        wait_until(lambda least=num_commits: journal.exists() and journal.read_bytes().count(b'"commit"') >= least)
        assert kill_after(process, moments.uniform(0, 0.3)) == -signal.SIGKILL
    while (last := overnight("run", job)).returncode == 75:
        pass
    assert last.returncode == 0, last.stderr
    answers, summary = read_output(tmp_path / "out.jsonl")
    for a, b in zip(without_times(answers), without_times(expected), strict=True):
        assert a == b
    assert summary["completed"] == len(PROMPTS)
    assert [session["ended"] for session in summary["sessions"]] == ["killed"] * 3 + ["finished"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_stops_the_run_in_good_order_with_75(tmp_path: Path, number: int) -> None:
    job = write_job(tmp_path, PROMPTS, model={"engine": "echo", "echo": {"delay": "100ms"}})
    process = start("run", job)
    wait_until(lambda: is_generating(tmp_path))
    began = time.monotonic()
    process.send_signal(number)
    _, talk = process.communicate(timeout=40)
    assert process.returncode == 75, talk
    assert time.monotonic() - began < 30
    assert "run the same command again" in talk
    status = json.loads(overnight("status", job, "--json").stdout)
    assert status["state"] == "stopped"
    assert 0 < status["request_counts"]["completed"] < len(PROMPTS)
    done = status["request_counts"]["completed"]
    assert overnight("run", job, "--set", "model.echo.delay=0ms").returncode == 0
    _, summary = read_output(tmp_path / "out.jsonl")
    assert [session["completed"] for session in summary["sessions"]] == [done, len(PROMPTS) - done]
    assert [session["ended"] for session in summary["sessions"]] == ["stopped", "finished"]


def test_the_time_limit_stops_the_run_with_75(tmp_path: Path) -> None:
    job = write_job(tmp_path, PROMPTS, model={"engine": "echo", "echo": {"delay": "100ms"}})
    run = overnight("run", job, "--time-limit", "2s")
    assert run.returncode == 75
    assert json.loads(overnight("status", job, "--json").stdout)["sessions"][0]["ended"] == "time_limit"


def test_two_processes_do_not_work_on_one_run(tmp_path: Path) -> None:
    job = write_job(tmp_path, PROMPTS, model={"engine": "echo", "echo": {"delay": "500ms"}})
    first = start("run", job)
    wait_until(lambda: is_generating(tmp_path))
    second = overnight("run", job)
    assert second.returncode == 75
    assert str(first.pid) in second.stderr
    assert json.loads(overnight("status", job, "--json").stdout)["process"] == first.pid
    assert kill_after(first, 0) == -signal.SIGKILL


def test_changes_that_would_mix_answers_are_refused_by_name(tmp_path: Path) -> None:
    job = write_job(tmp_path, PROMPTS)
    assert overnight("run", job).returncode == 0
    changed = overnight("run", job, "--set", "generation.seed=7", "--set", "input.system=Be brief")
    assert changed.returncode == 78
    assert "generation.seed" in changed.stderr and "input.system" in changed.stderr
    limited = overnight("run", job, "--limit", "3")
    assert limited.returncode == 78 and "--limit" in limited.stderr
    assert overnight("run", job, "--set", "batch.slots=2").returncode == 0
    with (tmp_path / "in.jsonl").open("ab") as file:
        file.write(b'{"prompt": "one more"}\n')
    assert overnight("run", job).returncode == 65
    assert overnight("run", job, "--set", "run.resume=always").returncode == 0
    assert len(read_output(tmp_path / "out.jsonl")[0]) == len(PROMPTS) + 1
    fresh = overnight("run", job, "--fresh", "--limit", "3", "--json")
    assert fresh.returncode == 0 and json.loads(fresh.stdout)["completed"] == 3
    assert (tmp_path / "out.jsonl.old-1").exists()


def test_a_strangers_file_is_never_overwritten(tmp_path: Path) -> None:
    job = write_job(tmp_path, PROMPTS)
    (tmp_path / "out.jsonl").write_text("precious\n")
    refused = overnight("run", job)
    assert refused.returncode == 73, refused.stderr
    assert (tmp_path / "out.jsonl").read_text() == "precious\n"


def test_memory_stays_bounded_over_many_lines(tmp_path: Path) -> None:
    job = write_job(tmp_path, [{"prompt": f"line {i}"} for i in range(30_000)])
    program = (
        "import sys; from pathlib import Path; from pipeline import load_job, run_job\n"
        "run_job(load_job(Path(sys.argv[1])), quiet=True)\n"
        # Not ru_maxrss, which a child has from its parent.
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    )
    run = subprocess.run([sys.executable, "-c", program, str(job)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 200_000  # KiB
