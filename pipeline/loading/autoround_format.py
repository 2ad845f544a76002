"""The packed tensors of an AutoRound checkpoint (`packing_format: auto_round:auto_gptq`): how they are made and read.

A linear layer of K inputs and N outputs, stored with `bits` bits in groups of `group_size` inputs, is three tensors:

    qweight  int32   [K * bits / 32, N]           codes of one output run down a column, 32 / bits to a word, the first
                                                  input in the lowest bits
    scales   float16 [K / group_size, N]
    qzeros   int32   [K / group_size, N * bits / 32]   the code that stands for zero, minus one, packed along the row

and its weight is `weight[n, k] = (code[k, n] - zero[k // group_size, n]) * scales[k // group_size, n]`. A symmetric
layer has `zero = 2 ** (bits - 1)` everywhere. Source: `pack_248_bits` and `forward` of auto-round 0.16's
`auto_round_extension/torch/qlinear_torch_zp.py`. All functions take leading dimensions, so that the experts of a layer
are packed or read in one call.
"""
# pyright: basic

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PACKABLE_BITS = (2, 4, 8)  # the sizes of which a word holds a whole number
_WORD_BITS = 32
_SMALLEST_SCALE = 1e-5  # auto-round's own bound; a group of zeros needs a scale too


class PackedLinear(NamedTuple):
    """The three tensors of one layer, or of a stack of layers of one shape."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor

    @property
    def bits(self) -> int:
        """Told by `qzeros`, which has as many columns of values as `scales`."""
        return self.qzeros.shape[-1] * _WORD_BITS // self.scales.shape[-1]

    def named(self, layer: str) -> dict[str, Tensor]:
        """The tensors under the names that they have in a checkpoint."""
        return {f"{layer}.{name}": tensor for name, tensor in self._asdict().items()}


def quantize_symmetric(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Round a weight to the nearest code, each group scaled by its value of largest magnitude, whose code is 0.

    Takes a floating weight [..., N, K]; gives codes uint8 [..., N, K] and scales float16 [..., N, K / group_size]. A
    scale may be negative, so that the largest magnitude always lies at the end of the range that has one code more.
    This is auto-round's `rtn_int_sym`. Raises ValueError where the group size does not divide K.
    """
    import torch

    if bits not in PACKABLE_BITS or weight.shape[-1] % group_size:
        raise ValueError(f"{weight.shape[-1]} inputs cannot be stored with {bits} bits in groups of {group_size}")
    groups = weight.float().unflatten(-1, (-1, group_size))
    lowest, highest = -groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    extreme = torch.where(highest < lowest, lowest, -highest)
    zero = 1 << (bits - 1)
    scales = (extreme / zero).to(torch.float16)
    scales = torch.where(scales < 0, scales.clamp(max=-_SMALLEST_SCALE), scales.clamp(min=_SMALLEST_SCALE))
    codes = groups.div(scales.float().unsqueeze(-1)).round_().clamp_(-zero, zero - 1).add_(zero)
    return codes.flatten(-2).to(torch.uint8), scales


def pack_symmetric(weight: Tensor, bits: int, group_size: int) -> PackedLinear:
    """Quantize a floating weight [..., N, K] and pack it; N and K must be multiples of 32. Raises ValueError."""
    codes, scales = quantize_symmetric(weight, bits, group_size)
    qzeros = _pack_words(_stored_zeros(scales.mT, bits), bits)
    return PackedLinear(_pack_words(codes, bits).mT.contiguous(), qzeros, scales.mT.contiguous())


def dequantize(packed: PackedLinear, dtype: torch.dtype) -> Tensor:
    """The weight [..., N, K]: exact in float32, rounded once to anything smaller."""
    import torch

    bits = packed.bits
    codes = _unpack_words(packed.qweight.mT, bits)
    zeros = _unpack_words(packed.qzeros, bits).mT.float() + 1
    scales = packed.scales.mT.float()
    group_size = codes.shape[-1] // scales.shape[-1]
    # A difference of small whole numbers is exact in float32, and computed without a copy of the codes in that type.
    centred = torch.sub(codes.unflatten(-1, (-1, group_size)), zeros.unsqueeze(-1))
    return centred.mul_(scales.unsqueeze(-1)).flatten(-2).to(dtype)


def _stored_zeros(like: Tensor, bits: int) -> Tensor:
    import torch

    return torch.full(like.shape, (1 << (bits - 1)) - 1, dtype=torch.uint8)


def _pack_words(values: Tensor, bits: int) -> Tensor:
    """Values uint8 [..., n] as int32 [..., n * bits / 32], the first in the lowest bits."""
    import torch

    per_word = _WORD_BITS // bits
    if values.shape[-1] % _WORD_BITS:
        raise ValueError(f"{values.shape[-1]} values of {bits} bits do not fill words; a multiple of 32 does")
    shifts = torch.arange(0, _WORD_BITS, bits, dtype=torch.int32)
    words = values.unflatten(-1, (-1, per_word)).to(torch.int32) << shifts
    # The bits of the summands do not overlap, so that the sum is their union and cannot overflow.
    return words.sum(-1, dtype=torch.int32)


def _unpack_words(words: Tensor, bits: int) -> Tensor:
    """The inverse: int32 [..., n * bits / 32] as uint8 [..., n]."""
    import torch

    values = words.contiguous().view(torch.uint8)  # the lowest byte first, as on all processors that matter here
    if bits == 8:
        return values
    parts = [(values >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return torch.stack(parts, -1).flatten(-2)
