"""Quantization: what a checkpoint's quantization_config says about the bits of each layer, and what they weigh."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

from pipeline.errors import NotFoundError, Problem
from pipeline.facts.architecture import Module

AUTO_GPTQ = "auto_round:auto_gptq"  # the packing that we read ourselves
WHOLE_WORD_BITS = (2, 4, 8)  # of which a 32-bit word holds a whole number
FULL_BITS = 16  # a layer that is left as it was
_SCALE_BYTES = 2  # float16
_EXPERT_NUMBER = re.compile(r"\.experts\.\d+\.")
# Patterns come with the model. One that could take for ever (a repeated group, many stars) is not tried.
_SLOW_PATTERN = re.compile(r"\)[*+{]|([*+}].*){5}")
_MAX_PATTERN_CHARS = 200
_UNSPECIFIED = -1  # group_size: one group for the whole input


class Scheme(NamedTuple):
    """How one layer is stored."""

    bits: int
    group_size: int  # inputs that share a scale; -1 is all


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How the weights are stored; `extra` overrides single layers, by name or regular expression."""

    method: str  # auto-round, gptq, fp8, ...
    packing: str  # auto_round:auto_gptq, ...; empty where the method has one way only
    default: Scheme
    symmetric: bool
    extra: Mapping[str, Scheme]
    blocks: tuple[str, ...]  # prefixes of the names that are quantized at all; empty: every decoder layer
    patterns: tuple[str, ...] = ()  # keys of `extra` that name no layer and so are regular expressions

    def scheme_of(self, module: Module) -> Scheme:
        """How one layer is stored, by AutoRound's own rule: an exact name, else the first pattern, else the default.

        Layers outside the quantized blocks, tables and layers whose sides are no multiples of 32 stay as they were.
        """
        full = Scheme(FULL_BITS, _UNSPECIFIED)
        if not module.num_inputs:
            return full
        if (scheme := self.extra.get(module.name)) is not None:
            return scheme
        for pattern in self.patterns:
            if re.search(pattern, module.name):
                return self.extra[pattern]
        inside = (
            any(module.name.startswith(block) for block in self.blocks) if self.blocks else ".layers." in module.name
        )
        fits = module.num_inputs % 32 == 0 and module.num_outputs % 32 == 0
        return self.default if inside and fits and module.linear else full

    def for_modules(self, modules: Iterable[Module]) -> Quantization:
        """The same, with the keys of `extra` sorted into names and patterns, which only the modules can tell apart."""
        names = {module.name for module in modules}
        return replace(self, patterns=tuple(key for key in self.extra if key not in names and _is_pattern(key)))


def packed_bytes(module: Module, scheme: Scheme) -> int:
    """Bytes of `qweight`, `scales` and `qzeros` of one such layer, in the AutoGPTQ layout.

    qweight int32 [K*bits/32, N], scales float16 [K/group, N], qzeros int32 [K/group, N*bits/32].
    """
    inputs, outputs, bits = module.num_inputs, module.num_outputs, scheme.bits
    num_groups = 1 if scheme.group_size == _UNSPECIFIED else -(-inputs // scheme.group_size)
    qweight = -(-inputs * bits // 32) * outputs * 4
    return qweight + num_groups * outputs * _SCALE_BYTES + num_groups * -(-outputs * bits // 32) * 4


def _is_pattern(key: str) -> bool:
    if len(key) > _MAX_PATTERN_CHARS or _EXPERT_NUMBER.search(key) or _SLOW_PATTERN.search(key):
        return False
    try:
        re.compile(key)
    except re.error:
        return False
    return True


def read_quantization(config: Mapping[str, Any], *, file: str) -> Quantization | None:
    """What `quantization_config` says, or None for a model that has none; NotFoundError where it makes no sense."""
    given = config.get("quantization_config")
    if given is None:
        return None
    values: Mapping[str, Any] = cast("Mapping[str, Any]", given) if isinstance(given, dict) else {}
    method = values.get("quant_method")
    extra: object = values.get("extra_config") or {}
    default = _scheme(values, Scheme(FULL_BITS, _UNSPECIFIED))
    if not isinstance(method, str) or not isinstance(extra, dict) or default is None:
        raise NotFoundError(Problem("quantization_config cannot be understood", file, field="model.path"))
    schemes = {str(name): _scheme(override, default) for name, override in cast("dict[str, object]", extra).items()}
    return Quantization(
        method=method,
        packing=str(values.get("packing_format", "")),
        default=default,
        symmetric=values.get("sym") is not False,
        extra={name: scheme for name, scheme in schemes.items() if scheme is not None},
        blocks=_blocks(values.get("block_name_to_quantize") or values.get("to_quant_block_names")),
    )


def _scheme(given: object, default: Scheme) -> Scheme | None:
    values: Mapping[str, Any] = cast("Mapping[str, Any]", given) if isinstance(given, Mapping) else {}
    bits, group_size = values.get("bits", default.bits), values.get("group_size", default.group_size)
    if type(bits) is not int or type(group_size) is not int:
        return None
    return Scheme(bits, group_size) if 1 <= bits <= 32 and (group_size == _UNSPECIFIED or group_size >= 1) else None


def _blocks(given: object) -> tuple[str, ...]:
    if isinstance(given, str):
        return tuple(given.split(","))
    if isinstance(given, list):
        return tuple(name for entry in cast("list[object]", given) for name in _blocks(entry))
    return ()
