"""ModelFacts: what a plan must know of a model, from its config.json and safetensors headers alone.

Where the weights are not at hand (a hub model before its download) the same facts follow from the configuration.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import NotFoundError, Problem
from pipeline.facts.architecture import Architecture, read_architecture
from pipeline.facts.checkpoint import CONFIG, Checkpoint, Tensor, open_checkpoint
from pipeline.facts.layout import layout_faults, unpackable
from pipeline.facts.quantization import (
    AUTO_GPTQ,
    FULL_BITS,
    WHOLE_WORD_BITS,
    Quantization,
    packed_bytes,
    read_quantization,
)

EXPERTS, EMBEDDINGS, NORMS = "experts", "embeddings", "norms"
_MOST_FAULTS = 20  # that are told one by one
SET_ASIDE = "set aside"  # tensors of a vision tower or of speculative layers, which we never load
PARTS = (
    *(EXPERTS, "shared experts", "routers", "attention", "linear attention"),
    *("mlp", EMBEDDINGS, "head", NORMS, SET_ASIDE),
)
_PART_OF_NAME = (
    (SET_ASIDE, ("mtp.", ".visual.", "vision_tower.", "multi_modal_projector.")),
    (EXPERTS, (".experts.",)),
    ("shared experts", (".shared_expert.", ".shared_experts.")),
    ("routers", (".shared_expert_gate.", ".mlp.gate.", ".router.", ".block_sparse_moe.gate.")),
    (NORMS, ("norm.", "layernorm.")),
    ("linear attention", (".linear_attn.",)),
    ("attention", (".self_attn.", ".attention.", ".attn.")),
    ("mlp", (".mlp.", ".feed_forward.")),
    (EMBEDDINGS, ("embed_tokens.", ".wte.")),
    ("head", ("lm_head.",)),
)


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of parameters, over all layers."""

    name: str
    num_parameters: int
    packed_parameters: int  # those of them that are stored quantized ...
    packed_bytes: int  # ... and what they take so, scales and zero points included
    disk_bytes: int
    bits: tuple[int, ...]  # of its matrices, ascending

    def num_bytes(self, value_bytes: int, *, unpacked: bool = False) -> int:
        """Bytes in memory where an unquantized number takes `value_bytes`; `unpacked`: quantized ones too."""
        if unpacked:
            return self.num_parameters * value_bytes
        return self.packed_bytes + (self.num_parameters - self.packed_parameters) * value_bytes


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model as far as planning goes."""

    directory: str
    architecture: Architecture
    quantization: Quantization | None
    parts: tuple[Part, ...]  # in the order of PARTS, those that are there
    estimated: bool  # the parts follow from the configuration, not from headers
    is_bfloat16: bool  # all that is stored
    packed_fault: str | None  # why our own loader cannot keep packed weights packed; None where it can

    @property
    def loaded_parts(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.name != SET_ASIDE)

    @property
    def num_parameters(self) -> int:
        return sum(part.num_parameters for part in self.loaded_parts)

    @property
    def disk_bytes(self) -> int:
        return sum(part.disk_bytes for part in self.parts)

    @property
    def is_packed(self) -> bool:
        return any(part.packed_parameters for part in self.loaded_parts)

    @property
    def can_pack(self) -> bool:
        """Whether our own loader and kernels take the packed weights as they are."""
        return self.is_packed and self.packed_fault is None

    @property
    def can_unpack(self) -> bool:
        """Whether all that is packed is packed in the way that we can turn into plain weights."""
        packing = self.quantization.packing if self.quantization else ""
        bits = {bits for part in self.loaded_parts if part.packed_parameters for bits in part.bits if bits < FULL_BITS}
        return self.is_packed and packing == AUTO_GPTQ and bits <= set(WHOLE_WORD_BITS)

    def part(self, name: str) -> Part:
        """The part of that name; an empty one where the model has none."""
        return next((part for part in self.parts if part.name == name), Part(name, 0, 0, 0, 0, ()))

    def kv_bytes_per_token(self, value_bytes: int = 2) -> int:
        """Cache that one token of context takes."""
        return self.architecture.kv_values_per_token * value_bytes

    def state_bytes_per_sequence(self, value_bytes: int = 2) -> int:
        """Cache that one sequence takes whatever its length."""
        return self.architecture.state_bytes_per_sequence(value_bytes)


def read_facts(directory: Path, *, trust_remote_code: bool = False) -> ModelFacts:
    """Facts of the model in a directory, with or without its weights there.

    Raises SpecError or NotFoundError as `open_checkpoint` does, and NotFoundError where the configuration describes no
    model that writes text or, without weights, one whose parts we cannot count.
    """
    return facts_of(open_checkpoint(directory, trust_remote_code=trust_remote_code))


def facts_of(checkpoint: Checkpoint) -> ModelFacts:
    """Facts of a checkpoint that was opened."""
    file = str(checkpoint.directory / CONFIG)
    architecture = read_architecture(checkpoint.config, file=file)
    quantization = read_quantization(checkpoint.config, file=file)
    tensors = dict(checkpoint.tensors())
    if tensors:
        if architecture.is_enumerable and (faults := layout_faults(tensors, architecture)):
            raise NotFoundError(list(_layout_problems(faults, str(checkpoint.directory))))
        pieces = _stored(tensors, quantization)
    elif architecture.is_enumerable:
        pieces = _expected(architecture, quantization)
    else:
        message = f"a {architecture.model_type!r} model can only be planned for once its weights are here; none are"
        raise NotFoundError(Problem(message, str(checkpoint.directory), field="model.path"))
    return ModelFacts(
        directory=str(checkpoint.directory),
        architecture=architecture,
        quantization=quantization,
        parts=_sum(pieces),
        estimated=not tensors,
        is_bfloat16=checkpoint.is_bfloat16,
        packed_fault=unpackable(checkpoint.config, tensors, architecture, quantization),
    )


def _layout_problems(faults: Sequence[str], directory: str) -> Iterator[Problem]:
    yield Problem(f"the weights do not fit the configuration: {len(faults)} faults", directory, field="model.path")
    for fault in faults[:_MOST_FAULTS]:
        yield Problem(fault, directory)
    if len(faults) > _MOST_FAULTS:
        yield Problem(f"and {len(faults) - _MOST_FAULTS} more", directory)


class _Piece(NamedTuple):
    """A module's contribution to its part."""

    part: str
    num_parameters: int
    packed_parameters: int
    num_bytes: int
    bits: int  # 0 for a vector, whose precision nobody asks for


