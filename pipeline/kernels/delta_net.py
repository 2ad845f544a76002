"""The gated delta rule over states by slot; where there is no kernel for it a layer's own code computes it."""
# pyright: basic

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.kernels import gpu
from pipeline.kernels.native import native

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SOURCE = Path(__file__).with_name("delta_net.c")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaNetWeights:
    """What a layer has of its own besides projections, float32 and contiguous."""

    num_key_heads: int
    num_value_heads: int
    key_size: int
    value_size: int
    taps: Tensor  # [taps, channels] of the convolution, the oldest first; channels are queries, keys, values
    rate: Tensor  # [value heads]: a state decays by exp(-rate * softplus(a + bias))
    bias: Tensor
    norm: Tensor  # [value_size]
    norm_eps: float

    @property
    def window_shape(self) -> tuple[int, int]:
        """Of what the convolution remembers of a sequence."""
        return len(self.taps) - 1, self.taps.shape[1]

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.num_value_heads, self.key_size, self.value_size


class DeltaNetInputs(NamedTuple):
    """Projections of the step's tokens, float32 [tokens, key heads, numbers of a key head], contiguous in the last."""

    query: Tensor
    key: Tensor
    value: Tensor  # the value heads of a key head one after the other; so the next
    gate: Tensor  # of the output, z
    beta: Tensor  # before the sigmoid: a number of each value head; so the next
    decay: Tensor  # a, before bias and softplus


def delta_net(
    weights: DeltaNetWeights, inputs: DeltaNetInputs, spans: Tensor, windows: Tensor, states: Tensor
) -> Tensor:
    """What the layer's last projection takes, float32 [tokens, value heads * value_size]; tokens of no span are zeros.

    `spans` int64 [sequences, 4] are consecutive tokens of one sequence each: its slot, the first among the step's
    tokens, how many, and whether the sequence begins, whatever the slot held before.
    `windows` [slots, taps - 1, channels] and `states` [slots, value heads, key_size, value_size], float32 and
    contiguous, are moved on. A sequence's numbers depend on nothing but its own tokens: not on what else is in the
    step, on how its tokens were spread over steps, or on the number of threads. Raises MemoryError.
    """
    import torch

    if gpu.is_served(states.device):
        from pipeline.kernels.gpu.delta_net import delta_net as on_gpu

        return on_gpu(weights, inputs, spans, windows, states)
    library = _library()
    assert library is not None
    num_tokens = len(inputs.query)
    out = torch.zeros(num_tokens, weights.num_value_heads * weights.value_size)
    described = (_Input * len(inputs))(*(_Input(x.data_ptr(), x.stride(0), x.stride(1)) for x in inputs))
    failed = library.delta_net(
        ctypes.byref(_layer(weights, windows, states)),
        described,
        spans.data_ptr(),
        len(spans),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("no memory for the inputs of recurrent layers")
    return out


def is_available(device: torch.device) -> bool:
    """Whether there is a kernel for this device: on a CPU a compiler, or the kernel compiled before."""
    return gpu.is_served(device) or (device.type == "cpu" and _library() is not None)


class _Input(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("token_stride", ctypes.c_int64), ("group_stride", ctypes.c_int64))


class _Layer(ctypes.Structure):
    _fields_ = (
        ("key_heads", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("key_size", ctypes.c_int64),
        ("value_size", ctypes.c_int64),
        ("taps", ctypes.c_int64),
        ("taps_by_channel", ctypes.c_void_p),
        ("rate", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("norm_eps", ctypes.c_float),
        ("windows", ctypes.c_void_p),
        ("states", ctypes.c_void_p),
    )


def _layer(weights: DeltaNetWeights, windows: Tensor, states: Tensor) -> _Layer:
    return _Layer(
        weights.num_key_heads,
        weights.num_value_heads // weights.num_key_heads,
        weights.key_size,
        weights.value_size,
        len(weights.taps),
        weights.taps.data_ptr(),
        weights.rate.data_ptr(),
        weights.bias.data_ptr(),
        weights.norm.data_ptr(),
        weights.norm_eps,
        windows.data_ptr(),
        states.data_ptr(),
    )


@cache
def _library() -> ctypes.CDLL | None:
    library = native(SOURCE).library
    if library is not None:
        pointer, number, switch = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        library.delta_net.argtypes = (pointer, pointer, pointer, number, pointer, switch)
    return library
