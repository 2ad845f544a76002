"""Promise 12, one writer: of several starters one runs and the others leave at once, and the dead hold nothing."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest

import pipeline.ledger.lock as lock_module
from tests.command import wait_until
from tests.faults.compare import problem_with
from tests.faults.processes import Preparation, Run, make_job, run_to_end
from tests.faults.trials import Trials, chances


def no_lock() -> None:
    """The broken variant: everybody is let in."""
    lock_module.fcntl = _Fcntl(lambda *_: None)


def flock() -> None:
    """The broken variant: a lock that belongs to the open file, and so to every child that inherits it."""
    lock_module.fcntl = _Fcntl(fcntl.flock)


class _Fcntl:
    """The module with another lockf."""

    def __init__(self, lockf: object) -> None:
        self.lockf = lockf

    def __getattr__(self, name: str) -> object:
        return getattr(fcntl, name)


def raced(directory: Path, chance: random.Random, *prepare: Preparation) -> str | None:
    """Two to eight start at once; what is wrong with how they part."""
    job = make_job(directory, delay="5ms")
    runs: list[tuple[Run, float]] = []
    for number in range(chance.randint(2, 8)):
        run = Run(job, prepare=prepare, witness=job.with_name(f"witness{number}"))
        runs.append((run, time.monotonic()))
        time.sleep(chance.choice([0, 0, 0.01]))
    codes: list[int] = []
    left: list[float] = []
    for run, began in runs:
        codes.append(run.end())
        if codes[-1] == 75:
            left.append(time.monotonic() - began)
    if codes.count(3) != 1 or set(codes) != {3, 75}:
        return f"not one writer: exit codes {sorted(codes)}"
    winner = runs[codes.index(3)][0]
    if any(run.witness.exists() and run.witness.read_text() for run, _ in runs if run is not winner):
        return "not one writer: another has answers of its own"
    winner.witness.rename(job.with_name("witness"))
    return problem_with(job, 3, winner.talk)


def test_of_many_starters_one_runs(tmp_path: Path, trials: Trials) -> None:
    for number, chance in enumerate(trials.seeds(12, 200)):
        assert raced(tmp_path / str(number), chance) is None


def test_without_a_lock_several_run(tmp_path: Path, trials: Trials) -> None:
    found = (raced(tmp_path / str(number), chance, no_lock) for number, chance in enumerate(chances(50)))
    assert trials.is_caught(12, "no lock", found, "not one writer")


def test_those_that_find_a_holder_leave_at_once_and_touch_nothing(tmp_path: Path, trials: Trials) -> None:
    job = make_job(tmp_path, delay="1h", run={"save_unfinished": "1h"})  # so that the holder writes nothing either
    holder = Run(job)
    journal = job.with_name("out.jsonl.journal")
    wait_until(lambda: journal.exists() and b'"admit"' in journal.read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.glob("out.jsonl*")}
    for _ in trials.seeds(12, 200):
        other = Run(job, witness=job.with_name("other"))
        assert other.seconds_to_end() < 2
        assert other.end() == 75
    assert {path: path.read_bytes() for path in tmp_path.glob("out.jsonl*")} == before
    holder.kill_after(0)


def leave_a_child(orphan: Path) -> None:
    """As a library might: a child that inherits every descriptor, started once the lock is held."""

    class Lock(lock_module.RunLock):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            os.set_inheritable(self._descriptor, True)
            child = subprocess.Popen(["sleep", "60"], close_fds=False)
            orphan.write_text(str(child.pid))

    import pipeline.ledger.ledger

    pipeline.ledger.ledger.RunLock = Lock


def orphaned(directory: Path, chance: random.Random, *prepare: Preparation) -> str | None:
    """The holder is killed and its child lives on; whether the next start succeeds at once."""
    job = make_job(directory)
    orphan = directory / "orphan"
    holder = Run(job, prepare=[*prepare, partial(leave_a_child, orphan)])
    wait_until(lambda: orphan.exists() and orphan.read_text() != "")
    holder.kill_after(chance.uniform(0, 0.1))
    try:
        last = run_to_end(job, prepare=prepare)
        if last.process.exitcode == 75:
            return "locked out by an orphan"
        return problem_with(job, last.process.exitcode, last.talk)
    finally:
        os.kill(int(orphan.read_text()), signal.SIGKILL)


@pytest.mark.parametrize("part", range(2))
def test_an_orphan_of_a_killed_holder_locks_nobody_out(tmp_path: Path, trials: Trials, part: int) -> None:
    for number, chance in enumerate(trials.seeds(12, 200, 2)):
        assert orphaned(tmp_path / str(number), chance) is None


def test_flock_would_stay_with_the_orphan(tmp_path: Path, trials: Trials) -> None:
    found = (orphaned(tmp_path / str(number), chance, flock) for number, chance in enumerate(chances(50)))
    assert trials.is_caught(12, "flock", found, "locked out by an orphan")
