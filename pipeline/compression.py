"""Which compression a file name asks for: reading streams of it in bounded memory, and writing them.

gzip, bz2 and lzma are Python's own; Zstandard is Python's own from 3.14 on and `backports.zstd` (extra `zstd`), the
same code, before it.
"""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import lzma
import zlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import IO, TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_READ_BYTES = 1 << 18
_XZ_MEMORY_BYTES = 512 << 20  # `xz -9` needs 65 MiB; a header may ask for 4 GiB
_KINDS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "Zstandard"}
_ZSTD_MODULES = ("compression.zstd", "backports.zstd")


class DamagedStreamError(Exception):
    """What was read is no whole stream of its compression; the text says why."""


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Compressor(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


def compression_of(name: str) -> str | None:
    """The suffix of a compressed file's name, in small letters; None of any other."""
    suffix = PurePath(name).suffix.lower()
    return suffix if suffix in _KINDS else None


def missing_library(name: str) -> str | None:
    """What to install before a file of this name can be read or written; None where nothing lacks."""
    return "Zstandard needs `pip install 'overnight[zstd]'`" if name.lower().endswith(".zst") and not _zstd() else None


@contextmanager
def decompressing(raw: IO[bytes], name: str) -> Generator[IO[bytes]]:
    """The content of the open file, decompressed as its name says; several streams in a row are read as one.

    Reading it raises DamagedStreamError, and OSError as `raw` does.
    """
    suffix = compression_of(name)
    if suffix is None:
        yield raw
    elif suffix == ".gz":
        try:
            yield cast("IO[bytes]", gzip.GzipFile(fileobj=raw))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _damaged(suffix, error) from None
    else:
        yield cast("IO[bytes]", io.BufferedReader(_Decompressed(raw, suffix), _READ_BYTES))


def compressed(pieces: Iterable[bytes], name: str) -> Iterator[bytes]:
    """The bytes of a file of this name that holds `pieces`; the same pieces give the same bytes."""
    suffix = compression_of(name)
    if suffix is None:
        yield from pieces
        return
    compressor = _compressor(suffix)
    for piece in pieces:
        if data := compressor.compress(piece):
            yield data
    yield compressor.flush()


class _Decompressed(io.RawIOBase):
    """Streams one after the other, in the memory of one piece.

    Python's own `bz2.open` and its like take what follows the first stream for garbage and drop it, and `lzma.open`
    has no limit to what a header may ask for.
    """

    def __init__(self, raw: IO[bytes], suffix: str) -> None:
        self._raw = raw
        self._suffix = suffix
        self._stream = _decompressor(suffix)
        self._waiting = b""  # read from disk, not yet taken by the stream
        self._has_begun = False  # this stream has had input

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer).cast("B")
        data = self._next(len(view))
        view[: len(data)] = data
        return len(data)

    def _next(self, size: int) -> bytes:
        """At least one byte, or none at the end."""
        while True:
            if self._stream.eof:
                self._waiting = self._stream.unused_data
                self._stream = _decompressor(self._suffix)
                self._has_begun = False
            if not self._has_begun:
                self._waiting = self._after_padding()
                if not self._waiting:
                    return b""
                self._has_begun = True
            elif self._stream.needs_input:
                self._waiting = self._raw.read(_READ_BYTES)
                if not self._waiting:
                    raise _damaged(self._suffix, "the file ends before the stream does")
            taken, self._waiting = self._waiting, b""
            try:
                data = self._stream.decompress(taken, size)
            except MemoryError:  # says nothing of the file
                raise
            except Exception as error:  # noqa: BLE001  each library raises its own
                raise _damaged(self._suffix, error) from None
            if data:
                return data

    def _after_padding(self) -> bytes:
        """What comes next from disk; some writers fill up with zeros behind a stream, which no stream begins with."""
        waiting = self._waiting
        while not (waiting := waiting.lstrip(b"\0")):
            waiting = self._raw.read(_READ_BYTES)
            if not waiting:
                break
        return waiting


def _damaged(suffix: str, reason: object) -> DamagedStreamError:
    return DamagedStreamError(f"is cut short, damaged, or no {_KINDS[suffix]} data at all: {reason}")


def _zstd() -> Any:
    for module in _ZSTD_MODULES:
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError:
            continue
    return None


def _decompressor(suffix: str) -> _Decompressor:
    match suffix:
        case ".bz2":
            return bz2.BZ2Decompressor()
        case ".xz":
            return lzma.LZMADecompressor(memlimit=_XZ_MEMORY_BYTES)
        case _:
            return _zstd().ZstdDecompressor()  # refuses windows of more than 128 MiB


def _compressor(suffix: str) -> _Compressor:
    match suffix:
        case ".gz":
            return zlib.compressobj(wbits=31)  # with no time and no name in its header
        case ".bz2":
            return bz2.BZ2Compressor()
        case ".xz":
            return lzma.LZMACompressor()
        case _:
            return _zstd().ZstdCompressor()
