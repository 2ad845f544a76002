"""Products with packed integer weights: kernels for CPUs and GPUs where they can be had, and the same in torch.

The layout (`blocks.h`): a layer of K inputs and N outputs is `codes` int32 [N / 32, K * bits / 32, 32] and
`scales` float16 [N / 32, K / group_size, 32]; the experts of a layer are stacked in front. Weights are symmetric:
`weight = (code - 2 ** (bits - 1)) * scale`, and exact: only what comes out is rounded to the type of what went in.
"""
# pyright: basic

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.kernels import gpu
from pipeline.kernels.native import native

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 32  # outputs that lie together
LAYOUT = 1  # the number of this layout: weights are kept in it on disk, and one of another number is made anew
_WORD_BITS = 32
SOURCE = Path(__file__).with_name("packed.c")
_SLAB = 128  # inputs that are rounded to 8 bits with one scale, or fewer where a group is not made of so many
_FLOAT32, _BFLOAT16, _INT8 = range(3)  # kinds of rows
_EXPERTS_AT_ONCE = 32  # that the torch path dequantizes together: bounds its memory


class PackedWeight(NamedTuple):
    """A quantized linear layer, or a stack of equal ones."""

    codes: Tensor
    scales: Tensor
    bits: int

    @property
    def num_outputs(self) -> int:
        return self.codes.shape[-3] * BLOCK

    @property
    def num_inputs(self) -> int:
        return self.codes.shape[-2] * _WORD_BITS // self.bits

    @property
    def group_size(self) -> int:
        return self.num_inputs // self.scales.shape[-2]

    def __getitem__(self, index: Any) -> PackedWeight:
        """Those experts of a stack."""
        return PackedWeight(self.codes[index], self.scales[index], self.bits)

    def layer(self, *, int8: bool = False) -> Layer:
        """For native code; `int8`: rows are rounded first."""
        return Layer(self.codes, self.scales, self.num_outputs, self.num_inputs, self.bits, int8=int8)


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weights [..., N, K]: exact in float32, rounded once to anything smaller."""
    import torch

    bits = weight.bits
    shifts = torch.arange(0, _WORD_BITS, bits, dtype=torch.int32, device=weight.codes.device)
    values = (weight.codes.unsqueeze(-2) >> shifts.unsqueeze(-1)) & ((1 << bits) - 1)  # [..., word, in the word, 32]
    values = values.flatten(-3, -2).unflatten(-2, (-1, weight.group_size)) - (1 << (bits - 1))
    scaled = values * weight.scales.float().unsqueeze(-2)
    return scaled.flatten(-3, -2).transpose(-2, -1).flatten(-3, -2).to(dtype)


def linear(x: Tensor, weight: PackedWeight, *, int8: bool = False) -> Tensor:
    """x [..., K] times the layer: [..., N] in the type of x, which is any floating one.

    With `int8` x is rounded first, each 128 inputs of a row to whole numbers up to 127 times a scale.
    """
    import torch

    library = native_library() if x.device.type == "cpu" else None
    if library is None or not x.numel():
        return torch.nn.functional.linear(_rounded(x, weight) if int8 else x, dequantize(weight, x.dtype))
    return multiply(x, weight.layer(int8=int8))


class Layer:
    """A layer as native code is told of it: in blocks, or as torch has it, its rows `stride` numbers apart.

    It may be used again and again as long as its tensors lie where they do. `scales` is None for plain weights. With
    `int8` rows are rounded first.
    """

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor | None,
        num_outputs: int,
        num_inputs: int,
        bits: int,
        stride: int = 0,
        *,
        int8: bool = False,
    ) -> None:
        self._tensors = codes, scales  # that they stay
        self._multiplies_bf16 = has_bfloat16() and not int8
        if scales is None:
            self._multiplies_bf16 &= bits == 16 and num_inputs % 2 == 0
        self.num_outputs, self.num_inputs, self.int8 = num_outputs, num_inputs, int8
        group = num_inputs if scales is None else num_inputs // scales.shape[-2]
        places = (codes.data_ptr(), None if scales is None else scales.data_ptr())
        self.description = Description(*places, num_outputs, num_inputs, bits, group, stride)
        self.described = ctypes.byref(self.description)

    def row_type(self, dtype: torch.dtype) -> torch.dtype:
        """What native code takes rows of this type in."""
        import torch

        return torch.bfloat16 if dtype == torch.bfloat16 and self._multiplies_bf16 else torch.float32

    def kind(self, row_type: torch.dtype) -> int:
        """The number that native code has for such rows."""
        import torch

        return _INT8 if self.int8 else _BFLOAT16 if row_type == torch.bfloat16 else _FLOAT32


def multiply(x: Tensor, layer: Layer, residual: Tensor | None = None, *, up: Layer | None = None) -> Tensor:
    """x [..., K] times one layer, plus `residual`, [..., N] in the type of x; in native code.

    With `up`, a layer of the same form, silu of the product times that with `up`, and no residual. What follows the
    product is done before rounding. MemoryError where there is no room.
    """
    import torch

    library = native_library()
    assert library is not None
    row_type = layer.row_type(x.dtype)
    rows = _as_rows(x, layer.num_inputs, row_type)
    num_rows = rows.shape[0]
    out = torch.empty(num_rows, layer.num_outputs, dtype=row_type)
    how = (out.data_ptr(), layer.kind(row_type), torch.get_num_threads())
    if not num_rows:
        failed = 0
    elif up is not None:
        failed = library.packed_gated(layer.described, up.described, rows.data_ptr(), num_rows, *how)
    else:
        added = None if residual is None else _as_rows(residual, layer.num_outputs, row_type)
        place = None if added is None else added.data_ptr()
        failed = library.packed_linear(layer.described, rows.data_ptr(), num_rows, place, *how)
    _check(failed)
    if row_type != x.dtype:
        out = out.to(x.dtype)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], layer.num_outputs)


def _as_rows(tensor: Tensor, size: int, row_type: torch.dtype) -> Tensor:
    """[rows, size], contiguous; each call of torch costs as much as a few rows of a small layer."""
    if tensor.dim() != 2:
        tensor = tensor.reshape(-1, size)
    if tensor.dtype != row_type:
        tensor = tensor.to(row_type)
    return tensor.contiguous()


def experts(
    x: Tensor, chosen: Tensor, weights: Tensor, gate_up: PackedWeight, down: PackedWeight, *, int8: bool = False
) -> Tensor:
    """The routed experts of a layer: for each token the sum of `weight * down(silu(gate(x)) * up(x))` over its choice.

    x [T, H] in any floating type; `chosen` int64 and `weights` [T, top_k]; `gate_up` [E, gate and then up, H]; gives
    [T, H] in the type of x. An expert number outside 0 .. E - 1 counts for nothing. `int8` as for `linear`, for what
    goes into either projection.
    """
    import torch

    if gpu.is_served(x.device) and x.numel() and not int8:
        from pipeline.kernels.gpu.experts import experts as on_gpu

        return on_gpu(x, chosen, weights, gate_up, down)
    library = native_library() if x.device.type == "cpu" else None
    if library is None or not x.numel():
        return _experts_in_torch(x, chosen, weights, gate_up, down, int8=int8)
    into, out_of = gate_up.layer(int8=int8), down.layer(int8=int8)
    rows, top_k = x.to(into.row_type(x.dtype)).contiguous(), chosen.shape[-1]
    chosen, weights = chosen.to(torch.int64).contiguous(), weights.to(torch.float32).contiguous()
    out = torch.empty_like(rows)
    failed = library.packed_experts(
        into.described,
        out_of.described,
        rows.data_ptr(),
        len(rows),
        chosen.data_ptr(),
        weights.data_ptr(),
        top_k,
        len(gate_up.codes),
        out.data_ptr(),
        into.kind(rows.dtype),
        torch.get_num_threads(),
    )
    _check(failed)
    return out.to(x.dtype)


def _experts_in_torch(
    x: Tensor, chosen: Tensor, weights: Tensor, gate_up: PackedWeight, down: PackedWeight, *, int8: bool
) -> Tensor:
    import torch
    from torch.nn.functional import linear, silu

    x = _rounded(x, gate_up) if int8 else x
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    hit = torch.unique(chosen[(chosen >= 0) & (chosen < len(gate_up.codes))])
    for together in hit.split(_EXPERTS_AT_ONCE):
        into, out_of = dequantize(gate_up[together], x.dtype), dequantize(down[together], x.dtype)
        for place, expert in enumerate(together.tolist()):
            tokens, choice = torch.where(chosen == expert)
            gate, up = linear(x[tokens], into[place]).chunk(2, dim=-1)
            inner = silu(gate) * up
            answer = linear(_rounded(inner, down) if int8 else inner, out_of[place])
            total.index_add_(0, tokens, answer.float() * weights[tokens, choice].float().unsqueeze(-1))
    return total.to(x.dtype)


def _rounded(x: Tensor, weight: PackedWeight) -> Tensor:
    """x [..., K] as the native code rounds it for 8-bit products with a layer."""
    import torch

    step = _SLAB
    while weight.group_size % step:
        step //= 2
    slabs = x.float().unflatten(-1, (-1, step))
    most = slabs.abs().amax(-1, keepdim=True)
    numbers = (slabs * (127 / most)).round()
    return torch.where(most == 0, 0, numbers * (most / 127)).flatten(-2).to(x.dtype)


def kernel_in_use() -> str:
    """What computes on the CPU, for people."""
    library, reason = native(SOURCE)
    if library is None:
        return f"torch, much slower than native code: {reason}"
    return (
        "native code "
        + ("in float32", "with bfloat16 products", "with bfloat16 products in AMX")[library.packed_has_bf16()]
    )


@cache
def has_bfloat16() -> bool:
    """Whether native code multiplies bfloat16 rows as they are."""
    library = native_library()
    return library is not None and bool(library.packed_has_bf16())


class Description(ctypes.Structure):
    """What native code knows of a layer (`Packed` of blocks.h)."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("bits", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("stride", ctypes.c_int64),
    )


@cache
def native_library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had."""
    library = native(SOURCE).library
    if library is None:
        return None
    layer, pointer, number, switch = ctypes.POINTER(Description), ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.packed_linear.argtypes = (layer, pointer, number, pointer, pointer, switch, switch)
    library.packed_gated.argtypes = (layer, layer, pointer, number, pointer, switch, switch)
    library.packed_experts.argtypes = (
        *(layer, layer, pointer, number, pointer, pointer),
        *(number, number, pointer, switch, switch),
    )
    return library


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for the activations of packed layers")
