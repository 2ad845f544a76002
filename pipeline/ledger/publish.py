"""The finished output and its summary appear whole, or not at all, and never in the place of a stranger's file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

from pipeline.compression import compressed
from pipeline.errors import OutputError, Problem
from pipeline.ledger.files import Files, GrowingFile, Patience, RunPaths, place_new, writing
from pipeline.ledger.history import Published
from pipeline.records import Json

_WRITE_BYTES = 1 << 20

Summarize = Callable[[str], Mapping[str, Json]]


def write_output(
    files: Files,
    patience: Patience,
    paths: RunPaths,
    lines: Iterable[bytes],
    summarize: Summarize,
    *,
    summary_line: bool,
) -> Published:
    """Write `lines` and, if asked for, the summary as last line to a nameless file, synced and ready to be placed.

    A name that ends with .gz, .bz2, .xz or .zst asks for that compression. `summarize` is given the hexadecimal SHA-256
    of all lines before the summary's, uncompressed; the digest returned is that of the file. Raises WriteError.
    """
    with _Unpublished(files, patience, paths) as file:
        content = _Content(lines, summarize, summary_line=summary_line)
        digest = hashlib.sha256()
        for data in compressed(content, paths.output.name):
            digest.update(data)
            file.append(data)
        file.sync()
        assert content.summary is not None
        return Published(digest.hexdigest(), file.size, content.summary)


class _Content:
    """What the output holds, in pieces of about a mebibyte; `summary` is known when the last line has been drawn."""

    def __init__(self, lines: Iterable[bytes], summarize: Summarize, *, summary_line: bool) -> None:
        self._lines = lines
        self._summarize = summarize
        self._summary_line = summary_line
        self.summary: Mapping[str, Json] | None = None

    def __iter__(self) -> Iterator[bytes]:
        digest = hashlib.sha256()
        for piece in _gathered(self._lines):
            digest.update(piece)
            yield piece
        self.summary = self._summarize(digest.hexdigest())
        if self._summary_line:
            yield summary_bytes(self.summary)


def _gathered(lines: Iterable[bytes]) -> Iterator[bytes]:
    waiting: list[bytes] = []
    waiting_bytes = 0
    for data in lines:
        waiting.append(data)
        waiting_bytes += len(data)
        if waiting_bytes >= _WRITE_BYTES:
            yield b"".join(waiting)
            waiting, waiting_bytes = [], 0
    yield b"".join(waiting)


def place_output(files: Files, paths: RunPaths, ours: Collection[str]) -> None:
    """Give the file that `write_output` wrote the output's name, atomically; the caller syncs the directory.

    A file of that name is replaced only if its SHA-256 is among `ours`. Raises OutputError for any other, WriteError.
    """
    with writing(paths.output):
        if os.path.lexists(paths.output):
            if sha256_of(paths.output) not in ours:
                raise stranger(paths.output)
            files.rename(paths.unpublished, paths.output)
        else:
            try:
                place_new(files, paths.unpublished, paths.output)
            except FileExistsError:
                raise stranger(paths.output) from None


def place_journal(files: Files, patience: Patience, paths: RunPaths, line: bytes) -> None:
    """Begin a journal with its first line: it is never seen without, and never takes the place of another file.

    It also shows, before anything is spent on answers, that this file system can publish. Raises OSError, WriteError.
    """
    with _Unpublished(files, patience, paths) as file:
        file.append(line)
        file.sync()
    place_new(files, paths.unpublished, paths.journal)


def write_summary(files: Files, patience: Patience, paths: RunPaths, summary: Mapping[str, Json]) -> None:
    """Raises WriteError."""
    with _Unpublished(files, patience, paths) as file:
        file.append(summary_bytes(summary))
        file.sync()
    with writing(paths.summary):
        files.rename(paths.unpublished, paths.summary)
        files.sync_directory(paths.output.parent)


def summary_bytes(summary: Mapping[str, Json]) -> bytes:
    """The summary as one line, in ASCII: a file name that is no UTF-8 must not fail at the end of a night's work."""
    return (json.dumps(summary, allow_nan=False) + "\n").encode("ascii")


def sha256_of(path: Path) -> str | None:
    """Hexadecimal SHA-256 of a plain file's content; None where `path` is anything else."""
    if path.is_symlink() or not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stranger(path: Path) -> OutputError:
    advice = "move it away, write to another output.path, or give --fresh, which moves it aside"
    return OutputError(Problem(f"exists and is not of this run; {advice}", file=str(path)))


class _Unpublished:
    """The file that is on its way to a name. What a crash left there may be a second name of the output: never reuse
    its bytes, only its name."""

    def __init__(self, files: Files, patience: Patience, paths: RunPaths) -> None:
        self._files = files
        self._path = paths.unpublished
        with writing(self._path):
            files.unlink(self._path)
            self._file = GrowingFile(files, self._path, patience, flags=os.O_CREAT | os.O_EXCL)

    def __enter__(self) -> GrowingFile:
        return self._file

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if kind is not None:
            with writing(self._path):
                self._files.unlink(self._path)
