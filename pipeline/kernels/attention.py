"""Attention of new tokens of several sequences, each to its own context: by kernels for CPUs or GPUs, or in torch."""
# pyright: basic

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.kernels import gpu
from pipeline.kernels.native import native

if TYPE_CHECKING:
    import torch

SOURCE = Path(__file__).with_name("attention.c")
ALIKE_TOKENS = 32  # whole tiles of the native code
MOST_SIZE, MOST_GROUP = 512, 64  # of a head, and of heads that share a key head, that native code has room for


def attend_one(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    sliding_window: int | None,
    alike: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the last token of each of several sequences to all of its own.

    `query` [rows, heads, size]; `keys` and `values` [pool, key heads, size]; `starts` and `lengths` int64 [rows].
    Returns [rows, heads, value size]. What the pool holds elsewhere has no influence on a row.

    `alike` int64 [rows, 2], contiguous: where in the pool the same numbers lie that a row has in its first places, and
    in how many of them, a multiple of `ALIKE_TOKENS`. They may be read there, which for rows that name one place is
    faster; the result is the same bit by bit.
    """
    if gpu.is_served(query.device):
        from pipeline.kernels.gpu.attention import attend_one as on_gpu

        return on_gpu(query, keys, values, starts, lengths, scale, sliding_window)
    library = _library(query, keys, values)
    if library is None:
        return attend_one_in_torch(query, keys, values, starts, lengths, scale, sliding_window)
    import torch

    query = query.contiguous()
    output = torch.empty_like(query)
    failed = library.attend_one(
        *(tensor.data_ptr() for tensor in (query, keys, values, starts, lengths)),
        None if alike is None else alike.data_ptr(),
        len(query),
        *_shape(query, keys),
        scale,
        sliding_window or 0,
        output.data_ptr(),
        query.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    if failed:  # larger heads than the native code has room for
        return attend_one_in_torch(query, keys, values, starts, lengths, scale, sliding_window)
    return output


def attend_prompts(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    spans: torch.Tensor,
    scale: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """Causal attention of consecutive tokens of each of several sequences to all of its own up to each.

    `query` [tokens, heads, size]; `keys` and `values` [pool, key heads, size], the new tokens' own among them. `spans`
    int64 [sequences, 4]: the first of a sequence's tokens in `query` and how many they are, the start of its room in
    the pool and how many tokens lie there before these. Returns [tokens, heads, value size]; tokens of no span are
    left as they come. A token's result depends on its own sequence alone, not on how it is cut into spans.
    """
    if gpu.is_served(query.device):
        from pipeline.kernels.gpu.attention import attend_prompts as on_gpu

        return on_gpu(query, keys, values, spans, scale, sliding_window)
    library = _library(query, keys, values)
    if library is None:
        return attend_prompts_in_torch(query, keys, values, spans, scale, sliding_window)
    import torch

    query = query.contiguous()
    output = torch.empty_like(query)
    failed = library.attend_prompts(
        *(tensor.data_ptr() for tensor in (query, keys, values, spans)),
        len(spans),
        *_shape(query, keys),
        scale,
        sliding_window or 0,
        output.data_ptr(),
        query.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    if failed:
        return attend_prompts_in_torch(query, keys, values, spans, scale, sliding_window)
    return output


def _shape(query: torch.Tensor, keys: torch.Tensor) -> tuple[int, int, int]:
    return query.shape[1], keys.shape[1], query.shape[2]


def _library(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> ctypes.CDLL | None:
    """The compiled functions, None where there are none for numbers of this type."""
    import torch

    if query.device.type != "cpu" or keys.shape != values.shape or query.dtype not in (torch.float32, torch.bfloat16):
        return None
    return native_library()


@cache
def native_library() -> ctypes.CDLL | None:
    """The compiled functions, or None where they cannot be had."""
    library = native(SOURCE).library
    if library is None:
        return None
    pointer, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    library.attend_one.argtypes = (*[pointer] * 6, *[number] * 4, real, number, pointer, ctypes.c_int, number)
    library.attend_prompts.argtypes = (*[pointer] * 4, *[number] * 4, real, number, pointer, ctypes.c_int, number)
    return library


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


def attend_prompts_in_torch(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    spans: torch.Tensor,
    scale: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """As `attend_prompts`, one sequence after the other."""
    output = query.new_empty(*query.shape[:2], values.shape[-1])
    for first, num_tokens, start, num_before in spans.tolist():
        own, end = slice(first, first + num_tokens), start + num_before + num_tokens
        output[own] = _attend_causally(
            query[own], keys[start:end], values[start:end], num_before, scale, sliding_window
        )
    return output


def _attend_causally(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    num_before: int,
    scale: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """Attention of the last tokens [n, heads, size] of a sequence to all of it [num_before + n, key heads, size]."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    num_tokens, num_keys = len(query), len(keys)
    windowed = sliding_window is not None and num_keys > sliding_window
    mask = None
    if num_before or windowed:
        mask = torch.ones(num_tokens, num_keys, dtype=torch.bool, device=query.device).tril(num_before)
        if sliding_window is not None and windowed:
            mask = mask.triu(num_before - sliding_window + 1)
    output = scaled_dot_product_attention(
        *(tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, keys, values)),
        attn_mask=mask,
        is_causal=mask is None and num_tokens > 1,
        scale=scale,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    return output[0].transpose(0, 1)
