"""The kernel for plain weights against float64 products, and models whose linear layers it multiplies against stock."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu

from pipeline.kernels.packed import multiply
from pipeline.kernels.plain import in_plain_blocks, is_served, matrix_linear, plain_linear
from pipeline.loading.packed_modules import PlainLinear, put_linears_in_blocks
from tests.tiny_models import PACKED, tiny_model

pytestmark = pytest.mark.skipif(not is_served(), reason="there is no C compiler")


@settings(max_examples=60, deadline=None)
@given(
    rows=st.one_of(st.integers(1, 14), st.sampled_from([49, 97, 193, 400])),
    outputs=st.sampled_from([1, 31, 32, 33, 96, 200]),
    inputs=st.sampled_from([1, 2, 7, 36, 128, 130, 576]),
    narrow=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_layer_multiplies_with_its_weights(rows: int, outputs: int, inputs: int, narrow: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    if narrow:
        weight = weight.bfloat16().float()
    x = torch.randn(rows, inputs, generator=generator)
    layer = in_plain_blocks(weight)
    assert layer.bits == (16 if narrow and inputs % 2 == 0 else 32)
    found = plain_linear(x, layer)
    assert found.dtype == torch.float32
    sizes = x.abs().double() @ weight.abs().double().T
    assert ((found.double() - x.double() @ weight.double().T).abs() <= 1e-6 * sizes).all()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.one_of(st.integers(1, 14), st.sampled_from([97, 193])),
    outputs=st.sampled_from([32, 93, 160]),
    inputs=st.sampled_from([2, 36, 128, 576]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_what_follows_a_product_is_done_to_its_sums(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second, plain = (torch.randn(outputs, inputs, generator=generator).to(dtype) for _ in range(3))
    x = (torch.randn(rows, inputs, generator=generator) / inputs**0.5).to(dtype)
    residual = torch.randn(rows, outputs, generator=generator).to(dtype)
    one, other, added = (in_plain_blocks(weight).layer() for weight in (first, second, plain))
    gate, up = (x.double() @ weight.double().T for weight in (first, second))
    rounding = max(torch.finfo(dtype).eps, 5e-6)
    for found, exact in (
        (multiply(x, one, up=other), silu(gate) * up),
        (multiply(x, added, residual), x.double() @ plain.double().T + residual.double()),
    ):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact, rtol=rounding, atol=rounding)
    assert torch.equal(multiply(x[-1:], added, residual[-1:]), multiply(x, added, residual)[-1:])
    assert torch.equal(multiply(x[-1:], one, up=other), multiply(x, one, up=other)[-1:])


@pytest.mark.parametrize(("outputs", "inputs"), [(33, 577), (100, 576), (1, 7), (31, 130), (64, 1)])
@pytest.mark.parametrize(
    ("dtype", "rows"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
def test_a_rows_product_is_the_same_bits_in_any_company_layout_and_number_of_threads(
    outputs: int, inputs: int, dtype: torch.dtype, rows: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(inputs)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    layer, turned = in_plain_blocks(weight), weight.T.contiguous().T
    x = torch.randn(300, inputs, generator=generator).to(rows)
    together = plain_linear(x, layer)
    threads = torch.get_num_threads()
    try:
        for first, last in [*((count, 2 * count) for count in range(1, 71)), (1, 50), (100, 300), (0, 300)]:
            torch.set_num_threads(
                2 if last in (2, 14, 32, 50, 300) else 1
            )  # for each would wait long beside other work
            for found in (plain_linear(x[first:last], layer), matrix_linear(x[first:last], weight)):
                assert torch.equal(found, together[first:last])
        assert torch.equal(matrix_linear(x[:, None], turned)[:, 0], together)
    finally:
        torch.set_num_threads(threads)


def test_torchs_own_product_minds_the_number_of_rows() -> None:
    x, weight = torch.randn(2, 64, 576, generator=torch.Generator().manual_seed(1))
    whole = torch.nn.functional.linear(x, weight)
    assert any(not torch.equal(torch.nn.functional.linear(x[:few], weight), whole[:few]) for few in range(1, 64))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.one_of(st.integers(1, 14), st.sampled_from([49, 193, 400])),
    outputs=st.sampled_from([1, 31, 32, 33, 96, 200]),
    inputs=st.sampled_from([1, 2, 6, 7, 36, 130, 576, 642, 1000]),
    seed=st.integers(0, 1000),
)
def test_narrow_rows_are_multiplied_as_they_are_and_rounded_once(
    rows: int, outputs: int, inputs: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs + 1, generator=generator).bfloat16()[:, 1:]
    x = torch.randn(rows, inputs, generator=generator).bfloat16()
    found, exact = plain_linear(x, in_plain_blocks(weight)), x.double() @ weight.double().T
    assert found.dtype == torch.bfloat16
    sizes = x.abs().double() @ weight.abs().double().T
    assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6 * sizes).all()
    assert torch.equal(matrix_linear(x, weight), found)


def test_a_part_of_a_larger_matrix_is_multiplied_where_it_lies() -> None:
    whole, x = torch.randn(3, 40, 50), torch.randn(5, 20)
    part = whole[1, 3:38, 7:27]
    torch.testing.assert_close(matrix_linear(x, part), x @ part.T, rtol=1e-5, atol=1e-5)
    assert matrix_linear(x[:0], part).shape == (0, 35)
    with pytest.raises(TypeError, match="float64"):
        matrix_linear(x.double(), part)


def test_no_rows_and_more_dimensions_have_their_shapes() -> None:
    layer = in_plain_blocks(torch.ones(5, 4))
    assert plain_linear(torch.ones(2, 3, 4), layer).tolist() == [[[4.0] * 5] * 3] * 2
    assert plain_linear(torch.ones(0, 4), layer).shape == (0, 5)


@pytest.mark.parametrize("name", sorted(PACKED))
def test_a_model_gives_the_scores_of_its_own_linear_layers(name: str) -> None:
    model = tiny_model(name)
    ours: Any = copy.deepcopy(model)
    put_linears_in_blocks(ours)
    assert any(isinstance(module, PlainLinear) for module in ours.modules()) or name == "gpt2"
    assert not any(type(module) is torch.nn.Linear for module in ours.modules())
    tokens = torch.arange(3, 27).view(2, 12)
    with torch.inference_mode():
        expected, found = model(input_ids=tokens).logits, ours(input_ids=tokens).logits
    assert torch.allclose(found, expected, atol=2e-5 * float(expected.abs().max()))
