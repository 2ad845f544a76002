"""Every file operation that could lose data, in one place, so that a test can record, refuse or reorder each."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import DataError, OutputError, Problem, WriteError

log = logging.getLogger(__name__)

_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_NO_HARD_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
_NO_DIRECTORY_SYNC = frozenset({errno.EINVAL, errno.EOPNOTSUPP})
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_PAUSE_S = 1.0  # between two attempts to write to a full disk


@dataclass(frozen=True, slots=True)
class RunPaths:
    """The files of the run whose output is `output`; all lie beside it."""

    output: Path

    def _beside(self, suffix: str) -> Path:
        return self.output.with_name(self.output.name + suffix)

    @property
    def partial(self) -> Path:
        """Answers in the order in which they finished."""
        return self._beside(".partial")

    @property
    def journal(self) -> Path:
        """What of the partial file is committed, and all else that a later session must know."""
        return self._beside(".journal")

    @property
    def lock(self) -> Path:
        return self._beside(".lock")

    @property
    def summary(self) -> Path:
        """Appears last: the sign that the run is done."""
        return self._beside(".summary.json")

    @property
    def upload(self) -> Path:
        """What of the published files was copied elsewhere, where the job asks for that."""
        return self._beside(".upload.json")

    @property
    def log(self) -> Path:
        """Tracebacks of processes that crashed or hung, as the interpreter wrote them in its last moment."""
        return self._beside(".log")

    @property
    def unpublished(self) -> Path:
        """A file on its way to one of the names above; worthless after a crash."""
        return unpublished(self.output)

    def companion(self, suffix: str) -> Path:
        """A file that is published beside the output."""
        return self._beside(suffix)


def unpublished(target: Path) -> Path:
    """The name of what is on its way to be `target`."""
    return target.with_name(target.name + ".unpublished")


class Files:
    """The operations themselves, unbuffered; each raises OSError."""

    def open(self, path: Path, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC, 0o666)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def write(self, descriptor: int, data: bytes) -> None:
        """All of `data`, however many short writes that takes; on an error some of it may have been written."""
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]

    def truncate(self, descriptor: int, size: int) -> None:
        os.ftruncate(descriptor, size)

    def sync(self, descriptor: int) -> None:
        """Content and size are on the disk when this returns."""
        os.fdatasync(descriptor)

    def sync_directory(self, path: Path) -> None:
        """The names in the directory are on the disk when this returns."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _NO_DIRECTORY_SYNC:  # some network file systems have no such thing
                raise
        finally:
            os.close(descriptor)

    def make_directory(self, path: Path) -> None:
        path.mkdir(exist_ok=True)

    def link(self, source: Path, target: Path) -> None:
        os.link(source, target, follow_symlinks=False)

    def rename_new(self, source: Path, target: Path) -> None:
        """renameat2(2) with RENAME_NOREPLACE, which Python does not wrap: FileExistsError where the target exists."""
        import ctypes

        library = ctypes.CDLL(None, use_errno=True)
        if not hasattr(library, "renameat2"):
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(source))
        names = (os.fsencode(source), os.fsencode(target))
        if library.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_NOREPLACE) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(source), None, str(target))

    def rename(self, source: Path, target: Path) -> None:
        """Atomically; the target is replaced if it exists."""
        source.replace(target)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)


DISK = Files()


class Patience:
    """How long to wait for room on a full disk, in seconds over one run of failures.

    `sleep` may raise to end the waiting early, when the run is asked to stop.
    """

    def __init__(self, total_s: float = 300.0, sleep: Callable[[float], None] = time.sleep) -> None:
        self._total_s = total_s
        self._sleep = sleep
        self._waited_s = 0.0

    def wait(self, path: Path, error: OSError) -> None:
        """Return when it is time to try again; WriteError when there is nothing to wait for any more."""
        if error.errno not in _DISK_FULL or self._waited_s >= self._total_s:
            raise write_error(path, error) from error
        if self._waited_s == 0:
            log.warning("%s: %s; waiting up to %.0f s for room", path, error.strerror, self._total_s)
        self._sleep(_PAUSE_S)
        self._waited_s += _PAUSE_S

    def relieve(self) -> None:
        """A write succeeded: the next full disk is waited for from the start."""
        self._waited_s = 0.0


