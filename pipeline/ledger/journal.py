"""The journal's lines: one record each, with a CRC, and the rule that tells a torn tail from damage.

A line is `CRC SYNCED JSON\\n`: the CRC-32 of the rest as eight hexadecimal digits; the number of journal bytes that
were known to be on the disk when the line was written; the record, an object of ASCII JSON with a `kind`. The first
record may have an `id`: the CRCs of all other lines begin with its value, not with 0, so that they are right in this
journal alone. Where a file system gives a file its blocks before its data (ext4 with data=writeback, FAT), a power cut
may leave a removed file's old content in them, and that may be the lines of an earlier journal.

A crash may leave any part of what was not yet synced, in any order: the last line torn, or NULs for a line and the one
after it whole. So a bad line ends the journal, and all from there on is cut, unless a whole line after it tells that
the bad one had been synced: then the file was damaged later, and nothing may be cut from it.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import DataError, OvernightError, Problem, WriteError
from pipeline.ledger.files import GrowingFile

Record = dict[str, Any]

_CRC_CHARS = 8
_TAIL_BYTES = 1 << 16
_WRONG_FILE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP})


def new_id() -> str:
    """For a journal's first record: 32 random bits, hexadecimal."""
    return secrets.token_hex(4)


def encode_line(record: Mapping[str, Any], synced: int, start: int = 0) -> bytes:
    """One line of the journal, whose CRC begins with `start`. Raises ValueError for what JSON cannot say (NaN,
    infinity)."""
    text = json.dumps(record, separators=(",", ":"), allow_nan=False)
    body = f"{synced} {text}".encode("ascii")
    return b"%08x %s\n" % (zlib.crc32(body, start), body)


def decode_line(line: bytes, start: int = 0) -> tuple[Record, int] | None:
    """The record and the SYNCED of a line with its line end; None where it is not whole."""
    parts = _split(line, start)
    try:
        return None if parts is None else (json.loads(parts[0]), parts[1])
    except ValueError:
        return None


def start_of_crcs(first: bytes) -> int:
    """What the CRCs begin with of all lines that follow this first one; 0 where that is not whole or has no id."""
    decoded = decode_line(first)
    return 0 if decoded is None else int(decoded[0].get("id", "0"), 16)


def _split(line: bytes, start: int) -> tuple[bytes, int] | None:
    """JSON and SYNCED of a line with its line end; None where it is not whole."""
    body = line[_CRC_CHARS + 1 : -1]
    if line != b"%08x %s\n" % (zlib.crc32(body, start), body):
        return None
    synced, _, text = body.partition(b" ")
    return (text, int(synced)) if synced.isdigit() else None


class JournalLine(NamedTuple):
    """One line of the file, from `offset` to `end`; `text`, the record as JSON, is None where it is not whole."""

    offset: int
    end: int
    text: bytes | None
    synced: int

    @property
    def record(self) -> Record:
        """Of a whole line. Raises ValueError for what is no JSON."""
        return json.loads(self.text or b"")


def scan_journal(path: Path) -> Iterator[JournalLine]:
    """Every line of the file, whole or not. Raises OSError."""
    with path.open("rb") as file:
        end = start = 0
        for line in file:
            offset, end = end, end + len(line)
            text, synced = _split(line, start) or (None, 0)
            yield JournalLine(offset, end, text, synced)
            if not offset:
                start = start_of_crcs(line)


def read_journal(path: Path) -> Iterator[tuple[Record, int]]:
    """The records of the longest whole beginning of the file, each with the offset at which its line ends.

    Raises DataError at the end of that beginning where what follows is no torn tail but damage; ValueError, OSError.
    """
    for line in whole_lines(path):
        yield line.record, line.end


def whole_lines(path: Path) -> Iterator[JournalLine]:
    """The lines that `read_journal` reads, before anybody reads them. Raises DataError as it does, OSError."""
    end = 0
    is_whole = True
    for line in scan_journal(path):
        is_whole = is_whole and line.text is not None
        if line.synced > end:
            what = "lines are missing before" if is_whole else "a line is damaged, and lines after it are not, at"
            raise damaged(path, f"{what} byte {end}")
        if is_whole:
            end = line.end
            yield line


def read_first_and_last(path: Path) -> tuple[Record, Record]:
    """The records of the first and the last line. Raises ValueError where one is not whole; OSError."""
    with path.open("rb") as file:
        first_line = file.readline()
        first = decode_line(first_line)
        tail, size = b"", file.seek(0, os.SEEK_END)
        # The last line, from the line end before it.
        while tail.count(b"\n") < 2 and len(tail) < size:
            file.seek(max(0, size - 2 * len(tail) - _TAIL_BYTES))
            tail = file.read()
        last_line = tail[tail.rfind(b"\n", 0, -1) + 1 :]
        last = first if size == len(first_line) else decode_line(last_line, start_of_crcs(first_line))
    if first is None or last is None:
        raise ValueError("a line is not whole")
    return first[0], last[0]


def damaged(path: Path, what: str) -> DataError:
    """The refusal of a file of the run that no crash of ours can have left so."""
    advice = "restore the file, or start the run anew with --fresh, which moves its files aside"
    return DataError(Problem(f"{what}; {advice}", file=str(path)))


def unreadable(path: Path, error: OSError) -> OvernightError:
    """The refusal of a file of the run that cannot be read: not there, not ours, or not now."""
    if error.errno in _WRONG_FILE:
        return damaged(path, f"cannot be read: {error.strerror}")
    message = f"cannot be read now: {error.strerror}; nothing is lost, and the same command goes on once it can"
    return WriteError(Problem(message, str(path)))


class Journal:
    """Appends records; what is appended is on the disk after the next `sync`."""

    def __init__(self, file: GrowingFile) -> None:
        """Raises OSError where the first line cannot be read."""
        self.file = file
        with file.path.open("rb") as there:
            self._start = start_of_crcs(there.readline())

    def append(self, record: Mapping[str, Any]) -> None:
        """Raises WriteError."""
        self.file.append(encode_line(record, self.file.synced, self._start))

    def sync(self) -> None:
        """Raises WriteError."""
        self.file.sync()


def write_runs(numbers: Iterable[int]) -> str:
    """Numbers in their order as text, consecutive ones drawn together: 4 5 6 9 2 → `4-6 9 2`."""
    runs: list[str] = []
    first = last = -2
    for number in numbers:
        if number == last + 1:
            last = number
            continue
        if last >= 0:
            runs.append(str(first) if first == last else f"{first}-{last}")
        first = last = number
    if last >= 0:
        runs.append(str(first) if first == last else f"{first}-{last}")
    return " ".join(runs)


def read_runs(text: str) -> list[int]:
    """The inverse of `write_runs`. Raises ValueError."""
    numbers: list[int] = []
    for run in text.split():
        if "-" in run:
            first, _, last = run.partition("-")
            numbers.extend(range(int(first), int(last) + 1))
        else:
            numbers.append(int(run))
    return numbers
