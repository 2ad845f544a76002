"""Tests a directory for what the ledger's promises rest on: locks, links, renames, syncs, and what lies beneath.

Each check is by itself: a function from an empty directory to a finding. What a file system claims is tried out; what
only a power cut would show (whether a sync reaches the medium) can only be judged by the time it takes.
"""

from __future__ import annotations

import errno
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from pipeline.errors import OvernightError
from pipeline.ledger.files import DISK, GrowingFile, Patience, creating, place_new
from pipeline.ledger.lock import RunLock, lock_holder
from pipeline.records import Finding

_NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "afs", "ceph", "lustre", "glusterfs", "gpfs", "beegfs"})
_MEMORY = frozenset({"tmpfs", "ramfs"})
_NUM_SYNCS = 15
_SLOW_SYNC_S = 0.1  # two of them each second: a fifth of the time between two commits
_FAST_SYNC_S = 2e-6  # no medium answers in this time
_NUM_RENAMES = 200
_LITTLE_SPACE_BYTES = 1 << 30
_ESCAPES = {r"\040": " ", r"\011": "\t", r"\012": "\n", r"\134": "\\"}

# Run by a second process: 1 if it gets the lock, else 0, and who F_GETLK says has it.
_CONTENDER = """
import fcntl, os, struct, sys
descriptor = os.open(sys.argv[1], os.O_RDWR)
answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, struct.pack("hhqqi0q", fcntl.F_WRLCK, 0, 0, 0, 0))
try:
    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    print(1, struct.unpack("hhqqi0q", answer)[4])
except OSError:
    print(0, struct.unpack("hhqqi0q", answer)[4])
"""


def check_directory(directory: Path) -> list[Finding]:
    """What the file system of `directory` does of what the ledger needs; leaves nothing behind.

    Raises OutputError where nothing can be created in it.
    """
    with creating(directory):
        scratch = Path(tempfile.mkdtemp(prefix=".overnight-doctor-", dir=directory))
    try:
        return [_tried(check, scratch) for check in CHECKS]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _tried(check: Callable[[Path], Finding], scratch: Path) -> Finding:
    name = check.__name__.removeprefix("check_").replace("_", " ")
    try:
        return check(scratch)
    except (OSError, OvernightError, subprocess.SubprocessError) as error:
        reason = error.__cause__ or error
        return Finding(name, "trouble", f"fails: {reason}", "write the output to another file system")


def check_file_system(directory: Path) -> Finding:
    kind, mount = mounted_at(directory)
    what = f"{kind} at {mount}"
    if kind in _NETWORK:
        advice = "locks and syncs are only as good as the server; keep output.path on a local disk and copy the result"
        return Finding("file system", "warning", f"{what}, a network file system", advice)
    if kind.startswith("fuse"):
        return Finding(
            "file system", "warning", f"{what}, a program's", "prefer a disk's own file system for output.path"
        )
    if kind in _MEMORY:
        advice = "answers survive a crash of the run, not of the machine; write output.path to a disk"
        return Finding("file system", "warning", f"{what}, which is memory", advice)
    return Finding("file system", "good", what)


def check_space(directory: Path) -> Finding:
    free = shutil.disk_usage(directory).free
    found = f"{free / 2**30:.1f} GiB free"
    if free < _LITTLE_SPACE_BYTES:
        return Finding("space", "warning", found, "a run needs its answers twice: beside the output, and published")
    return Finding("space", "good", found)


def check_lock(directory: Path) -> Finding:
    """A second process must not get the lock, must see who has it, and must get it when it is free."""
    path = directory / "lock"
    lock = RunLock(path)
    try:
        got, holder = _contend(path)
        seen = lock_holder(path)
    finally:
        lock.release()
    free, _ = _contend(path)
    advice = "two runs could write one output; use another file system, or mount this one with locking"
    if got:
        return Finding("lock", "trouble", "a second process gets a lock that is taken", advice)
    if not free:
        return Finding("lock", "trouble", "a lock that was given back stays taken", advice)
    if holder != os.getpid() or seen != os.getpid():
        advice = "`overnight status` cannot tell a running run from a stopped one here"
        return Finding("lock", "warning", "excludes another process, and does not say who has it", advice)
    return Finding("lock", "good", "excludes another process and names the holder")


def _contend(path: Path) -> tuple[bool, int]:
    words = [sys.executable, "-S", "-c", _CONTENDER, str(path)]
    answer = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    return answer[0] == "1", int(answer[1])


