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

    def layer(self) -> packed.Layer:
        """For native code."""
        return packed.Layer(self.blocks, None, self.num_outputs, self.num_inputs, self.bits)


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


def plain_linear(x: Tensor, weight: PlainWeight) -> Tensor:
    """x [..., K] float32 or bfloat16 times the layer: [..., N] in the type of x. Call it only where `is_served`."""
    return packed.multiply(x, weight.layer())


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
    layer = packed.Layer(weight, None, num_outputs, num_inputs, bits_of[weight.dtype], weight.stride(0))
    return packed.multiply(x, layer)
