"""Short measurements for the doctor: how fast memory is read, how fast a file comes from its disk, what is cached."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_MEMORY_BYTES = 256 << 20  # several times a large cache, and written in a fraction of a second
_MEMORY_PASSES = 4
_BLOCK_BYTES = 8 << 20  # what the loader asks for at once
_NUM_READERS = 4
_READ_S = 0.8


def memory_speed(num_threads: int) -> float:
    """Bytes a second that so many threads read together from memory: the best of a few passes over 256 MiB."""
    import numpy

    share = _MEMORY_BYTES // 8 // num_threads
    arrays = [numpy.ones(share, dtype=numpy.int64) for _ in range(num_threads)]

    def read(index: int) -> None:
        numpy.bitwise_or.reduce(arrays[index])  # releases the GIL, and does less than the memory lets it

    seconds = min(_in_threads(read, num_threads) for _ in range(_MEMORY_PASSES))
    return 8 * share * num_threads / seconds


def read_speed(files: Sequence[Path]) -> float | None:
    """Bytes a second at which the largest of the files comes from its disk, past the page cache.

    Read for under a second in large blocks by several threads, as a loader does; nothing is put into the cache or
    driven out of it. None where the file system has no such reads (tmpfs) or there is nothing to read.
    """
    if not hasattr(os, "O_DIRECT") or not files:
        return None
    file = max(files, key=lambda path: path.stat().st_size)
    num_blocks = file.stat().st_size // _BLOCK_BYTES
    if not num_blocks:
        return None
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None
    done = [0] * _NUM_READERS
    until = time.perf_counter() + _READ_S

    def read(reader: int) -> None:
        with mmap.mmap(-1, _BLOCK_BYTES) as buffer:  # aligned, as such reads need
            for block in range(reader, num_blocks, _NUM_READERS):
                try:
                    done[reader] += os.preadv(descriptor, [buffer], block * _BLOCK_BYTES)
                except OSError:
                    return
                if time.perf_counter() > until:
                    return

    try:
        seconds = _in_threads(read, _NUM_READERS)
    finally:
        os.close(descriptor)
    return sum(done) / seconds if sum(done) else None


def cached_share(files: Sequence[Path]) -> float | None:
    """The part of the files' pages that is in the page cache; None where the system cannot be asked.

    mincore(2) on a mapping: unlike a read that does not wait, it makes the kernel read nothing ahead. It tells who may
    write the file alone; to others all pages seem to be there.
    """
    try:
        mincore = ctypes.CDLL(None, use_errno=True).mincore
    except (OSError, AttributeError):
        return None
    num_pages = num_cached = 0
    for path in files:
        size = path.stat().st_size
        pages = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
            first = ctypes.c_char.from_buffer(mapped)  # ctypes needs a writable view to tell the address
            failed = mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), pages)
            del first
        if failed:
            return None
        num_pages += len(pages)
        num_cached += pages.raw.count(b"\x01")
    return num_cached / num_pages if num_pages else None


def _in_threads(work: Callable[[int], None], num_threads: int) -> float:
    """Seconds until all have done their work."""
    threads = [threading.Thread(target=work, args=(index,)) for index in range(num_threads)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began
