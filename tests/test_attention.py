"""Native attention of single tokens equals that of torch, and no row sees what is not its own."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.kernels import attention
from pipeline.kernels.attention import (
    ALIKE_TOKENS,
    attend_one,
    attend_one_in_torch,
    attend_prompts,
    attend_prompts_in_torch,
)
from pipeline.kernels.native import native

needs_compiler = pytest.mark.skipif(native(attention.SOURCE).library is None, reason="no C compiler")
lengths_of_rows = st.lists(st.integers(1, 130), min_size=1, max_size=6)


def pool(lengths: list[int], heads: int, key_heads: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Query, keys, values, starts and lengths, with gaps of NaN between the sequences."""
    torch.manual_seed(len(lengths))
    gap = 5
    starts = [gap + sum(lengths[:row]) + gap * row for row in range(len(lengths))]
    keys, values = (torch.full((starts[-1] + lengths[-1] + gap, key_heads, size), math.nan) for _ in range(2))
    for start, length in zip(starts, lengths, strict=True):
        keys[start : start + length] = torch.randn(length, key_heads, size)
        values[start : start + length] = torch.randn(length, key_heads, size)
    query = torch.randn(len(lengths), heads, size)
    numbers = [tensor.to(dtype) for tensor in (query, keys, values)]
    return *numbers, torch.tensor(starts), torch.tensor(lengths)


