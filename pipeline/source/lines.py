"""Decompressed bytes to numbered lines: the digest that identifies them, and one bounded pass over all of them.

A line ends with `\\n` and nothing else; a `\\r` before it, a byte order mark at the start of a file and a missing last
`\\n` are accepted. A line of ASCII white space alone is blank: it has a physical number but is no item. (`jsonlines`
cannot serve here: it has no offsets, holds a line of any length in memory, and stops where a line is damaged.)
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.errors import DataError, Problem
from pipeline.source.inputs import BYTE_ORDER_MARK, CHUNK_BYTES, InputFile, read_chunks

# A blank line and the line end before it; possessive, so that a run of white space is walked once.
_BLANK_LINE = re.compile(rb"\n[ \t\r\v\f]*+(?=\n)")


@dataclass(frozen=True, slots=True)
class InputDigest:
    """What identifies the content of all input files together, whatever their names and compression.

    `sha256` of one file is the SHA-256 of its decompressed bytes (`zcat FILE | sha256sum`); of several, the SHA-256 of
    their binary digests in order, so that bytes cannot move from one file to the next unnoticed. Empty files hold no
    item and do not count. `prefix_sha256` is the digest that the input had when it was `prefix_bytes` long: None if it
    is shorter now, or if its last line at that time has grown.
    """

    files: tuple[InputFile, ...]
    sha256: str
    num_bytes: int  # decompressed
    num_items: int  # non-blank lines
    prefix_sha256: str | None = None


@dataclass(slots=True)  # not frozen: one is made for every line, and freezing triples its cost
class RawLine:
    """One non-blank line; `data` is without its line end, None where it is longer than allowed."""

    index: int  # among the non-blank lines of all files, from 0
    file: str
    line: int  # physical line of the file, from 1
    offset: int  # of the first byte of `data` in the decompressed file
    data: bytes | None


class _ItemCounter:
    """Counts the non-blank lines of a file fed in chunks cut anywhere, at the speed of a few scans over the bytes."""

    def __init__(self) -> None:
        self.num_items = 0
        self.has_open_item = False  # the line that the next chunk goes on with is not blank so far

    def feed(self, chunk: bytes) -> None:
        first, last = chunk.find(b"\n"), chunk.rfind(b"\n")
        if first < 0:
            self.has_open_item = self.has_open_item or not _is_blank(chunk)
            return
        self.num_items += self.has_open_item or not _is_blank(chunk[:first])
        self.num_items += _count_lines_between(chunk, first, last)
        self.has_open_item = not _is_blank(chunk[last + 1 :])

    @property
    def total(self) -> int:
        """Lines so far; an open line counts, as it does at the end of a file."""
        return self.num_items + self.has_open_item


def _is_blank(data: bytes) -> bool:
    return not data or data.isspace()


def _count_lines_between(data: bytes, first: int, last: int) -> int:
    """Non-blank lines after the line end at `first` up to the one at `last`."""
    num_lines = data.count(b"\n", first, last)
    # Nearly always every line begins with a brace, and counting those is several times faster than a pattern.
    if data.count(b"\n{", first, last) == num_lines:
        return num_lines
    return num_lines - sum(1 for _ in _BLANK_LINE.finditer(data, first, last + 1))


class _FileDigest:
    """SHA-256 and number of items of one file, fed in chunks."""

    def __init__(self) -> None:
        self.hasher = hashlib.sha256()
        self.items = _ItemCounter()
        self.num_bytes = 0

    def feed(self, chunk: bytes) -> None:
        self.hasher.update(chunk)
        self.items.feed(chunk if self.num_bytes else chunk.removeprefix(BYTE_ORDER_MARK))
        self.num_bytes += len(chunk)


def digest_inputs(
    files: Sequence[InputFile],
    *,
    prefix_bytes: int | None = None,
    max_bytes: int | None = None,
    progress: Callable[[int], None] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> InputDigest:
    """Digest and count in one pass, in memory of a few chunks whatever the length of lines.

    `prefix_bytes` asks for the digest of that many first bytes too; `progress` is told of bytes read from disk.
    Raises DataError where a file is damaged, changes meanwhile, or all hold more than `max_bytes` decompressed bytes;
    NotFoundError where one can no longer be read.
    """
    digests: list[_FileDigest] = []
    num_bytes = 0
    prefix_sha256: str | None = None
    for file in files:
        digest = _FileDigest()
        digests.append(digest)
        for chunk in read_chunks(file, chunk_bytes, progress):
            cut = -1 if prefix_bytes is None else prefix_bytes - num_bytes
            if 0 <= cut < len(chunk) and chunk != BYTE_ORDER_MARK:
                digest.feed(chunk[:cut])
                if not digest.items.has_open_item or chunk[cut : cut + 1] in (b"\r", b"\n"):
                    prefix_sha256 = _join(digests)
                digest.feed(chunk[cut:])
            else:
                digest.feed(chunk)
            num_bytes += len(chunk)
            if max_bytes is not None and num_bytes > max_bytes:
                message = f"the input holds more than {max_bytes} bytes when decompressed, the limit of input.max_bytes"
                raise DataError(Problem(message, file=file.name))
    sha256 = _join(digests)
    if num_bytes == prefix_bytes:
        prefix_sha256 = sha256
    num_items = sum(digest.items.total for digest in digests)
    return InputDigest(tuple(files), sha256, num_bytes, num_items, prefix_sha256)


def _join(digests: Sequence[_FileDigest]) -> str:
    parts = [digest.hasher.digest() for digest in digests if digest.num_bytes]
    return parts[0].hex() if len(parts) == 1 else hashlib.sha256(b"".join(parts)).hexdigest()


def read_lines(
    files: Sequence[InputFile],
    *,
    max_line_bytes: int,
    start: int = 0,
    stop: int | None = None,
    next_wanted: Callable[[int], int | None] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Iterator[RawLine]:
    """Non-blank lines of all files with `start` <= index < `stop`, in memory of about two lines of the greatest length.

    `next_wanted(index)` says which item from `index` on is wanted next, None where there is no more; whatever lies
    between is passed over at the speed of a scan. Raises as `digest_inputs` does.
    """

    def advance(index: int) -> int | None:
        """The next item to yield, from `index` on."""
        wanted = index if next_wanted is None else next_wanted(index)
        return None if wanted is None or (stop is not None and wanted >= stop) else wanted

    index = 0
    wanted = advance(start)
    if wanted is None:
        return
    for file in files:
        name = file.name
        for block in _blocks(file, max_line_bytes, chunk_bytes):
            if wanted > index and index + (num_items := block.num_items()) <= wanted:
                index += num_items
                continue
            for line, offset, data in block.items():
                if index == wanted:
                    yield RawLine(index, name, line, offset, _content(data, max_line_bytes))
                    wanted = advance(index + 1)
                    if wanted is None:
                        return
                index += 1


class _Block(NamedTuple):
    """Some whole lines of a file, or (data None) one that is too long to be held."""

    line: int  # of the first
    offset: int
    data: bytes | None

    def num_items(self) -> int:
        if self.data is None:
            return 1
        counter = _ItemCounter()
        counter.feed(self.data)
        return counter.total

    def items(self) -> Iterator[tuple[int, int, bytes | None]]:
        """Line number, offset and bytes of the lines that are not blank."""
        if self.data is None:
            yield self.line, self.offset, None
            return
        offset = self.offset
        for line, data in enumerate(self.data.split(b"\n"), self.line):
            if data and not data.isspace():
                yield line, offset, data
            offset += len(data) + 1


def _content(data: bytes | None, max_line_bytes: int) -> bytes | None:
    if data is None:
        return None
    content = data[:-1] if data[-1] == 0x0D else data  # the carriage return of a CRLF
    return content if len(content) <= max_line_bytes else None


def _blocks(file: InputFile, max_line_bytes: int, chunk_bytes: int) -> Iterator[_Block]:
    line, offset = 1, 0
    open_line = _OpenLine(max_line_bytes)
    for chunk in read_chunks(file, chunk_bytes):
        if offset == 0 and open_line.num_bytes == 0 and chunk == BYTE_ORDER_MARK:
            offset = len(chunk)
            continue
        begin = 0
        if open_line.num_bytes:
            begin = chunk.find(b"\n") + 1
            open_line.add(chunk[:begin] if begin else chunk)
            if not begin:
                continue
            yield from open_line.blocks(line, offset)
            line, offset = line + 1, offset + open_line.num_bytes
            open_line = _OpenLine(max_line_bytes)
        end = chunk.rfind(b"\n", begin) + 1
        if end:
            yield _Block(line, offset, chunk[begin:end])
            line, offset = line + chunk.count(b"\n", begin, end), offset + end - begin
        if rest := chunk[max(begin, end) :]:
            open_line.add(rest)
    if open_line.num_bytes:
        yield from open_line.blocks(line, offset)


class _OpenLine:
    """A line whose end has not come yet; once it is too long, only whether it is blank is remembered."""

    def __init__(self, max_line_bytes: int) -> None:
        self.num_bytes = 0
        self._limit = max_line_bytes + len(b"\r\n")
        self._parts: list[bytes] = []
        self._is_blank = True

    def add(self, part: bytes) -> None:
        self.num_bytes += len(part)
        self._is_blank = self._is_blank and _is_blank(part)
        if self.num_bytes > self._limit:
            self._parts.clear()
        else:
            self._parts.append(part)

    def blocks(self, line: int, offset: int) -> Iterator[_Block]:
        if not self._is_blank:
            yield _Block(line, offset, None if self.num_bytes > self._limit else b"".join(self._parts))
