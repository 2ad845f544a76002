"""Runs `overnight` as a user does: another process, its exit code and what it says."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-m", "pipeline"]
REPOSITORY = Path(__file__).parent.parent


def overnight(*words: str | Path, cwd: Path = REPOSITORY, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run to the end; paths in `words` are taken as they are."""
    command = [*COMMAND, *map(str, words)]
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def start(*words: str | Path, cwd: Path = REPOSITORY) -> subprocess.Popen[str]:
    """Begin and do not wait."""
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        [*COMMAND, *map(str, words)], cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def kill_after(process: subprocess.Popen[str], seconds: float, number: int = signal.SIGKILL) -> int:
    """Send a signal after so many seconds unless it has ended before; its exit code."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
    process.communicate(timeout=60)
    return process.returncode


def finish(job: Path) -> int:
    """Run the job to its end in this process, without a delay; its exit code. Verifies what was published."""
    from pipeline import load_job, run_job
    from pipeline.tools.verify import verify_job

    spec = load_job(job, overrides=["model.echo.delay=0ms"])
    code = run_job(spec, quiet=True).exit_code
    problems: list[Any] = []
    verify_job(spec, problems.append)
    assert problems == []
    return code


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Until the condition holds; fails after so many seconds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def is_generating(directory: Path, output: str = "out.jsonl") -> bool:
    """Whether the run of `write_job` has committed its first answers."""
    journal = directory / f"{output}.journal"
    return journal.exists() and b'"commit"' in journal.read_bytes()


def write_job(directory: Path, prompts: list[Any], **sections: Any) -> Path:
    """An echo job over these lines (dicts become JSON, bytes and strings stay) in `directory`; its file."""
    lines = [line if isinstance(line, bytes) else _as_line(line) for line in prompts]
    (directory / "in.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    job = {
        "model": {"engine": "echo"},
        "input": {"path": str(directory / "in.jsonl")},
        "output": {"path": str(directory / "out.jsonl")},
    }
    for name, values in sections.items():
        job[name] = {**job.get(name, {}), **values}
    path = directory / "job.yaml"
    path.write_text(json.dumps(job))  # JSON is YAML
    return path


def _as_line(line: Any) -> bytes:
    return (line if isinstance(line, str) else json.dumps(line)).encode()


def read_output(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The answers and the summary of a published file."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records[-1]["object"] == "summary"
    return records[:-1], records[-1]


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers with what may differ between two runs left out."""
    return [{key: value for key, value in record.items() if key != "timing"} for record in records]
