"""Whether a checkpoint has the tensors that its configuration describes, and whether our own loader reads them.

Both are told from names, shapes and types alone, before anything is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Set
from typing import Any

from pipeline.facts.architecture import Architecture, Module
from pipeline.facts.checkpoint import Tensor
from pipeline.facts.quantization import AUTO_GPTQ, FULL_BITS, WHOLE_WORD_BITS, Quantization

_PACKED = ("qweight", "qzeros", "scales")
_NAMELESS = ("A_log", "dt_bias")  # parameters of a module, not modules with a `weight`
_BLOCK = 32  # outputs, and inputs of a group, come in multiples of this
_IGNORED = ("rotary_emb.inv_freq", "g_idx")  # computed, or told again


def layout_faults(tensors: Mapping[str, Tensor], architecture: Architecture) -> list[str]:
    """Tensors that are missing, of another shape or too many; only for a family whose modules we know."""
    faults: list[str] = []
    known: set[str] = set()
    for module in _each(architecture):
        if f"{module.name}.qweight" in tensors:
            faults += _packed_faults(tensors, module)
            known.update(f"{module.name}.{leaf}" for leaf in _PACKED)
        else:
            faults += _plain_faults(tensors, module, known)
        if module.bias:
            known.add(f"{module.name}.bias")
            if f"{module.name}.bias" not in tensors:
                faults.append(f"{module.name}.bias is missing")
    faults += _surplus(tensors, architecture, known)
    return faults


def _each(architecture: Architecture) -> Iterator[Module]:
    for module in architecture.modules():
        for copy in range(module.copies):
            yield module if copy == 0 else module._replace(name=module.name.replace(".experts.0.", f".experts.{copy}."))


def _packed_faults(tensors: Mapping[str, Tensor], module: Module) -> Iterator[str]:
    found = [tensors.get(f"{module.name}.{leaf}") for leaf in _PACKED]
    for leaf, tensor in zip(_PACKED, found, strict=True):
        if tensor is None or len(tensor.shape) != 2:
            yield f"{module.name}.{leaf} is {'missing' if tensor is None else 'no matrix'}"
            return
    codes, zeros, scales = (tensor.shape for tensor in found if tensor is not None)
    inputs, outputs, bits = module.num_inputs, module.num_outputs, _bits(zeros, scales)
    groups = scales[0]
    expected = ((-(-inputs * bits // 32), outputs), (groups, -(-outputs * bits // 32)), (groups, outputs))
    for leaf, shape, wanted in zip(_PACKED, (codes, zeros, scales), expected, strict=True):
        if shape != wanted:
            yield f"{module.name}.{leaf} is {_sides(shape)}, and a layer of {inputs} to {outputs} has {_sides(wanted)}"


def _plain_faults(tensors: Mapping[str, Tensor], module: Module, known: set[str]) -> Iterator[str]:
    name = module.name if module.name.endswith(_NAMELESS) else f"{module.name}.weight"
    num_values = module.num_outputs * max(1, module.num_inputs)
    stack = _stack(tensors, module)
    if stack:
        known.add(stack)
        return
    known.add(name)
    if (tensor := tensors.get(name)) is None:
        yield f"{name} is missing"
    elif tensor.num_values != num_values or (module.num_inputs and tensor.shape[0] != module.num_outputs):
        wanted = (module.num_outputs, module.num_inputs) if module.num_inputs else (num_values,)
        yield f"{name} is {_sides(tensor.shape)}, and the configuration makes it {_sides(wanted)}"


def _stack(tensors: Mapping[str, Tensor], module: Module) -> str | None:
    """The tensor that holds all experts of a layer, where they are not stored one by one."""
    prefix, mark, rest = module.name.partition(".experts.")
    if not mark:
        return None
    leaf = "down_proj" if rest.endswith("down_proj") else "gate_up_proj"
    name = f"{prefix}.experts.{leaf}"
    return name if name in tensors else None


def _surplus(tensors: Mapping[str, Tensor], architecture: Architecture, known: Set[str]) -> Iterator[str]:
    """Tensors of layers that the configuration has, in places where it has none: it describes another model."""
    layers = {f"{architecture.prefix}layers.{index}." for index in range(architecture.num_layers)}
    for name in tensors:
        layer = ".".join(name.split(".")[: architecture.prefix.count(".") + 2]) + "."
        if layer in layers and name not in known and not name.endswith(_IGNORED):
            yield f"{name} has no place in the model that the configuration describes"


def unpackable(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    architecture: Architecture,
    quantization: Quantization | None,
) -> str | None:
    """Why our own loader cannot keep the weights packed; None where it can."""
    if quantization is None or quantization.packing != AUTO_GPTQ:
        return f"they are not packed as {AUTO_GPTQ}"
    if not quantization.symmetric:
        return "they are not symmetric"
    if not architecture.is_enumerable:
        return f"models of type {architecture.model_type!r} are not known to it"
    text = config.get("text_config") or config
    if architecture.num_experts and text.get("hidden_act", "silu") != "silu":
        return "the experts have another activation than silu"
    if not tensors:
        schemes = [quantization.scheme_of(module) for module in architecture.modules()]
        return next(filter(None, (_scheme_fault(bits, group) for bits, group in schemes if bits < FULL_BITS)), None)
    return _stored_fault(tensors)


def _stored_fault(tensors: Mapping[str, Tensor]) -> str | None:
    experts: dict[str, set[tuple[int, int]]] = {}
    for name, codes in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "g_idx":
            return "their inputs are reordered (g_idx)"
        if leaf != "qweight":
            continue
        zeros, scales = tensors[f"{layer}.qzeros"], tensors[f"{layer}.scales"]
        bits = _bits(zeros.shape, scales.shape)
        inputs = codes.shape[0] * 32 // max(1, bits)
        group = inputs // max(1, scales.shape[0])
        if fault := _scheme_fault(bits, group):
            return fault
        if codes.shape[1] % _BLOCK or scales.dtype != "F16" or inputs % group:
            return f"{layer} has sides or scales that it does not read"
        block, mark, rest = layer.partition(".experts.")
        if mark:
            kind = "down" if rest.endswith("down_proj") else "gate and up"
            experts.setdefault(f"{block} {kind}", set()).add((bits, group))
    mixed = next((layer for layer, schemes in experts.items() if len(schemes) > 1), None)
    return f"the experts of {mixed} differ in bits" if mixed else None


def _scheme_fault(bits: int, group_size: int) -> str | None:
    if bits not in WHOLE_WORD_BITS:
        return f"it reads 2, 4 and 8 bits, not {bits}"
    return (
        f"it reads groups of multiples of {_BLOCK}, not of {group_size}"
        if group_size != -1 and group_size % _BLOCK
        else None
    )


def _bits(zeros: tuple[int, ...], scales: tuple[int, ...]) -> int:
    return 32 * zeros[1] // max(1, scales[1])


def _sides(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or str(math.prod(shape))
