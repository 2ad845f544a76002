"""What lies in a model directory, read and judged without running or loading any of it.

A model is data from a stranger. Before a library opens it we read `config.json` and the safetensors headers ourselves
(they are JSON with a length before it) and refuse what could run code or reach outside the directory: pickled weights,
Python files, `auto_map`, links that leave the directory, headers that lie about the file.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias, cast

from pipeline.errors import NotFoundError, Problem, SpecError

JsonObject: TypeAlias = "dict[str, Any]"

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")

_LFS_POINTER = b"version "
_MAX_JSON_BYTES = 1 << 24
# The flagship's shards have headers of 3 MB, its index 20 MB; the safetensors library itself stops at 100 MB.
_MAX_HEADER_BYTES = 50_000_000
_VALUE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tensor:
    """One entry of a safetensors header."""

    dtype: str  # as safetensors spells it: BF16, I32
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Shard:
    """One weight file."""

    path: Path
    num_bytes: int
    header: bytes  # the JSON as it lies in the file
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model directory found fit to be opened; without shards it is a configuration whose weights are elsewhere."""

    directory: Path
    config: JsonObject
    shards: tuple[Shard, ...]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for shard in self.shards:
            yield from shard.tensors.items()

    @property
    def is_bfloat16(self) -> bool:
        """Whether all weights are stored in bfloat16; without weights, whether the configuration says so."""
        if not self.shards:
            stored = self.config.get("dtype", self.config.get("torch_dtype"))
            return stored == "bfloat16" and "quantization_config" not in self.config
        return all(tensor.dtype == "BF16" for _, tensor in self.tensors())


class DamagedError(Exception):
    """A file that is not what it says; `hostile` where that could hurt the reader, not only the answer.

    No user sees it: who opens files says which one and what to do.
    """

    def __init__(self, message: str, *, hostile: bool = False) -> None:
        super().__init__(message)
        self.hostile = hostile


