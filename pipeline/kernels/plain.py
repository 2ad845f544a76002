"""Products with plain weights that lie in blocks, as the packed ones do, for processors without bfloat16 arithmetic.

The layout is that of `packed.c`: `blocks` int32 [N / 32 rounded up, K * bits / 32, 32], where a word holds two
bfloat16 numbers that follow each other in K (bits 16) or one float32 (bits 32). All is computed in float32, and each
row is summed in one order whatever is beside it.
"""
# pyright: basic

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pipeline.kernels import packed

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
    """Whether there is a kernel for plain weights in blocks; without one torch's own layout serves torch better."""
    return packed.native_library() is not None


def in_plain_blocks(weight: Tensor) -> PlainWeight:
    """A float32 matrix [N, K] as blocks: as bfloat16 where that loses nothing, which halves what a step reads.

    Call it only where `is_served`.
    """
    import torch

    library, weight = packed.native_library(), weight.contiguous()
    assert library is not None
    num_outputs, num_inputs = weight.shape
    for bits in (16, 32):
        if num_inputs * bits % 32 == 0:
            num_blocks = -(-num_outputs // packed.BLOCK)
            blocks = torch.empty(num_blocks, num_inputs * bits // 32, packed.BLOCK, dtype=torch.int32)
            matrix = (weight.data_ptr(), num_outputs, num_inputs, bits)
            if not library.plain_place(*matrix, blocks.data_ptr(), torch.get_num_threads()):
                return PlainWeight(blocks, num_outputs, bits)
    raise AssertionError("float32 as it is loses nothing")


def plain_linear(x: Tensor, weight: PlainWeight) -> Tensor:
    """x [..., K] float32 times the layer: [..., N] float32. Call it only where `is_served`."""
    import torch

    rows = x.reshape(-1, weight.num_inputs).contiguous()
    out = torch.empty(len(rows), weight.num_outputs)
    if len(rows):
        packed.multiply(weight.blocks, None, weight.num_outputs, weight.num_inputs, weight.bits, rows, out)
    return out.view(*x.shape[:-1], weight.num_outputs)
