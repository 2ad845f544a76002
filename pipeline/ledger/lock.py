"""One process at a time works on a run: a POSIX record lock on a file that is never written, moved or removed.

`flock` would be kept alive by an orphaned child of a killed holder; a record lock belongs to the process alone. In
return it does not exclude two holders inside one process and is dropped when the process closes *any* descriptor of
the file, so the process keeps a register and opens a file that it holds no second time.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
from contextlib import suppress
from pathlib import Path

from pipeline.errors import BusyError, OutputError, Problem
from pipeline.ledger.files import DISK, Files, creating

# struct flock of Linux on 64 bits: l_type, l_whence, l_start, l_len, l_pid.
_FLOCK = struct.Struct("hhqqi0q")

_held: dict[tuple[int, int], int] = {}  # device and inode → the process that holds it; a forked child inherits the dict
_register = threading.Lock()


class RunLock:
    """The right to write the files of one run, until `release` or the end of the process."""

    def __init__(self, path: Path, files: Files = DISK) -> None:
        """Take the lock, creating its file where missing.

        Raises BusyError at once where another holder has it; OutputError where it cannot be created, or where the
        file system has no locks.
        """
        self._files = files
        with _register:
            if _is_ours(path):
                raise _busy(path, os.getpid())
            with creating(path):
                self._descriptor = files.open(path, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                files.close(self._descriptor)
                if isinstance(error, BlockingIOError | PermissionError):  # EAGAIN or EACCES, says fcntl(2)
                    raise _busy(path, _query(path)) from None
                message = f"the file system gives no locks ({error.strerror}); write to another one"
                raise OutputError(Problem(message, file=str(path))) from error
            self._key = _identity(os.fstat(self._descriptor))
            _held[self._key] = os.getpid()

    def release(self) -> None:
        with _register:
            del _held[self._key]
            self._files.close(self._descriptor)


def lock_holder(path: Path) -> int | None:
    """The process that holds the lock now, asked without taking it or opening the file for writing; None for none."""
    with _register:
        return os.getpid() if _is_ours(path) else _query(path)


def _is_ours(path: Path) -> bool:
    try:
        return _held.get(_identity(path.stat())) == os.getpid()
    except OSError:
        return False


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino


def _query(path: Path) -> int | None:
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        finally:
            os.close(descriptor)
        kind, _, _, _, process = _FLOCK.unpack(answer)
        return None if kind == fcntl.F_UNLCK else process
    return None


def _busy(path: Path, process: int | None) -> BusyError:
    who = f"process {process}" if process else "another process"
    return BusyError(Problem(f"{who} is working on this run; wait for it or stop it", file=str(path)))
