"""Linear layers whose rows never depend on what is computed beside them, bit for bit; weights as torch lays them."""
# pyright: basic

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.kernels.native import native

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Path(__file__).with_name("row_linear.c")


def row_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] times weight [N, K], both float32 or bfloat16 on a CPU: [..., N] in the type of x.

    Sums are float32. Every number of the result is summed in one order, whatever the number of rows, a row's place
    among them and the number of threads. Call it only where `is_available`. Raises TypeError for other types.
    """
    import torch

    library = _library()
    assert library is not None
    functions = {torch.float32: library.row_linear_float32, torch.bfloat16: library.row_linear_bfloat16}
    if weight.dtype not in functions or x.dtype not in functions:
        raise TypeError(f"a product of {x.dtype} and {weight.dtype}")
    num_outputs, num_inputs = weight.shape
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    rows = x.reshape(-1, num_inputs).to(torch.float32).contiguous()
    out = torch.empty(len(rows), num_outputs)
    functions[weight.dtype](
        rows.data_ptr(),
        weight.data_ptr(),
        weight.stride(0),
        num_inputs,
        len(rows),
        num_outputs,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out.to(x.dtype).view(*x.shape[:-1], num_outputs)


def is_available() -> bool:
    """Whether there is a compiler, or the kernel compiled before."""
    return _library() is not None


@cache
def _library() -> ctypes.CDLL | None:
    library = native(SOURCE).library
    if library is not None:
        pointer, number, switch = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        for function in (library.row_linear_float32, library.row_linear_bfloat16):
            function.argtypes = (pointer, pointer, number, number, number, number, pointer, switch)
            function.restype = None
    return library
