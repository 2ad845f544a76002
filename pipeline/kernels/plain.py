"""Products with plain weights: in blocks, as packed ones lie, or as torch has them.

The layout is that of `blocks.h`: `blocks` int32 [N / 32 rounded up, K * bits / 32, 32], where a word holds two
bfloat16 numbers that follow each other in K (bits 16) or one float32 (bits 32). Sums are float32, of products of two
bfloat16 numbers at a time where rows and weights are such and the processor has instructions for that; and each row is
summed in one order whatever is beside it, in both layouts the same: bit for bit, whatever the number of rows, a row's
place among them and the number of threads. Libraries that choose a kernel by the sizes of matrices promise none of
that.
"""
# pyright: basic

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pipeline.kernels import packed, place

if TYPE_CHECKING:
    from torch import Tensor


class PlainWeight(NamedTuple):
    """A linear layer that is not quantized."""

    blocks: Tensor
    num_outputs: int
    bits: int  # of a weight: 16 or 32

    @property
    def num_inputs(self) -> int:
        return self.blocks.shape[1] * 32 // self.bits


def is_served() -> bool:
    """Whether there is a kernel for plain weights; without one torch's own layout serves torch better."""
    return packed.native_library() is not None and place.native_library() is not None


def in_plain_blocks(weight: Tensor) -> PlainWeight:
    """A matrix [N, K], float32 or bfloat16, as blocks: as bfloat16 where that loses nothing, half of what a step reads.

    Call it only where `is_served`.
    """
    import torch

    num_outputs, num_inputs = weight.shape
    weight = weight.contiguous()
    if weight.dtype == torch.bfloat16 and num_inputs % 2 == weight.storage_offset() % 2 == 0:
        words = place.plain_in_blocks(weight.view(torch.float32), 32)  # two numbers are a word of a block as they lie
        assert words is not None
        return PlainWeight(words, num_outputs, 16)
    for bits in (16, 32):
        if num_inputs * bits % 32 == 0:
            blocks = place.plain_in_blocks(weight.float(), bits)
            if blocks is not None:
                return PlainWeight(blocks, num_outputs, bits)
    raise AssertionError("float32 as it is loses nothing")


def plain_linear(x: Tensor, weight: PlainWeight, residual: Tensor | None = None) -> Tensor:
    """x [..., K] float32 or bfloat16 times the layer, plus `residual`: [..., N], both in the type of x.

    The sum with `residual` is rounded once. Call it only where `is_served`.
    """
    return _rows_times(x, weight.blocks, weight.num_outputs, weight.num_inputs, weight.bits, residual=residual)


def plain_gated(x: Tensor, weight: PlainWeight) -> Tensor:
    """silu(gate) * up, [..., N / 2] in the type of x, which are the halves of x [..., K] times the layer.

    Rounded once; each half is a multiple of 32. Call it only where `is_served`.
    """
    return _rows_times(x, weight.blocks, weight.num_outputs, weight.num_inputs, weight.bits, gates=True)


def matrix_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] times weight [N, K], both float32 or bfloat16 on a CPU: [..., N] in the type of x.

    A matrix that is used again and again is better put in blocks. Call it only where `is_served`. Raises TypeError for
    other types.
    """
    import torch

    bits_of = {torch.float32: 32, torch.bfloat16: 16}
    if weight.dtype not in bits_of or x.dtype not in bits_of:
        raise TypeError(f"a product of {x.dtype} and {weight.dtype}")
    if weight.stride(1) != 1 or weight.stride(0) < 1:
        weight = weight.contiguous()
    num_outputs, num_inputs = weight.shape
    return _rows_times(x, weight, num_outputs, num_inputs, bits_of[weight.dtype], stride=weight.stride(0))


def _rows_times(
    x: Tensor,
    weight: Tensor,
    num_outputs: int,
    num_inputs: int,
    bits: int,
    *,
    residual: Tensor | None = None,
    gates: bool = False,
    stride: int = 0,
) -> Tensor:
    import torch

    in_pairs = x.dtype == torch.bfloat16 and bits == 16 and num_inputs % 2 == 0 and packed.has_bfloat16()
    dtype = torch.bfloat16 if in_pairs else torch.float32

    def as_rows(tensor: Tensor, size: int) -> Tensor:  # each call of torch costs as much as a few rows of a small layer
        rows = tensor if tensor.dim() == 2 else tensor.reshape(-1, size)
        return (rows if rows.dtype == dtype else rows.to(dtype)).contiguous()

    rows = as_rows(x, num_inputs)
    out = torch.empty(rows.shape[0], num_outputs // 2 if gates else num_outputs, dtype=dtype)
    if rows.shape[0]:
        added = None if residual is None else as_rows(residual, num_outputs)
        packed.multiply(
            *(weight, None, num_outputs, num_inputs, bits, rows, out), residual=added, gates=gates, stride=stride
        )
    out = out if out.dtype == x.dtype else out.to(x.dtype)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[1])
