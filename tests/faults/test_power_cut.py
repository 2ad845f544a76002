"""Promise 2, power loss, on a real file system: ext4 on a loop device, shut down without a flush of its log.

What test_power_loss.py enumerates in a model is seen here as a kernel does it.
"""

from __future__ import annotations

import fcntl
import os
import random
import struct
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.ledger import publish as publish_module
from pipeline.ledger.files import Files, RunPaths
from tests.faults.compare import incomplete, problem_with
from tests.faults.naive import use_naive_ledger
from tests.faults.processes import TIMEOUT_S, Preparation, Run, make_job, run_to_end, slow_disk, slow_duration
from tests.faults.trials import Trials, chances

_SHUTDOWN = 0x8004587D  # FS_IOC_SHUTDOWN of Linux: _IOR('X', 125, __u32)
_NO_LOG_FLUSH = 2
MIB = 1 << 20

OPTIONS = ["defaults", "data=writeback,nodelalloc,noauto_da_alloc"]


class Disk:
    """A small ext4 file system whose power can be cut."""

    def __init__(self, directory: Path, options: str) -> None:
        self.root = directory / "disk"
        self.root.mkdir()
        self._image = directory / "image"
        self._options = options
        with self._image.open("wb") as file:
            file.truncate(128 * MIB)
        _command("mkfs.ext4", "-q", "-F", self._image)
        self.mount()

    def mount(self) -> None:
        _command("mount", "-o", f"loop,{self._options}", self._image, self.root)

    def unmount(self) -> None:
        _command("umount", self.root)

    def use_up(self, content: bytes) -> None:
        """Fill it with copies of `content` and remove them: what its free blocks hold from then on."""
        path = self.root / "used"
        with path.open("wb") as file, suppress(OSError):  # until it is full
            while True:
                file.write(content * (1 + MIB // len(content)))
                os.fsync(file.fileno())
        path.unlink()
        self.unmount()
        self.mount()

    def sync_something_else(self) -> None:
        """Another program's fsync, with which the kernel commits whatever names and sizes have changed by then."""
        descriptor = os.open(self.root / "other", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(descriptor, b"other")
        os.fsync(descriptor)
        os.close(descriptor)

    def cut(self) -> None:
        descriptor = os.open(self.root, os.O_RDONLY)
        fcntl.ioctl(descriptor, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        os.close(descriptor)


def _command(*words: str | Path) -> None:
    subprocess.run(list(map(str, words)), check=True, capture_output=True)


@pytest.fixture(params=OPTIONS)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system and cut its power")
    try:
        disk = Disk(tmp_path, request.param)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no ext4 on a loop device here: {error}")
    yield disk
    disk.unmount()


def no_directory_sync() -> None:
    """The broken variant: names are left to the kernel."""
    Files.sync_directory = lambda *_: None


def no_sync_before_the_name() -> None:
    """The broken variant: the output gets its name before its content is on the disk."""

    class Unsynced(publish_module.GrowingFile):
        def sync(self) -> None:
            pass

    publish_module.GrowingFile = Unsynced


def cut_off(disk: Disk, directory: Path, chance: random.Random, *prepare: Preparation) -> str | None:
    """One or two power cuts at random moments, some of them after the end; what is wrong after that."""
    output = disk.root / directory.name / "out.jsonl"
    output.parent.mkdir()
    job = make_job(directory, delay="0ms", output=output)
    for _ in range(chance.randint(1, 2)):
        run = Run(job, prepare=[slow_disk, *prepare])
        moment = chance.uniform(0.3, 1.2) * slow_duration() if chance.random() < 0.7 else TIMEOUT_S
        was_finished = run.wait(moment) is not None
        if chance.random() < 0.5:
            disk.sync_something_else()
        told = run.witness.stat().st_size if run.witness.exists() else 0
        disk.cut()
        run.kill_after(0)
        # Nothing is acknowledged after a power cut. Here the program lives on for a moment, and a sync that was under
        # way may succeed although the file system, shut down, has thrown away what it was to keep.
        if run.witness.exists():
            os.truncate(run.witness, told)
        disk.unmount()
        disk.mount()
        if output.exists() and (problem := incomplete(output)):
            return problem
        if was_finished and not (output.exists() and RunPaths(output).summary.exists()):
            return "gone: the finished run is not there"
    last = run_to_end(job, prepare=prepare)
    return problem_with(job, last.process.exitcode, last.talk, output)


def use_up(disk: Disk, directory: Path, *prepare: Preparation) -> None:
    earlier = make_job(directory / "earlier", delay="0ms")
    run_to_end(earlier, prepare=prepare)
    disk.use_up(RunPaths(earlier.with_name("out.jsonl")).journal.read_bytes())


def test_the_power_is_cut(disk: Disk, tmp_path: Path, trials: Trials, request: pytest.FixtureRequest) -> None:
    """On a disk full of what the journal of an earlier run has left, which `data=writeback` may show in a new file."""
    full = 500 if "defaults" in request.node.name else 200
    use_up(disk, tmp_path)
    for number, chance in enumerate(trials.seeds(2, full)):
        assert cut_off(disk, tmp_path / str(number), chance) is None


BROKEN = {
    "naive append": (use_naive_ledger, ("lost", "corrupt", "gone", "the output is there, and is not what it says")),
    "no directory sync": (no_directory_sync, ("gone", "lost")),
    "name before content": (no_sync_before_the_name, ("the output is there, and is not what it says", "not resumed")),
}


@pytest.mark.parametrize("name", BROKEN)
def test_less_care_is_noticed(disk: Disk, tmp_path: Path, trials: Trials, name: str) -> None:
    prepare, reasons = BROKEN[name]
    found = (cut_off(disk, tmp_path / str(number), chance, prepare) for number, chance in enumerate(chances(60)))
    assert trials.is_caught(2, name, found, *reasons)