def open_checkpoint(directory: Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """Read the configuration and all headers of a model directory; no weights.

    Raises SpecError where something in it could run code or lies about its size (unless the job trusts its code, for
    Python files and `auto_map`), NotFoundError where something is missing or cut short; all problems at once. The last
    directory is remembered while its files stay as they are: the headers of 221,184 tensors take seconds.
    """
    return _open(directory, trust_remote_code, _state(directory))


def _state(directory: Path) -> tuple[tuple[str, str, int, int, int], ...]:
    """What changes when a file of a model directory does, or what a link leads to."""
    found: list[tuple[str, str, int, int, int]] = []
    for path in sorted([*directory.glob("*"), *directory.glob("*/*")]):
        size = changed = number = 0  # of a link to nowhere
        with suppress(OSError):
            state = path.stat()
            size, changed, number = state.st_size, state.st_mtime_ns, state.st_ino
        found.append((str(path.absolute()), str(path.resolve()), size, changed, number))
    return tuple(found)


@lru_cache(maxsize=1)
def _open(directory: Path, trust_remote_code: bool, _state: tuple[tuple[str, str, int, int, int], ...]) -> Checkpoint:
    unsafe = [Problem(reason, str(path), field="model.path") for path, reason in _unsafe(directory, trust_remote_code)]
    damaged: list[Problem] = []

    def note(path: Path, error: DamagedError) -> None:
        (unsafe if error.hostile else damaged).append(Problem(str(error), str(path), field="model.path"))

    config: JsonObject = {}
    try:
        config = read_json(directory / CONFIG)
    except DamagedError as error:
        note(directory / CONFIG, error)
    shards: list[Shard] = []
    names, expected = [SINGLE_FILE], None
    index = directory / INDEX
    if index.exists():
        try:
            expected = _weight_map(read_json(index, _MAX_HEADER_BYTES))
            names = sorted(set(expected.values()))
        except DamagedError as error:
            note(index, error)
            names = []
    elif not (directory / SINGLE_FILE).exists():
        names = []
    for name in names:
        try:
            shard = read_shard(directory / name)
            _check_index(shard, name, expected)
            shards.append(shard)
        except DamagedError as error:
            note(directory / name, error)
    if unsafe:
        raise SpecError(unsafe + damaged)
    if damaged:
        raise NotFoundError(damaged)
    return Checkpoint(directory, config, tuple(shards))


def read_json(path: Path, max_bytes: int = _MAX_JSON_BYTES) -> JsonObject:
    """A JSON object from a file that may be anything."""
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise DamagedError(f"cannot be read: {error.strerror}") from None
    if len(data) > max_bytes:
        raise DamagedError(f"longer than {max_bytes} bytes", hostile=True)
    return _parse(data)


def read_shard(path: Path) -> Shard:
    """The header of one safetensors file, checked against the file's size.

    Raises DamagedError. Format: https://huggingface.co/docs/safetensors: eight bytes of little-endian length, so many
    bytes of JSON (name to dtype, shape and data_offsets), then the data without gaps.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise DamagedError("is cut short: not even a header is there; download it again")
            if prefix == _LFS_POINTER:
                raise DamagedError(
                    "is a pointer of Git LFS, not the weights; `git lfs pull` in this directory gets them"
                )
            (length,) = struct.unpack("<Q", prefix)
            if length > _MAX_HEADER_BYTES:
                raise DamagedError(f"says its header has {length} bytes, more than any model needs", hostile=True)
            if length > size - 8:
                raise DamagedError("is cut short within its header; download it again")
            header = file.read(length)
    except OSError as error:
        raise DamagedError(f"cannot be read: {error.strerror}") from None
    entries = _parse(header)
    entries.pop("__metadata__", None)
    tensors: dict[str, Tensor] = {}
    at = 0
    for name, begin, end, tensor in sorted((_entry(name, entry) for name, entry in entries.items()), key=_by_offset):
        if begin != at or end - begin != tensor.num_bytes:
            raise DamagedError(f"lies about the place or size of {name!r}", hostile=True)
        at = end
        tensors[name] = tensor
    if at != size - 8 - length:
        fault = "is cut short" if at > size - 8 - length else "has bytes that no tensor owns"
        raise DamagedError(f"{fault} ({size} bytes, its header says {8 + length + at}); download it again")
    return Shard(path, size, header, tensors)


def _by_offset(entry: tuple[str, int, int, Tensor]) -> tuple[int, int]:
    return entry[1], entry[2]


def _entry(name: str, entry: object) -> tuple[str, int, int, Tensor]:
    fault = DamagedError(f"has a malformed header entry {name!r:.100}", hostile=True)
    if not isinstance(entry, dict):
        raise fault
    fields = cast("JsonObject", entry)
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not (
        isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(offsets) and len(cast("list[int]", offsets)) == 2
    ):
        raise fault
    sizes, (begin, end) = tuple(cast("list[int]", shape)), cast("list[int]", offsets)
    bits = _VALUE_BITS.get(dtype)
    num_bytes = end - begin if bits is None else -(-math.prod(sizes) * bits // 8)
    return name, begin, end, Tensor(dtype, sizes, num_bytes)


def _are_sizes(value: object) -> bool:
    # `type is int` keeps True and False out; the bound keeps products small enough to compute with.
    return isinstance(value, list) and all(
        type(size) is int and 0 <= size < 1 << 48 for size in cast("list[object]", value)
    )


def _parse(data: bytes) -> JsonObject:
    try:
        value = json.loads(data, object_pairs_hook=_no_duplicates)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedError(f"is not JSON: {error}") from None
    except (ValueError, RecursionError) as error:  # a name twice, a number of thousands of digits, nesting without end
        raise DamagedError(f"is JSON that no library writes: {error}", hostile=True) from None
    if not isinstance(value, dict):
        raise DamagedError("is not a JSON object")
    return cast("JsonObject", value)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> JsonObject:
    # Two readers of one file may take different ones of two entries of a name; then what we judged is not what loads.
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a name appears twice")
    return value


def _weight_map(index: JsonObject) -> dict[str, str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DamagedError("names no weight files")
    files = cast("dict[str, object]", weight_map)
    for file in files.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise DamagedError(f"names a weight file {file!r:.100} that is no safetensors file beside it", hostile=True)
    return cast("dict[str, str]", files)


def _check_index(shard: Shard, name: str, expected: Mapping[str, str] | None) -> None:
    if expected is None:
        return
    promised = {tensor for tensor, file in expected.items() if file == name}
    if missing := promised - shard.tensors.keys():
        example = min(missing)
        raise DamagedError(f"lacks {len(missing)} tensors that {INDEX} promises, {example!r} first; download it again")


def _unsafe(directory: Path, trust_remote_code: bool) -> Iterator[tuple[Path, str]]:
    """What in the directory could run code or reach out of it."""
    allowed = [directory.resolve()]
    if directory.parent.name == "snapshots":  # the hub cache keeps blobs beside snapshots and links to them
        allowed.append((directory.parent.parent / "blobs").resolve())
    for path in sorted([*directory.glob("*"), *directory.glob("*/*")]):
        if path.is_symlink() and not any(path.resolve().is_relative_to(root) for root in allowed):
            yield path, "is a link to a file outside the model directory; copy the file in place of the link"
    if not any((directory / name).exists() for name in (SINGLE_FILE, INDEX)):
        for pattern in _PICKLES:
            for path in sorted(directory.glob(pattern)):
                yield path, "holds pickled weights, which can run code when opened; convert the model to safetensors"
    if not trust_remote_code:
        yield from _code(directory)


def _code(directory: Path) -> Iterator[tuple[Path, str]]:
    advice = "read it, and set model.trust_remote_code: true to run it, or remove it"
    for path in sorted([*directory.glob("*.py"), *directory.glob("*/*.py")]):
        yield path, f"is Python code in a model directory: {advice}"
    for name in (CONFIG, "tokenizer_config.json", GENERATION_CONFIG):
        try:
            has_code = "auto_map" in read_json(directory / name)
        except DamagedError:
            continue
        if has_code:
            yield directory / name, f"asks for code of its own (auto_map): {advice}"
