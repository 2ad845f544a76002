"""An item that ends the process is answered with an error, its neighbours are answered, and nothing else counts."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.command import kill_after, overnight, read_output, start, wait_until, write_job

PROMPTS = [{"prompt": f"prompt {i}"} for i in range(12)]


def run_to_the_end(job: Path, most: int) -> list[int]:
    """Start the same command again until it finishes; the exit codes of the processes that did not."""
    codes: list[int] = []
    while len(codes) <= most:
        code = overnight("run", job).returncode
        if code in (0, 3):
            return codes
        codes.append(code)
    raise AssertionError(f"no end after {codes}")


def errors(answers: list[dict[str, Any]]) -> dict[int, tuple[str, int]]:
    found = {answer["index"]: answer["error"] for answer in answers}
    return {index: (error["type"], error["attempts"]) for index, error in found.items() if error}


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("max_attempts", [2, 3])
def test_a_line_that_crashes_the_process_is_given_up(tmp_path: Path, slots: int, max_attempts: int) -> None:
    job = write_job(
        tmp_path,
        PROMPTS,
        model={"engine": "echo", "echo": {"crash_at": 5}},
        batch={"slots": slots},
        run={"max_attempts": max_attempts},
    )
    assert run_to_the_end(job, max_attempts) == [-signal.SIGSEGV] * max_attempts
    answers, summary = read_output(tmp_path / "out.jsonl")
    assert errors(answers) == {5: ("crashed", max_attempts)}
    assert [a["completion"] for a in answers if not a["error"]] == [f"prompt {i}" for i in range(12) if i != 5]
    assert [session["ended"] for session in summary["sessions"]] == ["crashed"] * max_attempts + ["finished"]
    assert "most recent call first" in (tmp_path / "out.jsonl.log").read_text()


def test_a_line_that_hangs_is_given_up(tmp_path: Path) -> None:
    job = write_job(
        tmp_path,
        PROMPTS,
        model={"engine": "echo", "echo": {"hang_at": 5}},
        run={"max_attempts": 2, "stall_timeout": "1s"},
    )
    assert run_to_the_end(job, 2) == [1, 1]
    answers, summary = read_output(tmp_path / "out.jsonl")
    assert errors(answers) == {5: ("stalled", 2)}
    assert [session["ended"] for session in summary["sessions"]] == ["stalled", "stalled", "finished"]


def test_a_line_that_needs_too_much_memory_shrinks_the_batch_and_is_given_up_alone(tmp_path: Path) -> None:
    job = write_job(tmp_path, PROMPTS, model={"engine": "echo", "echo": {"oom_at": 5}}, batch={"slots": 4})
    assert overnight("run", job).returncode == 3
    answers, summary = read_output(tmp_path / "out.jsonl")
    assert errors(answers) == {5: ("out_of_memory", 1)}
    assert summary["out_of_memory_events"] >= 2


def test_killing_a_run_again_and_again_is_held_against_nobody(tmp_path: Path) -> None:
    """Each time the same line is in flight, alone, and the process dies; but by our hand."""
    job = write_job(
        tmp_path,
        PROMPTS,
        model={"engine": "echo", "echo": {"hang_at": 5}},
        batch={"slots": 1},
        run={"max_attempts": 1},
    )
    journal = tmp_path / "out.jsonl.journal"

    def is_stuck(before: int) -> bool:
        records = [json.loads(line.split(b" ", 2)[2]) for line in journal.read_bytes()[before:].splitlines()]
        return any(record["kind"] == "admit" and "5" in record["numbers"].split() for record in records)

    for number in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM):
        size = journal.stat().st_size if journal.exists() else 0
        process = start("run", job)
        wait_until(lambda size=size: journal.exists() and is_stuck(size))
        process.send_signal(number)
        if number == signal.SIGTERM:
            process.kill()  # stuck for good: the stop waits for the step to end
        kill_after(process, 0)
    assert overnight("run", job, "--set", "model.echo.hang_at=null").returncode == 0
    answers, _ = read_output(tmp_path / "out.jsonl")
    assert errors(answers) == {}
