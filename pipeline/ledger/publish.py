"""The finished output and its summary appear whole, or not at all, and never in the place of a stranger's file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

from pipeline.compression import compressed
from pipeline.errors import OutputError, Problem
from pipeline.ledger.files import Files, GrowingFile, Patience, RunPaths, place_new, unpublished, writing
from pipeline.ledger.history import FileDigest, Published
from pipeline.output.forms import Form
from pipeline.output.native import NATIVE
from pipeline.records import Json

_WRITE_BYTES = 1 << 20

Summarize = Callable[[str], Mapping[str, Json]]
Lines = Callable[[], Iterable[bytes]]


def write_output(
    files: Files,
    patience: Patience,
    paths: RunPaths,
    lines: Lines,
    summarize: Summarize,
    *,
    summary_line: bool,
    form: Form = NATIVE,
) -> Published:
    """Write the answers in their form to a nameless file, synced and ready to be placed, and so what goes beside it.

    A name that ends with .gz, .bz2, .xz or .zst asks for that compression. `lines` gives the native lines each time it
    is called; `summarize` is given the hexadecimal SHA-256 of the answers as the form has them, uncompressed, and the
    summary's line is the last one if asked for and if the form has such a thing. The digests returned are those of the
    files. Raises WriteError.
    """
    companions: dict[str, FileDigest] = {}
    for suffix, content in form.companions.items():
        companions[suffix] = _write(files, patience, paths.companion(suffix), content(lines()))
    summary: Mapping[str, Json] | None = None

    def conclude(sha256: str) -> bytes:
        nonlocal summary
        summary = summarize(sha256)
        return summary_bytes(summary)

    content = _gathered(form.encode(lines(), conclude, summary_line=summary_line))
    output = _write(files, patience, paths.output, compressed(content, paths.output.name))
    assert summary is not None
    return Published(output.sha256, output.num_bytes, summary, companions)


def _write(files: Files, patience: Patience, target: Path, content: Iterable[bytes]) -> FileDigest:
    """Write the file that is to become `target`, synced."""
    with _Unpublished(files, patience, unpublished(target)) as file:
        digest = hashlib.sha256()
        for data in content:
            digest.update(data)
            file.append(data)
        file.sync()
        return FileDigest(digest.hexdigest(), file.size)


def _gathered(content: Iterable[bytes]) -> Iterator[bytes]:
    """The same in pieces of about a mebibyte."""
    waiting: list[bytes] = []
    waiting_bytes = 0
    for data in content:
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


def place_companions(files: Files, paths: RunPaths, published: Published) -> None:
    """Give the files that `write_output` wrote beside the output their names; the caller syncs the directory.

    Raises WriteError.
    """
    for suffix in published.companions:
        target = paths.companion(suffix)
        with writing(target):
            files.rename(unpublished(target), target)


def companions_in_place(paths: RunPaths, published: Published) -> bool:
    """Whether all that goes beside the output is there; the size is taken for the content."""
    return all(
        (path := paths.companion(suffix)).is_file() and path.stat().st_size == digest.num_bytes
        for suffix, digest in published.companions.items()
    )


def place_journal(files: Files, patience: Patience, paths: RunPaths, line: bytes) -> None:
    """Begin a journal with its first line: it is never seen without, and never takes the place of another file.

    It also shows, before anything is spent on answers, that this file system can publish. Raises OSError, WriteError.
    """
    with _Unpublished(files, patience, paths.unpublished) as file:
        file.append(line)
        file.sync()
    place_new(files, paths.unpublished, paths.journal)


def write_summary(files: Files, patience: Patience, paths: RunPaths, summary: Mapping[str, Json]) -> None:
    """Raises WriteError."""
    # By the output's own temporary name, which a process that died while it placed the output may have left.
    replace_file(files, patience, paths.summary, summary_bytes(summary), by=paths.unpublished)


def replace_file(files: Files, patience: Patience, target: Path, data: bytes, *, by: Path | None = None) -> None:
    """Make `target` hold `data`, whole or not at all, `by` way of a temporary file beside it. Raises WriteError."""
    by = by or unpublished(target)
    with _Unpublished(files, patience, by) as file:
        file.append(data)
        file.sync()
    with writing(target):
        files.rename(by, target)
        files.sync_directory(target.parent)


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

    def __init__(self, files: Files, patience: Patience, path: Path) -> None:
        self._files = files
        self._path = path
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
