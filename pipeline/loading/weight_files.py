"""Reads tensors of weight files straight to their place: several threads, large reads, no copy of the whole."""
# pyright: basic

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeAlias

from pipeline.errors import NotFoundError, Problem
from pipeline.facts.checkpoint import Checkpoint, Shard
from pipeline.kernels.packed import BLOCK, PackedWeight
from pipeline.kernels.place import place

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_READ_BYTES = 1 << 23  # of one read: large enough for any disk, small enough to stay in the cache while it is placed
_GAP_BYTES = 1 << 20  # read over rather than seek
_LARGE_PAGE_BYTES = 1 << 21
_ALIGNMENT = 1 << 12  # of what is read past the page cache: the largest block that disks ask for
NUM_READERS = 4  # a disk wants several requests at once, and placing takes about as long as reading from memory


class Stored(NamedTuple):
    """A tensor as it lies in its file."""

    file: Path
    offset: int
    num_bytes: int
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]


class WeightShape(NamedTuple):
    """A packed layer, or a stack of them, before it has memory."""

    stack: tuple[int, ...]
    num_outputs: int
    code_rows: int
    num_groups: int
    bits: int

    @classmethod
    def of(cls, codes: tuple[int, ...], scales: tuple[int, ...], bits: int) -> Self:
        """That of tensors of these shapes."""
        return cls(tuple(codes[:-3]), codes[-3] * BLOCK, codes[-2], scales[-2], bits)

    @property
    def codes_shape(self) -> tuple[int, ...]:
        return (*self.stack, self.num_outputs // BLOCK, self.code_rows, BLOCK)

    @property
    def scales_shape(self) -> tuple[int, ...]:
        return (*self.stack, self.num_outputs // BLOCK, self.num_groups, BLOCK)

    def new(self) -> PackedWeight:
        """Room for it, in large pages where the system has them."""
        import torch

        return PackedWeight(_empty(self.codes_shape, torch.int32), _empty(self.scales_shape, torch.float16), self.bits)


class Matrix(NamedTuple):
    """A matrix of a packed layer; the last four as in `pipeline.kernels.place.place`."""

    name: str
    stored: Stored
    target: int
    rows: int
    columns: int
    size: int


class Plain(NamedTuple):
    """An unquantized tensor and the one of as many values that it is copied into, converted if need be."""

    name: str
    stored: Stored
    target: Tensor


class Straight(NamedTuple):
    """A tensor whose bytes lie in the file as they do in memory: it is read to its place."""

    stored: Stored
    target: Tensor


Wanted: TypeAlias = "Matrix | Plain | Straight"
_Staged: TypeAlias = "Matrix | Plain"
_Read: TypeAlias = "tuple[int, int, list[_Staged]]"  # first and last byte of the file, and what lies there


def stored_tensors(checkpoint: Checkpoint) -> dict[str, Stored]:
    """Every tensor of a checkpoint by name. Data lies without gaps behind its header (`read_shard` sees to it)."""
    return {name: stored for shard in checkpoint.shards for name, stored in stored_in(shard).items()}


def stored_in(shard: Shard) -> dict[str, Stored]:
    """The same of one file."""
    ends = accumulate((tensor.num_bytes for tensor in shard.tensors.values()), initial=8 + len(shard.header))
    return {
        name: Stored(shard.path, offset, tensor.num_bytes, tensor.dtype, tensor.shape)
        for (name, tensor), offset in zip(shard.tensors.items(), ends, strict=False)
    }


def read_tensors(wanted: Iterable[Wanted], progress: Callable[[int], object]) -> None:
    """Read all of these to their place, once; as `Reader.read`."""
    with Reader() as reader:
        reader.read(wanted, progress)


class Reader:
    """Threads that read weight files, and the memory that reads pass through.

    `past_cache` for what is read again and again and is more than memory holds: the system's page cache would throw
    out everything else for it, and itself before it is asked for again.
    """

    def __init__(self, *, past_cache: bool = False) -> None:
        self._past_cache = past_cache
        self._pool = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="reader")
        self._local = threading.local()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def read(self, wanted: Iterable[Wanted], progress: Callable[[int], object]) -> None:
        """Read all of these to their place; `progress` takes the bytes of each read, from any thread.

        Raises NotFoundError for a file that has changed or cannot be read, and for a layer whose zero points are not
        those of a symmetric one; then nothing writes any more.
        """
        by_file: dict[Path, list[_Staged]] = {}
        straight: list[Straight] = []
        for one in wanted:
            if isinstance(one, Straight):
                straight += _cut(one)
            else:
                by_file.setdefault(one.stored.file, []).append(one)

        def run(file: Path, read: _Read) -> None:
            self._read(file, read)
            progress(read[1] - read[0])

        def run_straight(one: Straight) -> None:
            self._read_straight(one)
            progress(one.stored.num_bytes)

        tasks = [self._pool.submit(run, file, read) for file, found in by_file.items() for read in _reads(found)]
        tasks += [self._pool.submit(run_straight, one) for one in straight]
        try:
            for task in tasks:
                task.result()
        except BaseException:
            for task in tasks:
                task.cancel()
            wait(tasks)
            raise

    def _read(self, file: Path, read: _Read) -> None:
        first, last, wanted = read
        begin = first - first % _ALIGNMENT
        end = last + -last % _ALIGNMENT
        staging = getattr(self._local, "staging", None)
        if staging is None or staging.numel() < end - begin:
            staging = self._local.staging = _empty((max(end - begin, _READ_BYTES + 2 * _ALIGNMENT),), _dtypes()["U8"])
        _fill(staging.numpy()[: end - begin], file, begin, last - begin, past_cache=self._past_cache)
        _place_matrices([one for one in wanted if isinstance(one, Matrix)], begin, staging)
        for one in wanted:
            if isinstance(one, Plain):
                at = one.stored.offset - begin
                values = staging[at : at + one.stored.num_bytes].clone().view(_dtypes()[one.stored.dtype])
                one.target.copy_(values.view(one.target.shape))

    def _read_straight(self, one: Straight) -> None:
        file, offset, num_bytes, *_ = one.stored
        aligned = not any(number % _ALIGNMENT for number in (offset, num_bytes, one.target.data_ptr()))
        _fill(one.target.numpy(), file, offset, num_bytes, past_cache=self._past_cache and aligned)


def _cut(whole: Straight) -> Iterator[Straight]:
    """The same in pieces for several threads."""
    import torch

    target, stored = whole.target.view(-1).view(torch.uint8), whole.stored
    for at in range(0, stored.num_bytes, _READ_BYTES):
        size = min(_READ_BYTES, stored.num_bytes - at)
        yield Straight(stored._replace(offset=stored.offset + at, num_bytes=size), target[at : at + size])


def _fill(view: Any, file: Path, begin: int, num_bytes: int, *, past_cache: bool) -> None:
    """Read at least `num_bytes` into `view`, which may be longer by what an aligned read takes more. NotFoundError."""
    try:
        with _opened(file, past_cache=past_cache) as descriptor:
            at = 0
            while at < num_bytes:
                # What a direct read left unaligned is the end of the file.
                got = os.preadv(descriptor, [view[at:]], begin + at) if at % _ALIGNMENT == 0 or not past_cache else 0
                if not got:
                    raise NotFoundError(Problem("is cut short; download it again", str(file), field="model.path"))
                at += got
    except OSError as error:
        message = f"cannot be read: {error.strerror}"
        raise NotFoundError(Problem(message, str(file), field="model.path")) from None


@contextlib.contextmanager
def _opened(file: Path, *, past_cache: bool) -> Iterator[int]:
    try:
        descriptor = os.open(file, os.O_RDONLY | (getattr(os, "O_DIRECT", 0) if past_cache else 0))
    except OSError as error:
        if not past_cache or error.errno != errno.EINVAL:
            raise
        descriptor = os.open(file, os.O_RDONLY)  # a file system that has no way past its cache
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _reads(wanted: list[_Staged]) -> Iterator[_Read]:
    """Neighbours together, in the order of the file."""
    together: list[_Staged] = []
    first = last = 0
    for one in sorted(_pieces(wanted), key=lambda one: one.stored.offset):
        begin, end = one.stored.offset, one.stored.offset + one.stored.num_bytes
        if together and (begin - last > _GAP_BYTES or end - first > _READ_BYTES):
            yield first, last, together
            together = []
        if not together:
            first = begin
        together.append(one)
        last = end
    if together:
        yield first, last, together


def _pieces(wanted: Iterable[_Staged]) -> Iterator[_Staged]:
    """The same with large unquantized tensors cut up."""
    for one in wanted:
        if isinstance(one, Matrix) or one.stored.num_bytes <= _READ_BYTES:
            yield one
            continue
        flat, stored = one.target.view(-1), one.stored
        value_bytes = stored.num_bytes // flat.numel()
        for at in range(0, stored.num_bytes, _READ_BYTES):
            size = min(_READ_BYTES, stored.num_bytes - at)
            target = flat[at // value_bytes : (at + size) // value_bytes]
            yield Plain(one.name, stored._replace(offset=stored.offset + at, num_bytes=size), target)


def _place_matrices(matrices: Sequence[Matrix], first: int, staging: Tensor) -> None:
    import torch

    if not matrices:
        return
    columns = [[one.stored.offset - first for one in matrices]]
    columns += [[getattr(one, name) for one in matrices] for name in ("target", "rows", "columns", "size")]
    fault = place(staging, *(torch.tensor(column, dtype=torch.int64) for column in columns))
    if fault is not None:
        one = matrices[fault]
        message = f"{one.name} says that the layer is not symmetric, and the configuration says that it is"
        raise NotFoundError(Problem(message, str(one.stored.file), field="model.path"))


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory whose pages are large where the system has such: a tenth faster to read, and given back when unused."""
    import mmap

    import torch

    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    if num_bytes < _LARGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, num_bytes + _LARGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    first = -whole.data_ptr() % _LARGE_PAGE_BYTES
    return whole[first : first + num_bytes].view(dtype).view(shape)


def _dtypes() -> dict[str, torch.dtype]:
    import torch

    return {
        **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
        **{"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool},
    }
