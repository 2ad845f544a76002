"""What a transformer does to the rows of tokens between its matrix products, each in one pass; for a CPU alone.

Every function takes contiguous float32 or bfloat16 on the CPU, computes in float32 and rounds once. Without a compiler
there are none of them (`available`); whoever asks keeps the path in torch that they replace.
"""
# pyright: basic

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.kernels.native import native

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Path(__file__).with_name("rowwise.c")


def available(tensor: Tensor) -> bool:
    """Whether these functions can be had for tensors like this one."""
    import torch

    is_served = tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.bfloat16)
    return is_served and native_library() is not None


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMS norm of x [..., size] with `weight` float32 [size]."""
    import torch

    x = x.contiguous()
    output = torch.empty_like(x)
    size = x.shape[-1]
    _loaded().norm(
        *(x.data_ptr(), weight.data_ptr(), epsilon, x.numel() // size, size, output.data_ptr()),
        *_how(x),
    )
    return output


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both [rows, size] with dense rows equally far apart; gives them contiguous."""
    import torch

    rows, size = gate.shape
    output = torch.empty(rows, size, dtype=gate.dtype)
    _loaded().gated(
        *(gate.data_ptr(), up.data_ptr(), gate.stride(0), rows, size, output.data_ptr()),
        *_how(gate),
    )
    return output


def rotate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    angles: tuple[Tensor, Tensor],
    norms: tuple[Tensor | None, Tensor | None],
    epsilon: float,
    pools: tuple[Tensor, Tensor],
    places: Tensor,
) -> Tensor:
    """Rotary positions: gives the queries [rows, heads, size], and puts keys and values into their places in the pools.

    `query`, `key` and `value` are [rows, heads * size] with dense rows; `angles` are cosines and sines
    [.., rows, rotated], the halves of a head's first `rotated` numbers being pairs (GPT-NeoX); `norms` are weights
    float32 [size] of an RMS norm of each head before that, or None. `pools` are [.., key heads, size], `places` int64
    [rows].
    """
    import torch

    cosine, sine = (angle.contiguous() for angle in angles)
    keys, values = pools
    key_heads, size = keys.shape[1:]
    rows, heads = query.shape[0], query.shape[1] // size
    output = torch.empty(rows, heads, size, dtype=query.dtype)
    query_norm, key_norm = (None if weight is None else weight.data_ptr() for weight in norms)
    rotation = _Rotation(
        *(query.data_ptr(), key.data_ptr(), value.data_ptr(), cosine.data_ptr(), sine.data_ptr()),
        *(query_norm, key_norm, places.data_ptr(), output.data_ptr(), keys.data_ptr(), values.data_ptr()),
        *(query.stride(0), key.stride(0), value.stride(0)),
        *(rows, heads, key_heads, size, cosine.shape[-1], epsilon),
    )
    _loaded().rotate(ctypes.byref(rotation), *_how(query))
    return output


def best(scores: Tensor) -> Tensor:
    """The first of the largest of each of the rows [rows, size], int64 [rows].

    -1 where that is infinite, or where a number of the row is none.
    """
    import torch

    scores = scores.contiguous()
    index = torch.empty(len(scores), dtype=torch.int64)
    _loaded().best(scores.data_ptr(), *scores.shape, index.data_ptr(), *_how(scores))
    return index


def _how(tensor: Tensor) -> tuple[bool, int]:
    import torch

    return tensor.dtype == torch.bfloat16, torch.get_num_threads()


class _Rotation(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "cosine", "sine", "query_norm", "key_norm")),
        *((name, ctypes.c_void_p) for name in ("places", "out", "keys", "values")),
        *((name, ctypes.c_int64) for name in ("query_stride", "key_stride", "value_stride")),
        *((name, ctypes.c_int64) for name in ("rows", "heads", "key_heads", "size", "rotated")),
        ("epsilon", ctypes.c_float),
    )


def _loaded() -> ctypes.CDLL:
    library = native_library()
    assert library is not None  # `available` has said so
    return library


@cache
def native_library() -> ctypes.CDLL | None:
    """The compiled functions, or None where they cannot be had."""
    library = native(SOURCE).library
    if library is None:
        return None
    pointer, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    how = (ctypes.c_int, number)
    library.norm.argtypes = (pointer, pointer, real, number, number, pointer, *how)
    library.gated.argtypes = (pointer, pointer, number, number, number, pointer, *how)
    library.rotate.argtypes = (pointer, *how)
    library.best.argtypes = (pointer, number, number, pointer, *how)
    return library
