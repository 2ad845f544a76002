"""The kernel for plain weights against float64 products, and models whose linear layers it multiplies against stock."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.kernels.plain import in_plain_blocks, is_served, plain_linear
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


@pytest.mark.parametrize("narrow", [True, False])
def test_a_rows_product_does_not_depend_on_the_rows_beside_it_nor_on_threads(narrow: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(100, 576, generator=generator)
    layer = in_plain_blocks(weight.bfloat16().float() if narrow else weight)
    x = torch.randn(300, 576, generator=generator)
    together = plain_linear(x, layer)
    for first, last in [*((9, 9 + count) for count in range(1, 9)), (1, 50), (100, 300)]:
        assert torch.equal(plain_linear(x[first:last], layer), together[first:last])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(plain_linear(x, layer), together)
    finally:
        torch.set_num_threads(threads)


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
