"""Reads tensors of weight files straight to their place: several threads, large reads, no copy of the whole."""
# pyright: basic

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from pipeline.errors import NotFoundError, Problem
from pipeline.facts.checkpoint import Checkpoint
from pipeline.kernels.packed import BLOCK, PackedWeight, place

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_READ_BYTES = 1 << 25  # of one read: large enough for any disk, small enough to stay in the cache while it is placed
_GAP_BYTES = 1 << 20  # read over rather than seek
_LARGE_PAGE_BYTES = 1 << 21
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

    def new(self) -> PackedWeight:
        """Room for it, in large pages where the system has them."""
        import torch

        blocks = (*self.stack, self.num_outputs // BLOCK)
        return PackedWeight(
            _empty((*blocks, self.code_rows, BLOCK), torch.int32),
            _empty((*blocks, self.num_groups, BLOCK), torch.float16),
            self.bits,
        )


class Matrix(NamedTuple):
    """A matrix of a packed layer; the last four as in `pipeline.kernels.packed.place`."""

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


Wanted: TypeAlias = "Matrix | Plain"
_Read: TypeAlias = "tuple[int, int, list[Wanted]]"  # first and last byte of the file, and what lies there


def stored_tensors(checkpoint: Checkpoint) -> dict[str, Stored]:
    """Every tensor of a checkpoint by name. Data lies without gaps behind its header (`read_shard` sees to it)."""
    found: dict[str, Stored] = {}
    for shard in checkpoint.shards:
        ends = accumulate((tensor.num_bytes for tensor in shard.tensors.values()), initial=8 + len(shard.header))
        for (name, tensor), offset in zip(shard.tensors.items(), ends, strict=False):
            found[name] = Stored(shard.path, offset, tensor.num_bytes, tensor.dtype, tensor.shape)
    return found


def read_tensors(wanted: Iterable[Wanted], progress: Callable[[int], object]) -> None:
    """Read all of these to their place; `progress` takes the bytes of each read, from any thread.

    Raises NotFoundError for a file that has changed or cannot be read, and for a layer whose zero points are not those
    of a symmetric one.
    """
    by_file: dict[Path, list[Wanted]] = {}
    for one in wanted:
        by_file.setdefault(one.stored.file, []).append(one)
    local = threading.local()

    def run(file: Path, read: _Read) -> None:
        staging = getattr(local, "staging", None)
        local.staging = _read(file, read, staging)
        progress(read[1] - read[0])

    with ThreadPoolExecutor(NUM_READERS) as pool:
        tasks = [pool.submit(run, file, read) for file, found in by_file.items() for read in _reads(found)]
        try:
            for task in tasks:
                task.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _reads(wanted: list[Wanted]) -> Iterator[_Read]:
    """Neighbours together, in the order of the file."""
    together: list[Wanted] = []
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


def _pieces(wanted: Iterable[Wanted]) -> Iterator[Wanted]:
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


def _read(file: Path, read: _Read, staging: Tensor | None) -> Tensor:
    """Do one read; gives the memory that it went through, for the next."""
    import torch

    first, last, wanted = read
    if staging is None or staging.numel() < last - first:
        staging = torch.empty(max(last - first, _READ_BYTES), dtype=torch.uint8)
    view: Any = staging.numpy()
    at = 0
    try:
        with file.open("rb", buffering=0) as source:
            while at < last - first:
                got = os.preadv(source.fileno(), [view[at : last - first]], first + at)
                if not got:
                    raise NotFoundError(Problem("is cut short; download it again", str(file), field="model.path"))
                at += got
    except OSError as error:
        message = f"cannot be read: {error.strerror}"
        raise NotFoundError(Problem(message, str(file), field="model.path")) from None
    _place_matrices([one for one in wanted if isinstance(one, Matrix)], first, staging)
    for one in wanted:
        if isinstance(one, Plain):
            begin = one.stored.offset - first
            values = staging[begin : begin + one.stored.num_bytes].clone().view(_dtypes()[one.stored.dtype])
            one.target.copy_(values.view(one.target.shape))
    return staging


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
    memory = mmap.mmap(-1, num_bytes + _LARGE_PAGE_BYTES)
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
