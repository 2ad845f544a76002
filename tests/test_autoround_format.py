"""The packed layout, against the same written out in Python integers, and the rounding, against float arithmetic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.loading.autoround_format import PackedLinear, dequantize, pack_symmetric, quantize_symmetric

SHAPES = st.tuples(st.sampled_from([32, 64, 96]), st.sampled_from([64, 128, 192]), st.sampled_from([32, 64]))
BITS = st.sampled_from([2, 4, 8])


def weight_of(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def word(values: list[int], bits: int) -> int:
    """The first value in the lowest bits, read as a signed number."""
    unsigned = sum(value << (bits * place) for place, value in enumerate(values))
    return unsigned - (1 << 32) if unsigned >> 31 else unsigned


@given(BITS, SHAPES, st.integers(0, 1000))
def test_words_are_laid_out_as_the_format_says(bits: int, shape: tuple[int, int, int], seed: int) -> None:
    num_outputs, num_inputs, group_size = shape
    weight = weight_of(seed, num_outputs, num_inputs)
    codes, scales = quantize_symmetric(weight, bits, group_size)
    packed = pack_symmetric(weight, bits, group_size)
    per_word, zero = 32 // bits, 1 << (bits - 1)
    assert packed.qweight.shape == (num_inputs // per_word, num_outputs)
    assert packed.qzeros.shape == (num_inputs // group_size, num_outputs // per_word)
    assert packed.bits == bits
    row, output = seed % packed.qweight.shape[0], seed % num_outputs
    expected = codes[output, row * per_word : (row + 1) * per_word].tolist()
    assert packed.qweight[row, output].item() == word(expected, bits)
    assert set(packed.qzeros.flatten().tolist()) == {word([zero - 1] * per_word, bits)}
    assert torch.equal(packed.scales, scales.T)
    assert {tensor.dtype for tensor in (packed.qweight, packed.qzeros)} == {torch.int32}
    assert all(tensor.is_contiguous() for tensor in packed)


@given(BITS, SHAPES, st.integers(0, 1000), st.floats(0.1, 100))
def test_a_weight_comes_back_within_its_step(
    bits: int, shape: tuple[int, int, int], seed: int, magnitude: float
) -> None:
    num_outputs, num_inputs, group_size = shape
    weight = weight_of(seed, num_outputs, num_inputs) * magnitude
    packed = pack_symmetric(weight, bits, group_size)
    back = dequantize(packed, torch.float32)
    scales = packed.scales.T.float().repeat_interleave(group_size, 1)
    clipped = weight / scales > (1 << (bits - 1)) - 0.5  # the end of the range that has one code fewer
    distance = (back - weight).abs() / scales.abs()
    assert distance[~clipped].max() <= 0.5001
    assert distance.max() <= 1.07  # a step, and what a scale rounded to float16 is off over 128 of them
    groups = weight.unflatten(1, (-1, group_size))
    extreme = (groups.abs() == groups.abs().amax(-1, keepdim=True)).flatten(1)
    assert torch.allclose(back[extreme], weight[extreme], rtol=2**-10)  # as far as a float16 scale goes


@given(BITS, st.integers(0, 1000))
def test_every_value_of_a_layer_is_its_code_times_its_scale(bits: int, seed: int) -> None:
    codes, scales = quantize_symmetric(weight_of(seed, 32, 64), bits, 32)
    back = dequantize(pack_symmetric(weight_of(seed, 32, 64), bits, 32), torch.float64)
    for output, place in ((seed % 32, seed % 64), (31, 63)):
        exact = (int(codes[output, place]) - (1 << (bits - 1))) * scales[output, place // 32].item()
        assert back[output, place].item() == exact


@given(BITS)
def test_a_stack_of_layers_is_packed_as_each_alone(bits: int) -> None:
    stack = weight_of(1, 3, 2, 32, 64)
    together = pack_symmetric(stack, bits, 32)
    for first in range(3):
        for second in range(2):
            alone = pack_symmetric(stack[first, second], bits, 32)
            assert all(torch.equal(a[first, second], b) for a, b in zip(together, alone, strict=True))
            assert torch.equal(dequantize(together, torch.float32)[first, second], dequantize(alone, torch.float32))


def test_zeros_of_any_value_are_read() -> None:
    """Asymmetric layers, which we do not write: output n has its zero at n % 15 + 1, stored one lower."""
    packed = pack_symmetric(weight_of(2, 32, 64), 4, 32)
    stored = [[word([(first + place) % 15 for place in range(8)], 4) for first in range(0, 32, 8)]] * 2
    moved = dequantize(
        PackedLinear(packed.qweight, torch.tensor(stored, dtype=torch.int32), packed.scales), torch.float32
    )
    shift = torch.tensor([8 - (output % 15 + 1) for output in range(32)])
    scales = packed.scales.T.float().repeat_interleave(32, 1)
    assert torch.equal(moved, (dequantize(packed, torch.float32) / scales).round().add(shift[:, None]) * scales)


def test_a_group_of_zeros_stays_zero() -> None:
    assert dequantize(pack_symmetric(torch.zeros(32, 64), 4, 32), torch.float32).abs().max() == 0


@pytest.mark.parametrize(("shape", "bits"), [((32, 48), 4), ((30, 64), 4), ((32, 64), 3)])
def test_what_does_not_fill_groups_and_words_is_refused(shape: tuple[int, int], bits: int) -> None:
    with pytest.raises(ValueError, match=r"32|bits"):
        pack_symmetric(torch.zeros(shape), bits, 32)


def test_names_are_those_of_a_checkpoint() -> None:
    named = pack_symmetric(weight_of(3, 32, 32), 8, 32).named("model.layers.0.mlp.up_proj")
    assert set(named) == {f"model.layers.0.mlp.up_proj.{part}" for part in ("qweight", "qzeros", "scales")}
