"""The command that a job names for its end: what it is told, when it runs, and that it changes nothing."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from pipeline.notice import notify
from tests.command import kill_after, overnight, start, wait_until, write_job

PROMPTS = [{"prompt": f"prompt {i}"} for i in range(8)]
NOTE = """
import json, os, sys
told = {name: value for name, value in os.environ.items() if name.startswith("OVERNIGHT_")}
with open(sys.argv[1], "a") as file:
    file.write(json.dumps(told) + "\\n")
print("noted")
"""


@pytest.fixture
def noted(tmp_path):
    """The section that asks for a note of every end, and the notes."""
    script, notes = tmp_path / "note.py", tmp_path / "notes.jsonl"
    script.write_text(NOTE)
    section = {"on_finish": [sys.executable, str(script), str(notes)]}
    return section, lambda: [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []


def test_the_end_is_told_and_a_repetition_is_not(tmp_path, noted):
    section, notes = noted
    job = write_job(tmp_path, PROMPTS, model={"engine": "echo", "echo": {"fail_every": 4}}, run=section)
    run = overnight("run", job, "--json")
    assert run.returncode == 3 and json.loads(run.stdout)["failed"] == 2  # standard output stays data
    assert "noted" in run.stderr
    (told,) = notes()
    assert (told["OVERNIGHT_EXIT_CODE"], told["OVERNIGHT_COMPLETED"], told["OVERNIGHT_FAILED"]) == ("3", "6", "2")
    assert told["OVERNIGHT_JOB"] == "job" and told["OVERNIGHT_MESSAGE"] == ""
    assert Path(told["OVERNIGHT_OUTPUT"]) == tmp_path / "out.jsonl"
    assert json.loads(Path(told["OVERNIGHT_SUMMARY"]).read_text())["failed"] == 2
    assert overnight("run", job).returncode == 3
    assert len(notes()) == 1


def test_a_stop_and_a_failure_are_told_with_their_reason(tmp_path, noted):
    section, notes = noted
    job = write_job(tmp_path, PROMPTS, model={"engine": "echo", "echo": {"delay": "2s"}}, run=section)
    process = start("run", job)
    wait_until(lambda: (tmp_path / "out.jsonl.journal").exists() and is_loaded(tmp_path))
    assert overnight("run", job).returncode == 75  # busy: that run's end is not this command's
    assert kill_after(process, 0, signal.SIGTERM) == 75
    assert overnight("run", job, "--set", "generation.seed=5").returncode == 78
    stopped, failed = notes()
    assert (stopped["OVERNIGHT_EXIT_CODE"], stopped["OVERNIGHT_SUMMARY"]) == ("75", "")
    assert failed["OVERNIGHT_EXIT_CODE"] == "78" and "generation.seed" in failed["OVERNIGHT_MESSAGE"]


def is_loaded(directory: Path) -> bool:
    return b'"loaded"' in (directory / "out.jsonl.journal").read_bytes()


@pytest.mark.parametrize(("command", "told"), [(["no-such-program"], "cannot be started"), (["false"], "ended with 1")])
def test_its_own_failure_is_told_and_changes_nothing(tmp_path, command, told):
    job = write_job(tmp_path, PROMPTS, run={"on_finish": command})
    run = overnight("run", job)
    assert run.returncode == 0 and told in run.stderr


def test_it_is_killed_with_its_children_when_it_does_not_end(tmp_path):
    told: list[str] = []
    pid = tmp_path / "pid"
    notify(["sh", "-c", f"sleep 600 & echo $! > {pid}; wait"], {}, told.append, timeout_s=1.0)
    assert "was killed after 1 s" in told[0]
    child, until = int(pid.read_text()), time.monotonic() + 10
    while is_alive(child):
        assert time.monotonic() < until
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
        return "Z" not in Path(f"/proc/{process}/stat").read_text().split(")")[1].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_no_shell_reads_it(tmp_path):
    job = write_job(tmp_path, PROMPTS, run={"on_finish": ["touch", f"{tmp_path}/a b;c"]})
    assert overnight("run", job).returncode == 0
    assert (tmp_path / "a b;c").exists()