def check_new_names(directory: Path) -> Finding:
    """Publishing must not replace a file that is there."""
    source, target = directory / "source", directory / "target"
    source.write_bytes(b"ours")
    target.write_bytes(b"a stranger's")
    with suppress(FileExistsError):
        place_new(DISK, source, target)
    if target.read_bytes() != b"a stranger's":
        return Finding("new names", "trouble", "a file that was there is replaced", "publish to another file system")
    target.unlink()
    place_new(DISK, source, target)
    if source.exists() or target.read_bytes() != b"ours":
        return Finding("new names", "trouble", "a file does not get its name", "publish to another file system")
    return Finding("new names", "good", "an existing file is never replaced")


def check_rename(directory: Path) -> Finding:
    """Whoever reads while a file is replaced must see one whole file, the old or the new."""
    target, source = directory / "renamed", directory / "next"
    contents = [bytes([number]) * 4096 for number in (65, 66)]
    target.write_bytes(contents[0])
    wrong: list[str] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                if target.read_bytes() not in contents:
                    wrong.append("half a file is seen")
            except OSError as error:
                wrong.append(f"the file is gone for a moment ({error.strerror})")

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(_NUM_RENAMES):
            source.write_bytes(contents[number % 2])
            DISK.rename(source, target)
    finally:
        done.set()
        reader.join()
    if wrong:
        return Finding("rename", "trouble", f"while a file is replaced {wrong[0]}", "publish to another file system")
    return Finding("rename", "good", f"atomic in {_NUM_RENAMES} replacements under a reader")


def check_sync(directory: Path) -> Finding:
    file = GrowingFile(DISK, directory / "synced", Patience(0.0))
    seconds: list[float] = []
    try:
        for _ in range(_NUM_SYNCS):
            file.append(b"x" * 4096)
            began = time.perf_counter()
            file.sync()
            seconds.append(time.perf_counter() - began)
    finally:
        file.close()
    median = statistics.median(seconds)
    found = f"fdatasync takes {1e3 * median:.2f} ms (median of {_NUM_SYNCS}, at most {1e3 * max(seconds):.2f} ms)"
    if median > _SLOW_SYNC_S:
        advice = f"each commit waits for two; a fast disk would give back {min(100, 200 * median):.0f} % of a fast run"
        return Finding("sync", "warning", found, advice)
    if median < _FAST_SYNC_S and mounted_at(directory)[0] not in _MEMORY:
        advice = "no disk is that fast: syncs may not reach it, and a power cut may then lose what was acknowledged"
        return Finding("sync", "warning", found, advice)
    return Finding("sync", "good", found)


def check_truncate(directory: Path) -> Finding:
    """What was cut off must stay off, and the next append must follow what is left."""
    file = GrowingFile(DISK, directory / "cut", Patience(0.0))
    try:
        file.append(b"kept\nhalf a li")
        file.cut(5)
        file.append(b"more\n")
        file.sync()
        file.check_untouched()
    finally:
        file.close()
    if (directory / "cut").read_bytes() != b"kept\nmore\n":
        return Finding("truncate", "trouble", "a cut file does not go on where it was cut", "use another file system")
    return Finding("truncate", "good", "a cut file goes on where it was cut")


def check_directory_sync(directory: Path) -> Finding:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        advice = "after a power cut a published file may be without its name; the answers are safe"
        return Finding("directory sync", "warning", "names cannot be synced", advice)
    finally:
        os.close(descriptor)
    return Finding("directory sync", "good", "names can be synced")


CHECKS: tuple[Callable[[Path], Finding], ...] = (
    check_file_system,
    check_space,
    check_lock,
    check_new_names,
    check_rename,
    check_sync,
    check_truncate,
    check_directory_sync,
)


def mounted_at(path: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> tuple[str, Path]:
    """Type and mount point of the file system that holds `path`; unknown and / where the kernel does not say.

    The lines of mountinfo are described in proc(5).
    """
    path = path.resolve()
    found = "unknown", Path("/")
    for kind, point in _mounts(mountinfo):
        # A later mount at the same point hides the earlier one.
        if path.is_relative_to(point) and len(point.parts) >= len(found[1].parts):
            found = kind, point
    return found


def _mounts(mountinfo: Path) -> Iterator[tuple[str, Path]]:
    try:
        lines = mountinfo.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        before, _, after = line.partition(" - ")
        point = before.split(" ")[4]
        for escape, character in _ESCAPES.items():
            point = point.replace(escape, character)
        yield after.split(" ")[0], Path(point)
