"""Reading the partial file: its committed groups, checked against the journal, and its lines in input order."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from pipeline.ledger.journal import Record, damaged, read_journal, read_runs, unreadable

_RUN_BYTES = 1 << 20  # lines that lie in order are read this many at a time


@dataclass(frozen=True, slots=True)
class Group:
    """Lines committed together: `data` begins at `start` of the partial file and holds one line for each number."""

    start: int
    data: bytes
    numbers: list[int]
    failed: list[int]  # those of `numbers` that are answered with an error


def read_groups(journal: Path, partial: Path) -> Iterator[Group]:
    """Every committed group in the order of the journal, checked to be what was written; one is in memory at a time.

    Raises DataError where the file is too short or a group has changed.
    """
    with open_to_read(partial) as descriptor:
        for record, _ in read_journal(journal):
            if record["kind"] == "commit":
                yield read_group(descriptor, journal, partial, record)


def read_group(descriptor: int, journal: Path, partial: Path, record: Record) -> Group:
    """The group that a commit's record names, from the open partial file. Raises DataError as `read_groups` does."""
    start, end, numbers = record["start"], record["end"], read_runs(record["numbers"])
    data = read_exactly(descriptor, end - start, start)
    if len(data) < end - start:
        raise damaged(partial, f"ends at byte {start + len(data)}, and {end} bytes of it were committed")
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise damaged(partial, f"bytes {start} to {end} are not those that were committed")
    if data.count(b"\n") != len(numbers):
        raise damaged(journal, f"names another number of answers than lie in bytes {start} to {end} of {partial}")
    return Group(start, data, numbers, read_runs(record["failed"]))


class LineIndex:
    """Where the line of each number lies in the partial file; twelve bytes of memory a line."""

    def __init__(self, partial: Path, numbers: range, groups: Iterable[Group]) -> None:
        """Of a number that comes twice the later line counts. Raises what reading `groups` raises."""
        self._partial = partial
        self._first = numbers.start
        self._offsets = array("Q", (0,)) * len(numbers)
        self._lengths = array("I", (0,)) * len(numbers)
        for group in groups:
            self._add(group)

    def _add(self, group: Group) -> None:
        lengths = array("I", [len(line) + 1 for line in group.data.split(b"\n")])
        offsets = array("Q", accumulate(lengths, initial=group.start))
        for number, offset, length in zip(group.numbers, offsets, lengths, strict=False):  # offsets end with the end
            self._offsets[number - self._first] = offset
            self._lengths[number - self._first] = length

    def read_in_order(self) -> Iterator[bytes]:
        """The lines of all numbers in ascending order, many at a time where they lie side by side."""
        with open_to_read(self._partial) as descriptor:
            for start, end in self._stretches():
                yield read_exactly(descriptor, end - start, start)

    def _stretches(self) -> Iterator[tuple[int, int]]:
        """Beginning and end in the partial file of what may be read at once."""
        start = end = 0
        for offset, length in zip(self._offsets, self._lengths, strict=True):
            if offset != end or end - start >= _RUN_BYTES:
                if end > start:
                    yield start, end
                start = end = offset
            end += length
        if end > start:
            yield start, end


@contextmanager
def open_to_read(path: Path) -> Generator[int]:
    """A descriptor of the file; whatever the system refuses in this block is a DataError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        yield descriptor
    except OSError as error:
        raise unreadable(path, error) from error
    finally:
        os.close(descriptor)


def read_exactly(descriptor: int, num_bytes: int, offset: int) -> bytes:
    """`num_bytes` from `offset`; fewer only where the file ends."""
    data = os.pread(descriptor, num_bytes, offset)
    if len(data) == num_bytes:
        return data
    parts = [data]
    while data and (num_bytes := num_bytes - len(data)):
        offset += len(data)
        data = os.pread(descriptor, num_bytes, offset)
        parts.append(data)
    return b"".join(parts)
