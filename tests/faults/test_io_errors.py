"""Promise 3, I/O errors: every call refused once or for ever ends the run with 73, 74 or success, and it resumes."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.ledger import files as files_module
from tests.faults.compare import problem_with
from tests.faults.naive import use_buffered_ledger
from tests.faults.processes import NUM_ANSWERS, Preparation, Run, make_job, num_generated, run_to_end
from tests.faults.test_kills import needs_strace, traced
from tests.faults.trials import Trials, chances

CALLS = ("open", "write", "fdatasync", "fsync", "ftruncate", "link", "unlink", "replace")
ERRORS = ("ENOSPC", "EDQUOT", "EIO", "EINTR", "short")
FOR_EVER = 1_000_000
LAST_CALL = 24  # of a kind; runs have fewer of most


def short_patience() -> None:
    """A full disk is waited for as often as ever, in less time."""
    files_module._PAUSE_S = 0.0001
    files_module.Patience.__init__.__defaults__ = (0.001, time.sleep)


def refuse(call: str, error: str, first: int, count: int, output: Path) -> None:
    """Calls number `first` and following of this kind on the run's files fail; short: a write does half its work."""
    calls = 0
    original = getattr(os, call)

    def concerns(target: Any) -> bool:
        path = Path(f"/proc/self/fd/{target}").readlink() if isinstance(target, int) else Path(target)
        return path.name.startswith(output.name) or path == output.parent

    def refusing(target: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        if not concerns(target):
            return original(target, *arguments, **options)
        calls += 1
        if not first <= calls < first + count:
            return original(target, *arguments, **options)
        if error == "short":
            half = arguments[0][: max(1, len(arguments[0]) // 2)]
            return original(target, half, *arguments[1:], **options)
        if call == "write":  # some of it got through
            original(target, arguments[0][: len(arguments[0]) // 2])
        code = getattr(errno, error)
        raise OSError(code, os.strerror(code))

    setattr(os, call, refusing)


def refused(directory: Path, call: str, error: str, first: int, count: int, *prepare: Preparation) -> str | None:
    """One run with the failure and one without; what is wrong."""
    job = make_job(directory, delay="0ms")
    output = job.with_name("out.jsonl")
    run = run_to_end(job, prepare=[short_patience, partial(refuse, call, error, first, count, output), *prepare])
    code = run.process.exitcode
    if code not in (3, 73, 74):
        return f"badly ended: exit code {code}: {run.talk}"
    if code == 3 and (problem := problem_with(job, code, run.talk)):
        return problem
    last = run_to_end(job, prepare=prepare)
    return problem_with(job, last.process.exitcode, last.talk)


def cases() -> list[tuple[str, str, int, int]]:
    """Each call, each error, once and for ever, at each moment of a run."""
    return [
        (call, error, first, count)
        for call in CALLS
        for error in (ERRORS if call == "write" else ERRORS[:-1])
        for first in range(1, LAST_CALL + 1)
        for count in (1, FOR_EVER)
    ]


@pytest.mark.parametrize("part", range(4))
def test_any_call_may_be_refused_once_or_for_ever(tmp_path: Path, trials: Trials, part: int) -> None:
    all_cases = cases()[part::4]
    for number, case in enumerate(random.Random(part).sample(all_cases, trials.begin(3, 4 * len(all_cases), 4))):
        trials.num_trials += 1
        assert refused(tmp_path / str(number), *case) is None, case


def test_a_buffer_glues_what_an_error_has_torn(tmp_path: Path, trials: Trials) -> None:
    def attempt(number: int, chance: random.Random) -> str | None:
        case = "write", chance.choice(["ENOSPC", "EIO"]), chance.randint(1, 8), 1
        return refused(tmp_path / str(number), *case, use_buffered_ledger)

    found = (attempt(number, chance) for number, chance in enumerate(chances(60)))
    assert trials.is_caught(3, "buffered writer", found, "lost", "corrupt")


@needs_strace
def test_the_kernel_itself_may_refuse(tmp_path: Path, trials: Trials) -> None:
    """A sample of the same below Python, so that nothing between it and the kernel hides a failure."""
    for number, chance in enumerate(trials.seeds(3, 100)):
        job = make_job(tmp_path / str(number), delay="0ms")
        call = chance.choice(["write", "fdatasync", "fsync", "link", "rename", "openat", "unlink"])
        moment = f"{chance.randint(1, 12)}{chance.choice(['', '+'])}"
        run = traced(job, "-e", f"inject={call}:error=EIO:when={moment}")
        assert run.returncode in (3, 73, 74), (call, moment, run.stderr)
        assert "Traceback" not in run.stderr
        last = run_to_end(job)
        assert problem_with(job, last.process.exitcode, last.talk) is None, (call, moment)


# Limits of the process


def limit(which: int, value: int) -> None:
    resource.setrlimit(which, (value, resource.getrlimit(which)[1]))


def test_a_limit_on_the_size_of_files_is_an_io_error(tmp_path: Path, trials: Trials) -> None:
    for number, chance in enumerate(trials.seeds(3, 100)):
        job = make_job(tmp_path / str(number), delay="0ms")
        size = chance.randint(1, 16_000)
        run = run_to_end(job, prepare=[partial(limit, resource.RLIMIT_FSIZE, size)])
        assert run.process.exitcode in (3, 73, 74), (size, run.talk)
        assert run.process.exitcode != -signal.SIGXFSZ
        last = run_to_end(job)
        assert problem_with(job, last.process.exitcode, last.talk) is None


def few_descriptors(more: int) -> None:
    used = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    limit(resource.RLIMIT_NOFILE, used + 1 + more)


def test_few_descriptors_are_enough_or_said_to_be_too_few(tmp_path: Path, trials: Trials) -> None:
    codes = []
    for more in range(10):
        job = make_job(tmp_path / str(more), delay="0ms")
        run = run_to_end(job, prepare=[partial(few_descriptors, more)])
        codes.append(run.process.exitcode)
        last = run_to_end(job)
        assert problem_with(job, last.process.exitcode, last.talk) is None
    trials.tried_all(3, len(codes))
    assert codes[-1] == 3, codes
    assert set(codes) <= {3, 65, 66, 73, 74}, codes


# A file system that is really full (promise 4)


def mounts(directory: Path) -> bool:
    directory.mkdir()
    return os.system(f"mount -t tmpfs -o size=64k tmpfs '{directory}' 2> /dev/null") == 0


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 256 KiB, and how to make room on it."""
    disk = tmp_path / "disk"
    if os.geteuid() != 0 or not mounts(disk):
        pytest.skip("only root may mount a small file system")
    yield disk
    os.system(f"umount '{disk}'")


def fill(disk: Path, left: int) -> Path:
    """A file that leaves so many bytes free, more or less."""
    filler = disk / "filler"
    free = os.statvfs(disk)
    filler.write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - left)))
    return filler


def with_room_in_time(job: Path, filler: Path) -> str | None:
    run = Run(job, prepare=[partial(patience, 60.0)])
    deadline = time.monotonic() + 30
    while run.wait(0.005) is None and "for room" not in run.talk:
        if time.monotonic() > deadline:
            return "never said that the disk is full"
    filler.unlink()
    code = run.end()
    if num_generated(run.witness) != NUM_ANSWERS:
        return f"generated again: {num_generated(run.witness)} answers instead of {NUM_ANSWERS}"
    return problem_with(job, code, run.talk, filler.with_name("out.jsonl"))


def patience(total_s: float) -> None:
    files_module._PAUSE_S = 0.002
    files_module.Patience.__init__.__defaults__ = (total_s, time.sleep)


def without_room(job: Path, filler: Path, *prepare: Preparation) -> str | None:
    run = run_to_end(job, prepare=[partial(patience, 0.01), *prepare])
    if run.process.exitcode not in (3, 73, 74):
        return f"badly ended: {run.process.exitcode}: {run.talk}"
    filler.unlink(missing_ok=True)
    last = run_to_end(job, prepare=prepare)
    return problem_with(job, last.process.exitcode, last.talk, filler.with_name("out.jsonl"))


@pytest.mark.parametrize("outcome", [with_room_in_time, without_room])
def test_a_full_disk(
    tmp_path: Path, small_disk: Path, trials: Trials, outcome: Callable[[Path, Path], str | None]
) -> None:
    for number, chance in enumerate(trials.seeds(4, 100)):
        # At least a page for the lock and one for the journal, without which no run begins.
        assert outcome(*nearly_full(tmp_path / str(number), small_disk, chance.randint(0, 12))) is None


def nearly_full(directory: Path, disk: Path, num_pages: int) -> tuple[Path, Path]:
    """A job whose output is on the disk, with so many pages left, and the file that takes the rest."""
    for path in disk.iterdir():
        path.unlink()
    os.system(f"mount -o remount,size=256k '{disk}'")
    job = make_job(directory, delay="0ms", output=disk / "out.jsonl")
    return job, fill(disk, num_pages * 4096)


def test_a_buffer_does_not_bear_a_full_disk(tmp_path: Path, small_disk: Path, trials: Trials) -> None:
    found = (
        without_room(*nearly_full(tmp_path / str(number), small_disk, chance.randint(0, 6)), use_buffered_ledger)
        for number, chance in enumerate(chances(60))
    )
    assert trials.is_caught(4, "buffered writer, full disk", found, "badly ended", "lost", "corrupt", "not resumed")
