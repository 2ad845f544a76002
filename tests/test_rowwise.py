"""Native norms, gates, rotations and choices equal float32 mathematics on any shape, and no row minds another."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import silu

from pipeline.kernels import rowwise
from pipeline.kernels.native import native

pytestmark = pytest.mark.skipif(native(rowwise.SOURCE).library is None, reason="no C compiler")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
SIZES = st.sampled_from([1, 7, 16, 50, 64, 577])


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Within two units in the last place of the exact numbers, in float64."""
    assert found.dtype == dtype
    eps = max(2 * torch.finfo(dtype).eps, 2e-6)
    torch.testing.assert_close(found.double(), expected.double(), rtol=eps, atol=eps)


@given(st.integers(1, 40), SIZES, DTYPES)
def test_norm(rows: int, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, size).to(dtype), torch.randn(size)
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    found = rowwise.norm(x, weight, 1e-5)
    close(found, exact, dtype)
    assert torch.equal(rowwise.norm(x[-1:].clone(), weight, 1e-5), found[-1:])


@given(st.integers(1, 40), SIZES, DTYPES)
def test_gated(rows: int, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    both = (torch.randn(rows, 2 * size) * 10).to(dtype)
    gate, up = both.split(size, dim=-1)
    found = rowwise.gated(gate, up)
    close(found, silu(gate.double()) * up.double(), dtype)
    assert torch.equal(rowwise.gated(gate[-1:], up[-1:]), found[-1:])


def test_gates_far_from_zero() -> None:
    gate = torch.tensor([[-1e30, -200.0, -88.5, 0.0, 88.5, 200.0, 1e30, math.nan]])
    found = rowwise.gated(gate, torch.ones_like(gate))
    torch.testing.assert_close(found, silu(gate), equal_nan=True, rtol=1e-6, atol=1e-6)


@given(
    st.integers(1, 9),
    st.sampled_from([(9, 3), (4, 4), (1, 1)]),
    st.sampled_from([(8, 8), (64, 64), (50, 50), (64, 32)]),
    st.booleans(),
    DTYPES,
)
def test_rotate(rows: int, heads: tuple[int, int], sizes: tuple[int, int], normed: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    (num, key_num), (size, rotated) = heads, sizes
    widths = [num * size, key_num * size, key_num * size]
    query, key, value = torch.randn(rows, sum(widths)).to(dtype).split(widths, dim=-1)
    angles = [torch.randn(1, rows, rotated).to(dtype) for _ in range(2)]
    weights = [torch.randn(size) if normed else None for _ in range(2)]
    pools = tuple(torch.full((3 * rows, key_num, size), math.nan, dtype=dtype) for _ in range(2))
    places = torch.randperm(3 * rows)[:rows]

    def exact(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        x = x.double().unflatten(-1, (-1, size))
        if weight is not None:
            x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
        cosine, sine = (angle[0, :, None].double() for angle in angles)
        turning, rest = x[..., :rotated], x[..., rotated:]
        low, high = turning.chunk(2, dim=-1)
        return torch.cat([turning * cosine + torch.cat([-high, low], dim=-1) * sine, rest], dim=-1)

    found = rowwise.rotate(query, key, value, (angles[0], angles[1]), (weights[0], weights[1]), 1e-6, pools, places)
    scale = 20  # a difference of products as large as these may cancel
    close(found / scale, exact(query, weights[0]) / scale, dtype)
    close(pools[0][places] / scale, exact(key, weights[1]) / scale, dtype)
    assert torch.equal(pools[1][places], value.unflatten(-1, (-1, size)))
    untouched = torch.ones(3 * rows, dtype=torch.bool).index_fill(0, places, False)
    assert all(pool[untouched].isnan().all() for pool in pools)


@given(st.integers(1, 12), st.sampled_from([1, 15, 16, 17, 1000]), DTYPES)
def test_best_is_the_first_of_the_largest(rows: int, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows + size)
    scores = (torch.randn(rows, size) * 3).round().to(dtype)  # many are equal
    assert rowwise.best(scores).tolist() == [row.index(max(row)) for row in scores.tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_is_no_best_where_a_number_is_none(dtype: torch.dtype) -> None:
    scores = torch.randn(6, 40).to(dtype)
    scores[0, 39] = math.nan
    scores[1, 3] = math.inf
    scores[2] = -math.inf
    scores[3, 1:] = -math.inf
    scores[4, 0] = math.nan
    assert rowwise.best(scores).tolist() == [-1, -1, -1, 0, -1, int(scores[5].argmax())]
