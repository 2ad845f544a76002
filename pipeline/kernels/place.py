"""Weights put into the blocks of 32 outputs that the kernels multiply: matrices of a checkpoint, and plain ones."""
# pyright: basic

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.kernels.native import native
from pipeline.kernels.packed import BLOCK

if TYPE_CHECKING:
    from torch import Tensor

_SOURCE = Path(__file__).with_name("place.c")


def in_blocks(matrix: Tensor) -> Tensor:
    """[..., R, N] as [..., N / 32, R, 32]: a matrix of the checkpoint (`qweight`, `scales`) in the kernels' order."""
    return matrix.unflatten(-1, (-1, BLOCK)).transpose(-3, -2).contiguous()


def place(staged: Tensor, offsets: Tensor, targets: Tensor, rows: Tensor, columns: Tensor, sizes: Tensor) -> int | None:
    """Copy matrices out of raw bytes into blocks of 32 columns; the first matrix at fault, if any.

    Each argument but `staged` (uint8) is int64 [count]: where a matrix begins, the address it goes to, its sides and
    the bytes of an element, 4 or 2. Size 0 stands for a matrix of words that must all be the number in `targets`.
    """
    arguments = (staged, offsets, targets, rows, columns, sizes)
    library = native_library()
    if library is None:
        return _place_in_torch(*arguments)
    at = library.packed_place(len(offsets), *(tensor.data_ptr() for tensor in arguments))
    return None if at < 0 else at


def _place_in_torch(staged: Tensor, *lists: Tensor) -> int | None:
    import torch

    for index, (offset, target, rows, columns, size) in enumerate(zip(*map(torch.Tensor.tolist, lists), strict=True)):
        matrix = staged[offset : offset + rows * columns * (size or 4)].view(torch.int16 if size == 2 else torch.int32)
        if size:
            blocks = in_blocks(matrix.view(rows, columns))
            ctypes.memmove(target, blocks.data_ptr(), blocks.nbytes)
        elif not (matrix == target).all():
            return index
    return None


def plain_in_blocks(weight: Tensor, bits: int) -> Tensor | None:
    """A float32 matrix [N, K] in native code as int32 [N / 32 rounded up, K * bits / 32, 32].

    As bfloat16 (16 bits, of even K) or as it is (32 bits); None where a weight would lose something.
    """
    import torch

    library, weight = native_library(), weight.contiguous()
    assert library is not None
    num_outputs, num_inputs = weight.shape
    blocks = torch.empty(-(-num_outputs // BLOCK), num_inputs * bits // 32, BLOCK, dtype=torch.int32)
    matrix = (weight.data_ptr(), num_outputs, num_inputs, bits)
    return None if library.plain_place(*matrix, blocks.data_ptr(), torch.get_num_threads()) else blocks


@cache
def native_library() -> ctypes.CDLL | None:
    """The compiled functions, or None where they cannot be had."""
    library = native(_SOURCE).library
    if library is not None:
        pointer, number, switch = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        library.packed_place.argtypes = (number, *[pointer] * 6)
        library.packed_place.restype = number
        library.plain_place.argtypes = (pointer, number, number, switch, pointer, switch)
    return library
