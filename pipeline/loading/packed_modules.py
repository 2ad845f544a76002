"""Modules over our kernels' layouts: they take the place of transformers' own in a model that it built."""
# pyright: basic

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from pipeline.kernels.packed import Layer, PackedWeight, experts, linear
from pipeline.kernels.plain import PlainWeight, in_plain_blocks, plain_linear
from pipeline.loading.expert_stream import ExpertStream
from pipeline.loading.weight_files import WeightShape
from pipeline.loading.weight_source import LayerWeights


class QuantizedLinear(nn.Module):
    """In place of `nn.Linear`."""

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: PackedWeight, bias: nn.Parameter | None, *, int8: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = weight.num_inputs, weight.num_outputs, weight.bits
        self.int8 = int8
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales)
        self.bias = bias

    @property
    def weight_in_blocks(self) -> PackedWeight:
        return PackedWeight(self.codes, self.scales, self.bits)

    @property
    def form(self) -> tuple[object, ...]:
        """What two layers whose products are combined have in common."""
        return type(self), self.codes.shape, self.scales.shape, self.bits, self.int8

    def forward(self, x: Tensor) -> Tensor:
        out = linear(x, self.weight_in_blocks, int8=self.int8)
        return out if self.bias is None else out + self.bias

    def layer(self) -> Layer:
        """The weights for native code, as long as they stay where they are."""
        return self.weight_in_blocks.layer(int8=self.int8)


class PlainLinear(nn.Module):
    """In place of an `nn.Linear` of float32 weights."""

    blocks: Tensor

    def __init__(self, weight: PlainWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = weight.num_inputs, weight.num_outputs, weight.bits
        self.register_buffer("blocks", weight.blocks)
        self.bias = bias

    @property
    def weight_in_blocks(self) -> PlainWeight:
        return PlainWeight(self.blocks, self.out_features, self.bits)

    @property
    def form(self) -> tuple[object, ...]:
        """What two layers whose products are combined have in common."""
        return type(self), self.blocks.shape, self.out_features, self.bits

    def forward(self, x: Tensor) -> Tensor:
        out = plain_linear(x, self.weight_in_blocks)
        return out if self.bias is None else out.add_(self.bias)

    def layer(self) -> Layer:
        """The weights for native code, as long as they stay where they are."""
        return self.weight_in_blocks.layer()


def put_linears_in_blocks(model: nn.Module) -> None:
    """Replace every `nn.Linear` of a float32 model on the CPU, one by one, so that little is held twice.

    An embedding that shares its matrix with the head keeps it.
    """
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, PlainLinear(in_plain_blocks(module.weight.detach()), module.bias))
            del module


class QuantizedExperts(nn.Module):
    """In place of the routed experts of a layer, on whatever device they lie: only hidden states cross."""

    gate_up_codes: Tensor
    gate_up_scales: Tensor
    down_codes: Tensor
    down_scales: Tensor

    def __init__(self, gate_up: PackedWeight, down: PackedWeight, *, int8: bool = False) -> None:
        super().__init__()
        self.int8 = int8
        self.gate_up_bits, self.down_bits = gate_up.bits, down.bits
        self.register_buffer("gate_up_codes", gate_up.codes)
        self.register_buffer("gate_up_scales", gate_up.scales)
        self.register_buffer("down_codes", down.codes)
        self.register_buffer("down_scales", down.scales)

    @contextmanager
    def weights(self) -> Generator[LayerWeights]:
        """The gate and up, and the down projections."""
        gate_up = PackedWeight(self.gate_up_codes, self.gate_up_scales, self.gate_up_bits)
        yield gate_up, PackedWeight(self.down_codes, self.down_scales, self.down_bits)

    def shapes(self) -> tuple[WeightShape, WeightShape]:
        with self.weights() as weights:
            gate_up, down = (WeightShape.of(one.codes.shape, one.scales.shape, one.bits) for one in weights)
        return gate_up, down

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        with self.weights() as (gate_up, down):
            return _elsewhere(hidden_states, top_k_index, top_k_weights, gate_up, down, int8=self.int8)


class StreamedExperts(nn.Module):
    """The same with weights that are read anew for every pass, all tokens of which pay for it together."""

    reads_for_every_pass = True

    def __init__(self, stream: ExpertStream, place: int, *, int8: bool = False) -> None:
        super().__init__()
        self._stream, self._place, self._int8 = stream, place, int8

    def weights(self) -> AbstractContextManager[LayerWeights]:
        """The gate and up, and the down projections, valid within the block."""
        return self._stream.layer(self._place)

    def shapes(self) -> tuple[WeightShape, WeightShape]:
        return self._stream.shape(self._place)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        with self.weights() as (gate_up, down):
            return _elsewhere(hidden_states, top_k_index, top_k_weights, gate_up, down, int8=self._int8)


def _elsewhere(
    x: Tensor, chosen: Tensor, weights: Tensor, gate_up: PackedWeight, down: PackedWeight, *, int8: bool
) -> Tensor:
    device = gate_up.codes.device
    if x.device == device:
        return experts(x, chosen, weights, gate_up, down, int8=int8)
    rows, choice, shares = _brought((x, chosen, weights), device)
    return _brought((experts(rows, choice, shares, gate_up, down, int8=int8),), x.device)[0]


def _brought(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The same on another device, with one wait for all of them, and through pinned memory where the host is an end.

    Such memory is torch's to keep: what is still being read is not lent again.
    """
    source = tensors[0].device
    if source.type == "cuda" and device.type == "cpu":
        pinned = [torch.empty(one.shape, dtype=one.dtype, pin_memory=True) for one in tensors]
        for here, there in zip(pinned, tensors, strict=True):
            here.copy_(there, non_blocking=True)
        torch.cuda.current_stream(source).synchronize()
        return pinned
    if source.type == "cpu" and device.type == "cuda":
        return [one.pin_memory().to(device, non_blocking=True) for one in tensors]
    return [one.to(device) for one in tensors]
