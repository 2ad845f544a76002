"""Which files the input is, and their lines: decompressed, or made of the rows of tables."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from pipeline.columnar import DirectoryRefused, is_columnar, rows_as_lines, tables_in
from pipeline.compression import DamagedStreamError, decompressing
from pipeline.errors import DataError, NotFoundError, Problem, SpecError
from pipeline.remote import RemoteError, RemoteFile, fetch, find, is_remote

CHUNK_BYTES = 1 << 20  # larger is no faster
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class InputFile:
    """One input file as it was when the job first looked at it; a read that finds it otherwise is refused."""

    name: str  # as the job names it
    size: int  # bytes on disk
    mtime_ns: int  # of a remote file a number that stands for its version
    remote: RemoteFile | None = field(default=None, compare=False)

    @property
    def path(self) -> Path:
        """Where it lies on this machine; the copy of a remote file is made when it is first read."""
        return Path(self.name) if self.remote is None else self.remote.copy


def expand_inputs(paths: Sequence[str]) -> list[InputFile]:
    """The files that the paths, globs and directories of `input.path` name: in the order given, each glob sorted.

    A directory stands for the tables of a data set.

    Raises NotFoundError with all that is missing, unreadable or no plain file; SpecError where one file comes twice.
    """
    files: list[InputFile] = []
    missing: list[Problem] = []
    for pattern in paths:
        try:
            files += _find(pattern) if is_remote(pattern) else [_stat_input(path) for path in _expand(pattern)]
        except NotFoundError as error:
            missing += error.problems
    if missing:
        raise NotFoundError(missing)
    seen: set[str] = set()
    twice = [file.name for file in files if file.name in seen or seen.add(file.name)]
    if twice:
        raise SpecError([Problem(f"names {name} twice", field="input.path") for name in twice])
    return files


def _find(pattern: str) -> list[InputFile]:
    try:
        return [InputFile(file.url, file.size, _as_number(file.version), file) for file in find(pattern)]
    except RemoteError as error:
        raise _refuse(pattern, str(error)) from error


def _as_number(version: str) -> int:
    return int.from_bytes(hashlib.sha256(version.encode()).digest()[:7])


def _expand(pattern: str) -> list[Path]:
    if not glob.has_magic(pattern) or Path(pattern).is_dir():
        return _files_of(Path(pattern))
    matches = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207  Path.glob refuses absolute patterns
    # Without a match it may still be the plain name of a file.
    return [path for match in matches if not (path := Path(match)).is_dir()] or [Path(pattern)]


def _files_of(path: Path) -> list[Path]:
    """The path itself, or the tables of the data set that it is the directory of."""
    try:
        return tables_in(path) if path.is_dir() else [path]
    except DirectoryRefused as error:
        raise _refuse(path, str(error)) from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise _refuse(path, f"is no data set that can be read: {error}") from None


def _refuse(path: Path | str, message: str) -> NotFoundError:
    return NotFoundError(Problem(message, file=str(path), field="input.path"))


def _stat_input(path: Path) -> InputFile:
    def refuse(message: str) -> NotFoundError:
        return _refuse(path, message)

    try:
        # Asked before opening: the open of a named pipe would wait for its writer.
        if path.exists() and not path.is_file():
            raise refuse("this is no plain file, and the input is read more than once; save it to a file first")
        with path.open("rb") as stream:
            stat = os.fstat(stream.fileno())
    except FileNotFoundError:
        raise refuse("no file matches this pattern" if glob.has_magic(str(path)) else "no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise refuse(f"cannot be read: {error.strerror if isinstance(error, OSError) else error}") from None
    return InputFile(str(path), stat.st_size, stat.st_mtime_ns)


@contextmanager
def _reading(file: InputFile) -> Generator[IO[bytes]]:
    """The file as it lies on disk; what goes wrong while reading it becomes an error with its name."""
    try:
        if file.remote is not None:
            fetch(file.remote)
        with file.path.open("rb", buffering=0) as raw:
            _refuse_changed(file, raw)
            yield raw
    except DamagedStreamError as error:
        raise DataError(Problem(str(error), file=file.name)) from None
    except OSError as error:
        raise NotFoundError(Problem(f"cannot be read: {error.strerror}", file=file.name)) from None


def _refuse_changed(file: InputFile, raw: IO[bytes]) -> None:
    """Items are known by their position: an input edited while it is read would give answers to other lines."""
    stat = os.fstat(raw.fileno())
    if stat.st_size != file.size or (file.remote is None and stat.st_mtime_ns != file.mtime_ns):
        raise DataError(Problem("was changed while it was in use; run again when it is complete", file=file.name))


def read_chunks(file: InputFile, chunk_bytes: int, progress: Callable[[int], None] | None = None) -> Iterator[bytes]:
    """The lines of one file, decompressed, or the rows of a table as lines.

    The first chunk is the first three bytes, where a byte order mark would be; of a table, which has none, some lines.
    """
    name = file.path.name
    with _reading(file) as raw:
        position = 0
        for chunk in rows_as_lines(raw, name) if is_columnar(name) else _decompressed(raw, name, chunk_bytes):
            yield chunk
            _refuse_changed(file, raw)
            if progress is not None:
                progress(raw.tell() - position)
                position = raw.tell()


def _decompressed(raw: IO[bytes], name: str, chunk_bytes: int) -> Iterator[bytes]:
    with decompressing(raw, name) as stream:
        chunk = stream.read(len(BYTE_ORDER_MARK))
        while chunk:
            yield chunk
            chunk = stream.read(chunk_bytes)