@needs_compiler
@given(lengths_of_rows, st.sampled_from([(9, 3), (4, 4), (8, 1)]), st.sampled_from([8, 20, 64]), st.integers(0, 60))
def test_native_attention_is_that_of_float32_mathematics(
    lengths: list[int], heads: tuple[int, int], size: int, window: int
) -> None:
    query, keys, values, starts, counts = pool(lengths, *heads, size, torch.float32)
    found = attend_one(query, keys, values, starts, counts, size**-0.5, window or None)
    for row, (start, length) in enumerate(zip(starts.tolist(), lengths, strict=True)):
        first = start + (max(0, length - window) if window else 0)
        own_keys = keys[first : start + length].repeat_interleave(heads[0] // heads[1], dim=1).double()
        own_values = values[first : start + length].repeat_interleave(heads[0] // heads[1], dim=1).double()
        scores = torch.einsum("hd,thd->ht", query[row].double(), own_keys) * size**-0.5
        expected = torch.einsum("ht,thd->hd", scores.softmax(dim=-1), own_values)
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("heads", [(6, 2), (32, 8), (18, 2), (20, 1)])  # 16 heads may be lanes of one register
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("size", [24, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_attention_and_torch_round_alike(
    dtype: torch.dtype, size: int, window: int | None, heads: tuple[int, int]
) -> None:
    numbers = pool([1, 16, 33, 64, 100], *heads, size, dtype)
    found, expected = (attend(*numbers, 0.2, window) for attend in (attend_one, attend_one_in_torch))
    assert found.dtype == dtype
    eps = max(torch.finfo(dtype).eps, 1e-6)  # float32 sums have another order
    torch.testing.assert_close(found, expected, rtol=2 * eps, atol=4 * eps)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_bit_by_bit_the_same_in_any_company(dtype: torch.dtype) -> None:
    query, keys, values, starts, lengths = pool([90, 3, 41, 128] * 4, 20, 4, 32, dtype)
    together = attend_one(query, keys, values, starts, lengths, 0.2, None)
    for row in range(16):
        one = slice(row, row + 1)
        alone = attend_one(query[one], keys, values, starts[one], lengths[one], 0.2, None)
        assert torch.equal(alone[0], together[row])


@needs_compiler
@pytest.mark.parametrize("heads", [(6, 2), (8, 8)])
@pytest.mark.parametrize("size", [24, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_places_alike_are_read_where_another_has_them(dtype: torch.dtype, size: int, heads: tuple[int, int]) -> None:
    lengths = [200, 33, 97, 70, 130] * 3  # many rows and few are distributed in other ways
    query, keys, values, starts, counts = pool(lengths, *heads, size, dtype)
    num_alike = [length // ALIKE_TOKENS * ALIKE_TOKENS for length in lengths]
    num_alike[3::5] = [0] * 3
    alike = torch.tensor([[int(starts[0]), count] for count in num_alike])
    for pools in (keys, values):
        for start, count in zip(starts.tolist(), num_alike, strict=True):
            pools[start : start + count] = pools[starts[0] : starts[0] + count]
    whole = [attend_one(query, keys, values, starts, counts, 0.2, window) for window in (None, 300, 45)]
    assert torch.equal(attend_one(query, keys, values, starts, counts, 0.2, 45, alike), whole[2])
    for pools in (keys, values):
        for start, count in list(zip(starts.tolist(), num_alike, strict=True))[1:]:
            pools[start : start + count] = math.nan
    for window, expected in ((None, whole[0]), (300, whole[1])):
        assert torch.equal(attend_one(query, keys, values, starts, counts, 0.2, window, alike), expected)
        few = slice(1, 3)
        one_by_one = attend_one(query[few], keys, values, starts[few], counts[few], 0.2, window, alike[few])
        assert torch.equal(one_by_one, expected[few])


@needs_compiler
def test_scores_far_apart_and_infinite_numbers_are_as_in_torch() -> None:
    query, keys, values, starts, lengths = pool([40, 40, 40], 2, 2, 16, torch.float32)
    keys[int(starts[0]) + 3] *= 1000
    keys[int(starts[1]) + 3] = math.nan
    values[int(starts[2]) + 3] = math.inf
    numbers = (query, keys, values, starts, lengths, 1.0, None)
    found, expected = attend_one(*numbers), attend_one_in_torch(*numbers)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


def test_heads_too_large_for_the_native_code_are_computed_in_torch() -> None:
    numbers = pool([3, 4], 2, 1, 520, torch.float32)
    assert torch.equal(attend_one(*numbers, 0.1, None), attend_one_in_torch(*numbers, 0.1, None))


# Prompts


def spans_of(parts: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Spans for (tokens before, tokens) of each sequence; starts, and lengths for `pool`."""
    lengths = [before + count for before, count in parts]
    firsts = [sum(count for _, count in parts[:place]) for place in range(len(parts))]
    starts = [5 + sum(lengths[:row]) + 5 * row for row in range(len(lengths))]
    rows = [[first, count, start, before] for first, start, (before, count) in zip(firsts, starts, parts, strict=True)]
    return torch.tensor(rows), torch.tensor(starts), torch.tensor(lengths)


parts_of_prompts = st.lists(st.tuples(st.integers(0, 70), st.integers(1, 110)), min_size=1, max_size=4)


@needs_compiler
@example([(0, 96)], (4, 4), 8, 5)  # a block of tokens that spans several tiles, of which each row sees one
@example([(46, 3)], (9, 3), 8, 0)  # the first token sees all of a tile but its last place
@given(parts_of_prompts, st.sampled_from([(9, 3), (4, 4), (8, 1)]), st.sampled_from([8, 20, 64]), st.integers(0, 60))
def test_native_attention_of_prompts_is_that_of_float32_mathematics(
    parts: list[tuple[int, int]], heads: tuple[int, int], size: int, window: int
) -> None:
    spans, _, lengths = spans_of(parts)
    _, keys, values, _, _ = pool(lengths.tolist(), *heads, size, torch.float32)
    query = torch.randn(sum(count for _, count in parts), heads[0], size)
    found = attend_prompts(query, keys, values, spans, size**-0.5, window or None)
    numbers = (query.double(), keys.double(), values.double())
    expected = attend_prompts_in_torch(*numbers, spans, size**-0.5, window or None)
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)


@needs_compiler
@pytest.mark.parametrize("window", [None, 7, 60])
@pytest.mark.parametrize("size", [24, 32, 64, 128, 256])
def test_native_attention_of_prompts_rounds_as_torch_does_in_bfloat16(size: int, window: int | None) -> None:
    spans, _, lengths = spans_of([(0, 33), (40, 21), (3, 1), (101, 120)])
    numbers = pool(lengths.tolist(), 6, 2, size, torch.bfloat16)
    query = torch.randn(175, 6, size).bfloat16()
    found, expected = (
        attend(query, *numbers[1:3], spans, 0.2, window) for attend in (attend_prompts, attend_prompts_in_torch)
    )
    assert found.dtype == torch.bfloat16
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(found, expected, rtol=2 * eps, atol=4 * eps)


@needs_compiler
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompts_attention_is_bit_by_bit_the_same_however_it_is_cut_and_in_any_company(
    dtype: torch.dtype, window: int | None
) -> None:
    spans, _, lengths = spans_of([(0, 190), (0, 40)])
    _, keys, values, _, _ = pool(lengths.tolist(), 6, 2, 32, dtype)
    query = torch.randn(230, 6, 32).to(dtype)
    whole = attend_prompts(query, keys, values, spans, 0.2, window)
    for begin, end in ((0, 190), (0, 37), (37, 41), (41, 90), (90, 143), (143, 190)):
        span = torch.tensor([[0, end - begin, int(spans[0, 2]), begin]])
        assert torch.equal(attend_prompts(query[begin:end], keys, values, span, 0.2, window), whole[begin:end])


@needs_compiler
def test_infinite_numbers_in_a_prompt_are_as_in_torch() -> None:
    spans, starts, lengths = spans_of([(0, 40), (0, 40)])
    _, keys, values, _, _ = pool(lengths.tolist(), 2, 2, 16, torch.float32)
    query = torch.randn(80, 2, 16)
    keys[int(starts[0]) + 3] *= 1000
    keys[int(starts[1]) + 35] = math.nan
    values[int(starts[1]) + 35] = 1e38  # and nobody sees even a trace of it
    found = attend_prompts(query, keys, values, spans, 1.0, None)
    expected = attend_prompts_in_torch(query, keys, values, spans, 1.0, None)
    torch.testing.assert_close(found[:75], expected[:75])  # until a number is none, its neighbours' tokens are whole
    assert found[75:].isnan().all()
