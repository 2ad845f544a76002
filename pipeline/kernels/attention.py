"""Attention of one new token of each of several sequences to its own context: native on a CPU, in torch elsewhere."""
# pyright: basic

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.kernels.native import native

if TYPE_CHECKING:
    import torch

SOURCE = Path(__file__).with_name("attention.c")


def attend_one(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """Attention of the last token of each of several sequences to all of its own.

    `query` [rows, heads, size]; `keys` and `values` [pool, key heads, size]; `starts` and `lengths` int64 [rows].
    Returns [rows, heads, value size]. What the pool holds elsewhere has no influence on a row.
    """
    function = _native_function(query, keys, values)
    if function is None:
        return attend_one_in_torch(query, keys, values, starts, lengths, scale, sliding_window)
    import torch

    query = query.contiguous()
    output = torch.empty_like(query)
    tensors = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (query, keys, values, starts, lengths)]
    rows, heads, size = query.shape
    shape = [ctypes.c_int64(number) for number in (rows, heads, keys.shape[1], size)]
    failed = function(
        *tensors,
        *shape,
        ctypes.c_float(scale),
        ctypes.c_int64(sliding_window or 0),
        ctypes.c_void_p(output.data_ptr()),
        ctypes.c_int64(torch.get_num_threads()),
    )
    if failed:  # larger heads than the native code has room for
        return attend_one_in_torch(query, keys, values, starts, lengths, scale, sliding_window)
    return output


def _native_function(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Any:
    """The compiled function for numbers of this type, None where there is none."""
    import torch

    if query.device.type != "cpu" or keys.shape != values.shape:
        return None
    library = native(SOURCE).library
    names = {torch.float32: "attend_float32", torch.bfloat16: "attend_bfloat16"}
    if library is None or query.dtype not in names:
        return None
    return getattr(library, names[query.dtype])


def attend_one_in_torch(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """Attention of the last token of each of several sequences to all of its own.

    `query` [rows, heads, size]; `keys` and `values` [pool, key heads, size]; `starts` and `lengths` int64 [rows].
    Returns [rows, heads, value size].
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    longest = int(lengths.max())
    columns = torch.arange(longest, device=query.device)
    mask = columns < lengths[:, None]
    if sliding_window is not None:
        mask &= columns >= lengths[:, None] - sliding_window
    # Beyond its end a sequence sees its own last place again: what lies there may be no number, and 0 x NaN is NaN.
    places = starts[:, None] + columns.minimum(lengths[:, None] - 1)
    rows, heads, size = query.shape
    key_heads = keys.shape[1]
    output = scaled_dot_product_attention(
        query.reshape(rows, key_heads, heads // key_heads, size),  # query heads that share a key head are its queries
        keys[places].transpose(1, 2),
        values[places].transpose(1, 2),
        attn_mask=mask[:, None, None],
        scale=scale,
    )
    return output.reshape(rows, heads, -1)