def write_error(path: Path, error: OSError) -> WriteError:
    """What the user reads when the disk refuses."""
    message = f"cannot write: {error.strerror}. Nothing that was acknowledged is lost; the same command resumes"
    return WriteError(Problem(message, file=str(path)))


@contextmanager
def writing(path: Path) -> Generator[None]:
    """Whatever the disk refuses in this block ends the run as an I/O error on `path`."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


@contextmanager
def creating(path: Path) -> Generator[None]:
    """Whatever the system refuses in this block means that the run's files cannot be made."""
    try:
        yield
    except OSError as error:
        raise OutputError(Problem(f"cannot be created: {error.strerror}", file=str(path))) from error


class GrowingFile:
    """A file that only this process writes, and only at its end; it knows the size at which all in it is whole.

    Opened for appending, created where missing. A failed append is taken back, so that no half-written data stays
    under what comes next. After a failed sync the kernel may have dropped the data and forgotten it, and a second sync
    would claim success: the file refuses all further use.
    """

    def __init__(self, files: Files, path: Path, patience: Patience, *, flags: int = os.O_CREAT) -> None:
        self._files = files
        self._patience = patience
        self._descriptor = files.open(path, os.O_WRONLY | os.O_APPEND | flags)
        self._sync_error: OSError | None = None
        stat = os.fstat(self._descriptor)
        self._inode = (stat.st_dev, stat.st_ino)
        self.path = path
        self.size = stat.st_size
        self.synced = 0  # bytes from the beginning that are known to be on the disk

    def append(self, data: bytes) -> None:
        """Raises WriteError, when a full disk stays full too."""
        self._refuse_after_failed_sync()
        while True:
            try:
                self._files.write(self._descriptor, data)
                break
            except OSError as error:
                self.take_back(self.size)
                self._patience.wait(self.path, error)
            except BaseException:  # a signal handler that raises
                self.take_back(self.size)
                raise
        self._patience.relieve()
        self.size += len(data)

    def sync(self) -> None:
        """Raises WriteError."""
        self._refuse_after_failed_sync()
        with writing(self.path):
            try:
                self._files.sync(self._descriptor)
            except OSError as error:
                self._sync_error = error
                raise
        self.synced = self.size

    def cut(self, size: int) -> None:
        """Drop all beyond the first `size` bytes. Raises WriteError."""
        with writing(self.path):
            self._files.truncate(self._descriptor, size)
        self.size = size
        self.synced = min(self.synced, size)

    def take_back(self, size: int) -> None:
        """Cut after a failure, as well as the disk lets us: what cannot be cut now is cut by recovery."""
        with suppress(WriteError):
            self.cut(size)

    def check_untouched(self) -> None:
        """DataError where another program has written to the file or put another in its place since we last did."""
        try:
            there = self.path.stat()
        except OSError:
            there = None
        if there is None or (there.st_dev, there.st_ino) != self._inode:
            what = "was removed or replaced by another program while the run was writing it"
        elif there.st_size != self.size:
            what = f"has {there.st_size} bytes, not the {self.size} that the run left: another program writes to it"
        else:
            return
        raise DataError(Problem(f"{what}; nothing more was written", file=str(self.path)))

    def close(self) -> None:
        self._files.close(self._descriptor)

    def _refuse_after_failed_sync(self) -> None:
        if self._sync_error is not None:
            raise write_error(self.path, self._sync_error)


def place_new(files: Files, source: Path, target: Path) -> None:
    """Move `source` to a name that must not exist yet, atomically; FileExistsError leaves a stranger's file untouched.

    By hard link and unlink (a rename would replace), or by renameat2 where the file system has no hard links.
    """
    try:
        files.link(source, target)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        files.rename_new(source, target)
    else:
        files.unlink(source)


def make_directories(files: Files, directory: Path) -> None:
    """Create `directory` and its parents, each name synced, those that an interrupted earlier call made as well."""
    directory = directory.absolute()
    upwards = (directory, *directory.parents)
    for path in reversed([path for path in upwards if not path.is_dir()]):
        files.make_directory(path)
    for path in upwards:
        # A directory that we may not list is not one that we made a name in.
        with suppress(PermissionError):
            files.sync_directory(path)