def _sum(pieces: Iterable[_Piece]) -> tuple[Part, ...]:
    by_part: dict[str, list[_Piece]] = defaultdict(list)
    for piece in pieces:
        by_part[piece.part].append(piece)
    return tuple(
        Part(
            name,
            num_parameters=sum(piece.num_parameters for piece in by_part[name]),
            packed_parameters=sum(piece.packed_parameters for piece in by_part[name]),
            packed_bytes=sum(piece.num_bytes for piece in by_part[name] if piece.packed_parameters),
            disk_bytes=sum(piece.num_bytes for piece in by_part[name]),
            bits=tuple(sorted({piece.bits for piece in by_part[name]} - {0})),
        )
        for name in PARTS
        if name in by_part
    )


def part_of(name: str) -> str:
    """The part that a tensor of this name belongs to."""
    return next((part for part, marks in _PART_OF_NAME if any(mark in name for mark in marks)), NORMS)


def _stored(tensors: Mapping[str, Tensor], quantization: Quantization | None) -> Iterator[_Piece]:
    """Pieces from headers. What is packed shows in the names; its bits in the width of the zero points."""
    packed = {name.removesuffix("qweight") for name in tensors if name.endswith(".qweight")}
    for prefix in packed:
        weight = tensors[f"{prefix}qweight"]
        bits = _packed_bits(tensors, prefix, quantization)
        num_bytes = sum(
            tensor.num_bytes
            for leaf in ("qweight", "qzeros", "scales", "g_idx")
            if (tensor := tensors.get(prefix + leaf)) is not None
        )
        num_parameters = weight.num_values * 32 // bits
        yield _Piece(part_of(prefix), num_parameters, num_parameters, num_bytes, bits)
    for name, tensor in tensors.items():
        module, dot, leaf = name.rpartition(".")
        if leaf in ("qweight", "qzeros", "scales", "g_idx") and module + dot in packed:
            continue
        bits = 8 * tensor.num_bytes // max(1, tensor.num_values) if len(tensor.shape) > 1 else 0
        yield _Piece(part_of(name if dot else f"{name}."), tensor.num_values, 0, tensor.num_bytes, bits)


def _packed_bits(tensors: Mapping[str, Tensor], prefix: str, quantization: Quantization | None) -> int:
    zeros, scales = tensors.get(f"{prefix}qzeros"), tensors.get(f"{prefix}scales")
    if zeros is not None and scales is not None and len(zeros.shape) == len(scales.shape) == 2 and scales.shape[1]:
        return max(1, 32 * zeros.shape[1] // scales.shape[1])
    return quantization.default.bits if quantization else FULL_BITS


def _expected(architecture: Architecture, quantization: Quantization | None) -> Iterator[_Piece]:
    """Pieces from the configuration: each module once, times its count."""
    modules = list(architecture.modules())
    if quantization is not None:
        quantization = quantization.for_modules(modules)
    for module in modules:
        part = part_of(f"{module.name}.")
        scheme = quantization.scheme_of(module) if quantization is not None else None
        num_parameters = module.copies * module.num_outputs * max(1, module.num_inputs)
        if scheme is not None and scheme.bits < FULL_BITS:
            num_bytes = module.copies * packed_bytes(module, scheme)
            yield _Piece(part, num_parameters, num_parameters, num_bytes, scheme.bits)
        else:
            bits = FULL_BITS if module.num_inputs else 0
            yield _Piece(part, num_parameters, 0, num_parameters * FULL_BITS // 8, bits)
        if module.bias:
            num_parameters = module.copies * module.num_outputs
            yield _Piece(part, num_parameters, 0, num_parameters * FULL_BITS // 8, 0)


def facts_from_config(config: Mapping[str, Any], *, name: str) -> ModelFacts:
    """Facts of a model of which only the configuration is known; `name` stands for it in messages."""
    return facts_of(Checkpoint(Path(name), dict(config), ()))
