"""Attention of packed steps on a GPU: a tile of queries goes over its own sequence's keys, block by block.

Softmax is kept running (Dao et al. 2022, "FlashAttention"): the greatest score so far, and sums relative to it. Query
heads that share a key head are rows of one tile, so that keys are read once for all of them.
"""
# pyright: basic, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from pipeline.kernels.gpu import on_device_of, power_of_two

if TYPE_CHECKING:
    from torch import Tensor

_LEAST_TILE = 16  # rows, what a tensor core takes
_PROMPT_TILE = 64
_FEW_SPANS = 32  # that are compiled for together
_TILE_BYTES = 32768  # of a block of keys


def attend_one(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    """As `pipeline.kernels.attention.attend_one`."""
    rows = query.shape[1] // keys.shape[1]
    tile = max(_LEAST_TILE, power_of_two(rows))
    return _attend(query, keys, values, starts, lengths, len(query), tile, scale, sliding_window, one=True)


def attend_prompts(
    query: Tensor, keys: Tensor, values: Tensor, spans: Tensor, scale: float, sliding_window: int | None
) -> Tensor:
    """As `pipeline.kernels.attention.attend_prompts`."""
    most = len(query) * (query.shape[1] // keys.shape[1]) // _PROMPT_TILE + len(spans)
    return _attend(query, keys, values, spans, spans, most, _PROMPT_TILE, scale, sliding_window, one=False)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    num_tiles: int,
    tile: int,
    scale: float,
    sliding_window: int | None,
    *,
    one: bool,
) -> Tensor:

    query = query.contiguous()
    heads, size, value_size = query.shape[1], query.shape[2], values.shape[2]
    output = query.new_empty(*query.shape[:2], value_size)
    width = power_of_two(max(size, value_size, 16))
    block = max(16, min(128, power_of_two(_TILE_BYTES // (width * query.element_size()))))
    with on_device_of(query):
        kernel: Any = _attend_tile[(num_tiles, keys.shape[1])]
        kernel(
            query,
            keys,
            values,
            starts,
            lengths,
            output,
            scale,
            sliding_window or 0,
            len(starts),
            ONE=one,
            SPANS=1 if one else power_of_two(max(_FEW_SPANS, len(starts))),
            HEADS=heads,
            SHARING=heads // keys.shape[1],
            SIZE=size,
            VALUE_SIZE=value_size,
            WIDTH=width,
            TILE=tile,
            BLOCK=block,
            num_warps=4,
            num_stages=2,
        )
    return output


@triton.jit(do_not_specialize=["window", "num_spans"])
def _attend_tile(
    query,  # [tokens, HEADS, SIZE]
    keys,  # [pool, HEADS / SHARING, SIZE]
    values,  # [pool, HEADS / SHARING, VALUE_SIZE]
    starts,  # [sequences], or [sequences, 4]: spans
    lengths,  # [sequences], or the same spans
    output,  # [tokens, HEADS, VALUE_SIZE]
    scale,
    window,
    num_spans,
    ONE: tl.constexpr,
    SPANS: tl.constexpr,
    HEADS: tl.constexpr,
    SHARING: tl.constexpr,
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    number, key_head = tl.program_id(0), tl.program_id(1)
    rows = tl.arange(0, TILE)  # queries of the key head, head by head within token by token
    if ONE:
        first, num_tokens = number.to(tl.int64), 1
        start, before = tl.load(starts + number), tl.load(lengths + number) - 1
    else:
        numbers = tl.arange(0, SPANS)
        counts = tl.load(starts + numbers * 4 + 1, mask=numbers < num_spans, other=0)
        tiles = (counts * SHARING + TILE - 1) // TILE
        ends = tl.cumsum(tiles, 0)
        span = tl.sum((ends <= number).to(tl.int32), 0)
        if span >= num_spans:
            return
        rows += (number - tl.sum(tl.where(numbers < span, tiles, 0), 0)).to(tl.int32) * TILE
        first, num_tokens = tl.load(starts + span * 4), tl.load(starts + span * 4 + 1)
        start, before = tl.load(starts + span * 4 + 2), tl.load(starts + span * 4 + 3)
    tokens = rows // SHARING
    heads = key_head * SHARING + rows % SHARING
    valid = tokens < num_tokens
    places = before + tokens  # within the sequence
    columns = tl.arange(0, WIDTH)
    lines = (first + tokens) * HEADS + heads
    asked = tl.load(
        query + lines[:, None] * SIZE + columns[None, :], mask=valid[:, None] & (columns < SIZE)[None, :], other=0.0
    )
    last = before + tl.minimum(tl.max(tokens, 0), num_tokens - 1)
    begin = last * 0
    if window > 0:
        begin = tl.maximum(before + tl.min(tokens, 0) - window + 1, 0)
    greatest = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    mixed = tl.zeros((TILE, WIDTH), tl.float32)
    for at in range(begin, last + 1, BLOCK):
        seen = at + tl.arange(0, BLOCK)
        lines_seen = (start + seen) * (HEADS // SHARING) + key_head
        # What lies beyond the sequence may be no number, and 0 x NaN is NaN: it is not read.
        key = tl.load(
            keys + lines_seen[None, :] * SIZE + columns[:, None],
            mask=(seen <= last)[None, :] & (columns < SIZE)[:, None],
            other=0.0,
        )
        scores = tl.dot(asked, key, input_precision="ieee") * (scale * 1.4426950408889634)  # for powers of two
        visible = seen[None, :] <= places[:, None]
        if window > 0:
            visible &= seen[None, :] > places[:, None] - window
        scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(greatest, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(greatest - base)
        shares = tl.exp2(scores - base[:, None])
        value = tl.load(
            values + lines_seen[:, None] * VALUE_SIZE + columns[None, :],
            mask=(seen <= last)[:, None] & (columns < VALUE_SIZE)[None, :],
            other=0.0,
        )
        total = total * shrink + tl.sum(shares, 1)
        mixed = mixed * shrink[:, None] + tl.dot(shares.to(value.dtype), value, input_precision="ieee")
        greatest = higher
    out = mixed / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(
        output + lines[:, None] * VALUE_SIZE + columns[None, :],
        out.to(output.dtype.element_ty),
        mask=valid[:, None] & (columns < VALUE_SIZE)[None, :],
    )
