"""Kernels for packed weights, native and in torch, against products with the weights that auto-round's format means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.kernels import packed as module
from pipeline.kernels import place as placing
from pipeline.kernels.native import native
from pipeline.kernels.packed import PackedWeight, dequantize, experts, kernel_in_use, linear, multiply
from pipeline.kernels.place import in_blocks, place
from pipeline.loading.autoround_format import PackedLinear, pack_symmetric
from pipeline.loading.autoround_format import dequantize as dequantize_stored

torch.set_num_threads(1)


@pytest.fixture(params=["native", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(module, "native_library", lambda: None)
        monkeypatch.setattr(placing, "native_library", lambda: None)
    else:
        assert placing.native_library() is not None
        assert module.native_library() is not None, native(module.SOURCE).reason
    return request.param


def quantized(generator: torch.Generator, *shape: int, bits: int, group_size: int) -> tuple[PackedLinear, PackedWeight]:
    stored = pack_symmetric(torch.randn(shape, generator=generator) * shape[-1] ** -0.5, bits, group_size)
    return stored, PackedWeight(in_blocks(stored.qweight), in_blocks(stored.scales), bits)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Root mean square, as a part of the values' own size."""
    return ((found.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt().clamp(min=1e-9)).item()


ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", ROUNDING)
@settings(max_examples=25)
@given(
    bits=st.sampled_from([2, 4, 8]),
    shape=st.sampled_from(
        [
            (1, 32, 32),
            (3, 96, 96),
            (7, 64, 256),
            (70, 160, 128),
            (300, 32, 512),
            (5, 32, 1536),
            (2, 96, 64),
            (4, 32, 96),
            (6, 64, 128),
        ]
    ),
    group_size=st.sampled_from([32, 64, 96, 128, 256]),
    seed=st.integers(0, 1000),
)
def test_a_layer_multiplies_with_the_weights_that_are_stored(
    dtype: torch.dtype, bits: int, shape: tuple[int, int, int], group_size: int, seed: int
) -> None:
    rows, outputs, inputs = shape
    group_size = group_size if inputs % group_size == 0 else inputs
    generator = torch.Generator().manual_seed(seed)
    stored, weight = quantized(generator, outputs, inputs, bits=bits, group_size=group_size)
    assert (weight.num_outputs, weight.num_inputs, weight.group_size) == (outputs, inputs, group_size)
    exact = dequantize_stored(stored, torch.float32)
    assert torch.equal(dequantize(weight, torch.float32), exact)
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    wanted = x.double() @ exact.double().T
    assert linear(x, weight).dtype == dtype
    assert error(linear(x, weight), wanted) < ROUNDING[dtype]


@settings(max_examples=40)
@given(
    bits=st.sampled_from([2, 4, 8]),
    rows=st.one_of(st.integers(1, 14), st.just(200)),
    shape=st.sampled_from([(32, 32), (96, 96), (64, 256), (32, 384)]),
    group_size=st.sampled_from([32, 96, 128, 256]),
    seed=st.integers(0, 1000),
)
def test_int8_rounds_what_goes_in_and_nothing_else(
    bits: int, rows: int, shape: tuple[int, int], group_size: int, seed: int
) -> None:
    outputs, inputs = shape
    group_size = group_size if inputs % group_size == 0 else inputs
    generator = torch.Generator().manual_seed(seed)
    stored, weight = quantized(generator, outputs, inputs, bits=bits, group_size=group_size)
    x = torch.randn(rows, inputs, generator=generator)
    x[0, :32] = 0  # with nothing to take a scale from
    exact, rounded = dequantize_stored(stored, torch.float64), module._rounded(x, weight)
    assert (rounded - x).abs().max() <= x.abs().max() / 127 * 0.501
    found = linear(x, weight, int8=True)
    assert error(found, rounded.double() @ exact.T) < 1e-3  # a number between two may be rounded to either
    assert error(found, x.double() @ exact.T) < 0.03
    for some in (slice(0, 1), slice(rows // 2, rows)):
        assert torch.equal(linear(x[some], weight, int8=True), found[some])


@pytest.mark.skipif(module.native_library() is None, reason="no C compiler")
@settings(max_examples=30)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bits=st.sampled_from([2, 4, 8]),
    rows=st.one_of(st.integers(1, 14), st.just(200)),
    shape=st.sampled_from([(32, 32), (96, 128), (64, 256)]),
    int8=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_what_follows_a_product_is_done_to_its_sums(
    dtype: torch.dtype, bits: int, rows: int, shape: tuple[int, int], int8: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    (_, gate), (_, up) = (quantized(generator, *shape, bits=bits, group_size=32) for _ in range(2))
    x = torch.randn(rows, shape[1], generator=generator).to(dtype)
    residual = torch.randn(rows, shape[0], generator=generator).to(dtype)
    # In float32, for nothing is rounded between; what is rounded of x for 8-bit products is the same.
    first, second = (linear(x.float(), weight, int8=int8).double() for weight in (gate, up))
    one, other = (weight.layer(int8=int8) for weight in (gate, up))
    for found, wanted in (
        (multiply(x, one, up=other), torch.nn.functional.silu(first) * second),
        (multiply(x, one, residual), first + residual.double()),
    ):
        assert found.dtype == dtype
        assert error(found, wanted) < ROUNDING[dtype]
    assert torch.equal(multiply(x[-1:], one, up=other), multiply(x, one, up=other)[-1:])


def test_int8_experts_round_what_goes_into_either_projection(path: str) -> None:
    generator = torch.Generator().manual_seed(8)
    into, out_of, *_ = mixture(generator)
    x, weights = torch.randn(40, 96, generator=generator), torch.rand(40, 2, generator=generator)
    chosen = torch.rand(40, 6, generator=generator).topk(2).indices
    found = experts(x, chosen, weights, into, out_of, int8=True)
    wanted = module._experts_in_torch(x, chosen, weights, into, out_of, int8=True)
    assert error(found, wanted.double()) < 1e-3
    exact = experts(x, chosen, weights, into, out_of)
    assert 1e-3 < error(found, exact.double()) < 0.03


def test_without_a_compiler_torch_does_the_same(path: str) -> None:
    generator = torch.Generator().manual_seed(1)
    stored, weight = quantized(generator, 64, 128, bits=4, group_size=64)
    x = torch.randn(2, 3, 128, generator=generator)
    assert torch.allclose(linear(x, weight), x @ dequantize_stored(stored, torch.float32).T, atol=1e-5)
    assert linear(x[:, :0], weight).shape == (2, 0, 64)
    assert "native" in kernel_in_use()


def mixture(generator: torch.Generator, bits: int = 4) -> tuple[Any, Any, torch.Tensor, torch.Tensor]:
    gate_up, into = quantized(generator, 6, 128, 96, bits=bits, group_size=32)
    down, out_of = quantized(generator, 6, 96, 64, bits=bits, group_size=32)
    return into, out_of, dequantize_stored(gate_up, torch.float64), dequantize_stored(down, torch.float64)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("num_tokens", [1, 9, 600])
def test_tokens_get_their_experts_weighted(path: str, dtype: torch.dtype, num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    into, out_of, gate_up, down = mixture(generator)
    x = torch.randn(num_tokens, 96, generator=generator).to(dtype)
    chosen = torch.rand(num_tokens, 6, generator=generator).topk(3).indices
    chosen[0, 1] = 6  # of no expert here
    weights = torch.rand(num_tokens, 3, generator=generator).to(dtype)
    wanted = torch.zeros(num_tokens, 96, dtype=torch.float64)
    for token in range(num_tokens):
        for expert, weight in zip(chosen[token].tolist(), weights[token].tolist(), strict=True):
            if expert < 6:
                gate, up = (gate_up[expert] @ x[token].double()).chunk(2)
                wanted[token] += weight * (down[expert] @ (torch.nn.functional.silu(gate) * up))
    found = experts(x, chosen, weights, into, out_of)
    assert found.dtype == dtype
    assert error(found, wanted) < 2 * ROUNDING[dtype]


@pytest.mark.parametrize(
    ("dtype", "int8"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)], ids=str
)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_tokens_answer_does_not_depend_on_those_beside_it(bits: int, dtype: torch.dtype, int8: bool) -> None:
    assert module.native_library() is not None
    generator = torch.Generator().manual_seed(3)
    into, out_of, *_ = mixture(generator, bits)
    _, layer = quantized(generator, 64, 96, bits=bits, group_size=32)
    x = torch.randn(140, 96, generator=generator).to(dtype)
    chosen = torch.rand(140, 6, generator=generator).topk(2).indices
    weights = torch.rand(140, 2, generator=generator)
    together = experts(x, chosen, weights, into, out_of, int8=int8)
    products = linear(x, layer, int8=int8)
    try:
        for count in range(1, 71):
            some = slice(count, 2 * count)
            torch.set_num_threads(2 if count in (2, 7, 16, 50) else 1)  # for each would wait long beside other work
            found = experts(x[some], chosen[some], weights[some], into, out_of, int8=int8)
            assert torch.equal(found, together[some])
            assert torch.equal(linear(x[some], layer, int8=int8), products[some])
    finally:
        torch.set_num_threads(1)


def test_numbers_that_are_none_stay_with_their_token() -> None:
    generator = torch.Generator().manual_seed(4)
    into, out_of, *_ = mixture(generator)
    x = torch.randn(4, 96, generator=generator).bfloat16()
    x[2, 5] = float("nan")
    chosen, weights = torch.tensor([[0, 1]] * 4), torch.ones(4, 2)
    for int8 in (False, True):
        found = experts(x, chosen, weights, into, out_of, int8=int8)
        assert found[2].isnan().all()
        assert found[[0, 1, 3]].isfinite().all()


def test_matrices_are_placed_in_blocks_and_zero_points_are_checked(path: str) -> None:
    generator = torch.Generator().manual_seed(5)
    stored, weight = quantized(generator, 96, 64, bits=4, group_size=32)
    staged = torch.cat([part.contiguous().view(torch.uint8).flatten() for part in (stored.qweight, stored.qzeros)])
    staged = torch.cat([staged, stored.scales.contiguous().view(torch.uint8).flatten()])
    codes, scales = torch.zeros_like(weight.codes), torch.zeros_like(weight.scales)
    ends = [0, stored.qweight.nbytes, stored.qweight.nbytes + stored.qzeros.nbytes]
    columns = [ends, [codes.data_ptr(), 0x77777777, scales.data_ptr()], [8, 2, 2], [96, 12, 96], [4, 0, 2]]
    arguments = [torch.tensor(column) for column in columns]
    assert place(staged, *arguments) is None
    assert torch.equal(codes, weight.codes)
    assert torch.equal(scales, weight.scales)
    staged[ends[1] + 5] ^= 0x10
    assert place(staged, *arguments) == 1
