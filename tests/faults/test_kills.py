"""Promise 1, kill anywhere: SIGKILL at random moments and at every system call; nothing is lost, doubled or changed."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import COMMAND, REPOSITORY
from tests.faults.compare import problem_with
from tests.faults.naive import use_buffered_ledger
from tests.faults.processes import Preparation, Run, duration, make_job, run_to_end
from tests.faults.trials import Trials, chances

PARTS = 8


def killed(directory: Path, chance: random.Random, *prepare: Preparation) -> str | None:
    """One to four kills at random moments, then to the end; what is wrong after that."""
    job = make_job(directory)
    for _ in range(chance.randint(1, 4)):
        Run(job, prepare=prepare).kill_after(chance.uniform(0.01, 1.1 * duration()))
    last = run_to_end(job, prepare=prepare)
    return problem_with(job, last.process.exitcode, last.talk)


@pytest.mark.parametrize("part", range(PARTS))
def test_kills_at_random_moments(tmp_path: Path, trials: Trials, part: int) -> None:
    for number, chance in enumerate(trials.seeds(1, 1000, PARTS)):
        assert killed(tmp_path / str(number), chance) is None


def test_kills_tear_what_is_resumed_by_parsing(tmp_path: Path, trials: Trials) -> None:
    whole = make_job(tmp_path / "whole")
    run = run_to_end(whole, prepare=[use_buffered_ledger])
    assert problem_with(whole, run.process.exitcode, run.talk) is None  # nothing but the kills spoils it
    found = (killed(tmp_path / str(number), chance, use_buffered_ledger) for number, chance in enumerate(chances(100)))
    assert trials.is_caught(1, "resume by parsing", found, "lost", "corrupt")


# System calls, and which of them come on the paths of a run

CALLS = ("openat", "write", "fdatasync", "fsync", "ftruncate", "link", "rename", "unlink")


def traced(job: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`overnight run` under strace, which sees only calls on the files of the run."""
    output = job.with_name("out.jsonl")
    suffixes = ("", ".partial", ".journal", ".lock", ".summary.json", ".unpublished")
    paths = [word for suffix in suffixes for word in ("-P", f"{output}{suffix}")]
    command = ["strace", "-f", "-qq", "-o", str(job.with_name("trace")), *paths, "-P", str(job.parent), *options]
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [*command, *COMMAND, "run", str(job)], env=env, capture_output=True, text=True, timeout=300, check=False
    )


def calls_of(directory: Path) -> list[tuple[str, int]]:
    """Every call of an undisturbed run: its name, and that it is the how manieth of that name."""
    job = make_job(directory, delay="0ms")
    assert traced(job, "-e", f"trace={','.join(CALLS)}").returncode == 3
    names = re.findall(r"^\d+ +(\w+)\(", job.with_name("trace").read_text(), re.MULTILINE)
    return [(name, number) for name in CALLS for number in range(1, names.count(name) + 1)]


def strace_works() -> bool:
    """Installed, and allowed to trace here."""
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-o", os.devnull, sys.executable, "-c", ""], capture_output=True).returncode == 0


needs_strace = pytest.mark.skipif(not strace_works(), reason="strace is not installed or may not trace here")


@needs_strace
def test_a_kill_at_every_system_call(tmp_path: Path, trials: Trials) -> None:
    calls = calls_of(tmp_path / "count")
    assert len(calls) > 40
    for name, number in random.Random(0).sample(calls, min(len(calls), trials.begin(1, len(calls)))):
        job = make_job(tmp_path / f"{name}-{number}", delay="0ms")
        run = traced(job, "-e", f"inject={name}:signal=KILL:when={number}")
        assert run.returncode == -9, (name, number, run.stderr)
        last = run_to_end(job)
        trials.num_trials += 1
        assert problem_with(job, last.process.exitcode, last.talk) is None, (name, number)
