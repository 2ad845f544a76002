"""Weights kept on disk as the kernels want them in memory: the next load maps the file, and reads and copies nothing.

It is a safetensors file of what a CPU holds of a packed model: codes and scales in blocks, all else in the type of the
computation. Experts come first, layer by layer, from an offset at which large pages begin, so that a layer that is
streamed is one straight read. The pages are those of the page cache: processes share them, the next start finds them
there, and where memory runs short the system takes them back and ends no process.
"""
# pyright: basic

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.errors import NotFoundError, Problem
from pipeline.facts.checkpoint import DamagedError, read_shard
from pipeline.kernels.packed import LAYOUT, PackedWeight
from pipeline.kernels.plain import PlainWeight
from pipeline.loading.prepared import MANIFEST, Progress, prepared
from pipeline.loading.weight_files import NUM_READERS, Straight, WeightShape, stored_in
from pipeline.loading.weight_source import Layer, LayerWeights

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_WEIGHTS = "weights.safetensors"
_NOTES = "weights.json"  # what the format has no place for
_EXPERTS = ("gate_up_codes", "gate_up_scales", "down_codes", "down_scales")
_LINEAR = ("codes", "scales")
_BLOCKS = "blocks"  # of a layer that is not packed
_LARGE_PAGE_BYTES = 1 << 21
_PIECE_BYTES = 1 << 25  # of one write, and of what is brought into memory at once
_SYNC_BYTES = 1 << 28  # so much at most waits to be written to the disk
_START_BYTES = 4096  # of each tensor, of which a checksum is kept
_POPULATE_READ = 22  # MADV_POPULATE_READ: Linux 5.14
_SPELLINGS = {"int32": "I32", "float16": "F16", "bfloat16": "BF16", "float32": "F32"}


