"""Promise 7, a finished run again: the same exit code at once, no model, and not a byte or time changed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pipeline.job
from tests.command import overnight, write_job
from tests.faults.processes import Preparation, make_job, run_to_end
from tests.faults.trials import Trials

Snapshot = dict[str, tuple[bytes, int, int]]


def snapshot(directory: Path) -> Snapshot:
    """Content, time and inode of every file that a run must leave alone."""
    witnesses = ("witness", "talk", "trace")
    files = [path for path in directory.iterdir() if path.is_file() and path.name not in witnesses]
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) for path in files}


def forget_the_end() -> None:
    """The broken variant: does not look whether the run is finished before it takes it up."""
    pipeline.job.find_finished = lambda *_arguments, **_options: None


def refuse_engines() -> None:
    """Whoever chooses an engine is about to load a model."""
    import pipeline.engines

    def refuse(*_arguments: object) -> None:
        raise AssertionError("an engine was chosen")

    pipeline.engines.choose_engine = refuse


def again(job: Path, exit_code: int, *prepare: Preparation) -> str | None:
    before = snapshot(job.parent)
    run = run_to_end(job, prepare=prepare)
    if run.process.exitcode != exit_code:
        return f"another exit code: {run.process.exitcode} instead of {exit_code}: {run.talk}"
    if snapshot(job.parent) != before:
        return "changed: a file of the finished run is another one"
    return None


def seconds_of(job: Path, exit_code: int) -> float:
    """How long the whole command takes, by the clock or in processor time, at best: others keep the processors busy."""
    took: list[float] = []
    for _ in range(3):
        before, began = os.times(), time.monotonic()
        assert overnight("run", job).returncode == exit_code
        after, wall = os.times(), time.monotonic() - began
        used = after.children_user + after.children_system - before.children_user - before.children_system
        took += [wall, used]
    return min(took)


@pytest.mark.parametrize("exit_code", [0, 3])
def test_a_finished_run_is_left_alone(tmp_path: Path, trials: Trials, exit_code: int) -> None:
    job = make_job(tmp_path) if exit_code else write_job(tmp_path, [{"prompt": "fine"}])
    assert run_to_end(job).process.exitcode == exit_code
    for _ in trials.seeds(7, 100):
        assert again(job, exit_code, refuse_engines) is None
    assert seconds_of(job, exit_code) < 1.0
    assert trials.is_caught(7, "no look before", [again(job, exit_code, forget_the_end) for _ in range(2)], "changed")


def test_a_finished_run_of_a_real_model_loads_nothing(tmp_path: Path, trials: Trials) -> None:
    model = {"engine": "transformers", "path": "builtin:tiny-qwen3-next"}
    job = write_job(tmp_path, [{"prompt": "fine"}], model=model, generation={"max_new_tokens": 2})
    assert overnight("run", job).returncode == 0
    before = snapshot(tmp_path)
    trials.tried_all(7, 1)
    assert seconds_of(job, 0) < 1.0
    assert snapshot(tmp_path) == before


def test_a_finished_run_does_not_import_what_only_a_run_needs(tmp_path: Path) -> None:
    job = write_job(tmp_path, [{"prompt": "fine"}])
    assert overnight("run", job).returncode == 0
    script = (
        "import sys\nfrom pipeline import load_job, run_job\n"
        f"assert run_job(load_job({str(job)!r})).exit_code == 0\n"
        "print(*(name for name in sys.modules if name.startswith(('pipeline.forecast', 'pipeline.loading'))))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