class _Kept(NamedTuple):
    """A tensor of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        import torch

        return torch.Size(self.shape).numel() * self.dtype.itemsize


def keep_repacked(entry: Path, model: Any, progress: Progress) -> None:
    """Write the weights of a packed model that computes on a CPU to the directory `entry`, whole or not at all.

    Of two processes one writes and the other waits for it. Entries beside it in another layout are removed. Raises
    OutputError, MachineError and WriteError as `prepared` does, and whatever `progress` raises to break off.
    """
    for manifest in entry.parent.glob(f"*/{MANIFEST}"):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            if json.loads(manifest.read_bytes())["layout"] != LAYOUT:
                shutil.rmtree(manifest.parent, ignore_errors=True)
    num_bytes = sum(one.num_bytes for one in _contents(model)) + _LARGE_PAGE_BYTES

    def write(directory: Path, progress: Progress) -> None:
        _write(directory, model, num_bytes, progress)

    prepared(entry, {"layout": LAYOUT}, write, num_bytes=num_bytes, progress=progress, digested=False)


def open_repacked(entry: Path) -> RepackedSource | None:
    """The weights kept in `entry`; None where there are none. What is cut short or damaged is removed."""
    if not (entry / MANIFEST).exists():
        return None
    try:
        return RepackedSource(entry)
    except OSError:
        return None
    except (DamagedError, ValueError, LookupError, TypeError):
        shutil.rmtree(entry, ignore_errors=True)
        return None


class RepackedSource:
    """Weights from such a directory. Raises OSError, DamagedError, ValueError or LookupError for one not whole."""

    def __init__(self, entry: Path) -> None:
        import torch

        self.faults: dict[str, set[str]] = {"missing_keys": set(), "mismatched_keys": set(), "unexpected_keys": set()}
        self._path = entry / _WEIGHTS
        shard = read_shard(self._path)
        notes = json.loads((entry / _NOTES).read_bytes())
        self._bits: dict[str, int] = notes["bits"]
        self._stored = stored_in(shard)
        self._wanted: list[tuple[int, int]] = []
        with self._path.open("rb") as file:
            # Private, so that a page that something wrote to would be copied; without a reservation, for all of it may
            # be more than memory.
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
            self._map = mmap.mmap(file.fileno(), shard.num_bytes, flags=flags)
        self._whole = torch.frombuffer(self._map, dtype=torch.uint8)
        for name, stored in self._stored.items():
            start = self._map[stored.offset : stored.offset + min(stored.num_bytes, _START_BYTES)]
            if zlib.crc32(start) != notes["starts"][name]:
                raise ValueError(f"{name} is damaged")

    @property
    def num_bytes(self) -> int:
        return sum(end - begin for begin, end in self._wanted)

    def has_linear(self, name: str) -> bool:
        return f"{name}.{_LINEAR[0]}" in self._stored

    def has_experts(self, name: str) -> bool:
        return f"{name}.{_EXPERTS[0]}" in self._stored

    def linear(self, name: str) -> PackedWeight:
        codes, scales = (self._tensor(f"{name}.{leaf}") for leaf in _LINEAR)
        return PackedWeight(codes, scales, self._bits[name])

    def plain_linear(self, name: str, module: Any, /) -> PlainWeight | None:
        if f"{name}.{_BLOCKS}" not in self._stored:
            return None
        return PlainWeight(self._tensor(f"{name}.{_BLOCKS}"), module.out_features, self._bits[name])

    def experts(self, name: str, module: Any) -> LayerWeights:  # noqa: ARG002  (others need its number of experts)
        into, into_scales, out_of, out_of_scales = (self._tensor(f"{name}.{leaf}") for leaf in _EXPERTS)
        gate_up, down = self._bits[f"{name}.gate_up"], self._bits[f"{name}.down"]
        return PackedWeight(into, into_scales, gate_up), PackedWeight(out_of, out_of_scales, down)

    def layer(self, name: str, module: Any) -> Layer:  # noqa: ARG002
        into, into_scales, out_of, out_of_scales = stored = [self._stored[f"{name}.{leaf}"] for leaf in _EXPERTS]

        def wanted(weights: LayerWeights) -> list[Straight]:
            targets = [tensor for weight in weights for tensor in (weight.codes, weight.scales)]
            return [Straight(one, target) for one, target in zip(stored, targets, strict=True)]

        gate_up = WeightShape.of(into.shape, into_scales.shape, self._bits[f"{name}.gate_up"])
        return Layer((gate_up, WeightShape.of(out_of.shape, out_of_scales.shape, self._bits[f"{name}.down"])), wanted)

    def plain(self, name: str, parameter: Any) -> Tensor | None:
        if name not in self._stored:
            self.faults["missing_keys"].add(name)
            return None
        values = self._tensor(name)
        if values.shape != parameter.shape or values.dtype != parameter.dtype:
            self.faults["mismatched_keys"].add(name)
        return values

    def fill(self, progress: Callable[[int], object]) -> None:
        """Bring the pages of what was asked for into memory, so that the first pass finds them there."""
        wanted, self._wanted = self._wanted, []
        pieces = [(at, min(_PIECE_BYTES, end - at)) for begin, end in wanted for at in range(begin, end, _PIECE_BYTES)]

        def populate(piece: tuple[int, int]) -> None:
            at, size = piece
            first = at - at % mmap.PAGESIZE
            os.posix_fadvise(descriptor, first, at + size - first, os.POSIX_FADV_WILLNEED)
            with contextlib.suppress(OSError):  # a system that does not know it: then the first pass does it
                self._map.madvise(_POPULATE_READ, first, at + size - first)
            progress(size)

        try:
            descriptor = os.open(self._path, os.O_RDONLY)
            try:
                with ThreadPoolExecutor(NUM_READERS) as pool:
                    list(pool.map(populate, pieces))
            finally:
                os.close(descriptor)
        except OSError as error:
            problem = Problem(f"cannot be read: {error.strerror}", str(self._path), field="model.repack_cache")
            raise NotFoundError(problem) from None

    def _tensor(self, name: str) -> Tensor:
        import torch

        stored = self._stored[name]
        end = stored.offset + stored.num_bytes
        self._wanted.append((stored.offset, end))
        dtype = next(getattr(torch, ours) for ours, theirs in _SPELLINGS.items() if theirs == stored.dtype)
        return self._whole[stored.offset : end].view(dtype).view(stored.shape)


def _experts(model: Any) -> list[tuple[str, Any]]:
    from pipeline.loading.packed_modules import QuantizedExperts, StreamedExperts

    return [one for one in model.named_modules() if isinstance(one[1], QuantizedExperts | StreamedExperts)]


def _rest(model: Any) -> dict[str, Tensor]:
    """All but experts. Wider numbers first: so each begins at a multiple of its size, and the format wants no gaps."""
    from pipeline.loading.packed_modules import PlainLinear, QuantizedLinear

    tensors = dict(model.named_parameters())
    for name, module in model.named_modules():
        leaves = (
            _LINEAR if isinstance(module, QuantizedLinear) else (_BLOCKS,) if isinstance(module, PlainLinear) else ()
        )
        tensors |= {f"{name}.{leaf}": getattr(module, leaf) for leaf in leaves}
    return dict(sorted(tensors.items(), key=lambda one: -one[1].itemsize))


def _contents(model: Any) -> Iterator[_Kept]:
    """What is kept, in the order of the file."""
    import torch

    for name, module in _experts(model):
        shapes = [each for weight in module.shapes() for each in (weight.codes_shape, weight.scales_shape)]
        for leaf, dtype, shape in zip(_EXPERTS, (torch.int32, torch.float16) * 2, shapes, strict=True):
            yield _Kept(f"{name}.{leaf}", dtype, shape)
    for name, tensor in _rest(model).items():
        yield _Kept(name, tensor.dtype, tuple(tensor.shape))


def _values(model: Any) -> Iterator[Tensor]:
    """The values of what is kept, in the same order; each valid until the next is asked for."""
    for _, module in _experts(model):
        with module.weights() as (gate_up, down):
            yield from (gate_up.codes, gate_up.scales, down.codes, down.scales)
    yield from _rest(model).values()


def _bits(model: Any) -> Iterator[tuple[str, int]]:
    from pipeline.loading.packed_modules import PlainLinear, QuantizedLinear

    for name, module in _experts(model):
        gate_up, down = module.shapes()
        yield f"{name}.gate_up", gate_up.bits
        yield f"{name}.down", down.bits
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear | PlainLinear):
            yield name, module.bits


def _write(directory: Path, model: Any, num_bytes: int, progress: Progress) -> None:
    import torch

    contents = list(_contents(model))
    starts: dict[str, int] = {}
    written = 0
    with (directory / _WEIGHTS).open("wb", buffering=0) as file:
        file.write(_header(contents))
        for one, tensor in zip(contents, _values(model), strict=True):
            values: Any = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
            data = memoryview(values)
            starts[one.name] = zlib.crc32(data[:_START_BYTES])
            for at in range(0, len(data), _PIECE_BYTES):
                piece = data[at : at + _PIECE_BYTES]
                while piece:
                    piece = piece[file.write(piece) :]
                written += min(_PIECE_BYTES, len(data) - at)
                if written // _SYNC_BYTES > (written - _PIECE_BYTES) // _SYNC_BYTES:
                    os.fdatasync(file.fileno())
                progress("repacking the weights", min(1.0, written / num_bytes))
    notes = {"bits": dict(_bits(model)), "starts": starts}
    (directory / _NOTES).write_text(json.dumps(notes), encoding="utf-8")


def _header(contents: list[_Kept]) -> bytes:
    """Of a safetensors file whose data begins where a large page does."""
    entries: dict[str, Mapping[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for one in contents:
        begin, end = end, end + one.num_bytes
        dtype = _SPELLINGS[str(one.dtype).removeprefix("torch.")]
        entries[one.name] = {"dtype": dtype, "shape": one.shape, "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-(len(text) + 8) % _LARGE_PAGE_BYTES)
    return struct.pack("<Q", len(text)) + text
