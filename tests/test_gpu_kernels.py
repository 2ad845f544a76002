"""GPU kernels against torch and float64 mathematics: on a GPU where there is one, else in Triton's interpreter.

The interpreter multiplies no bfloat16; float16 stands for it there.
"""

import pytest
import torch

from pipeline.kernels.attention import attend_one_in_torch, attend_prompts_in_torch
from pipeline.kernels.delta_net import DeltaNetInputs
from pipeline.kernels.packed import PackedWeight, dequantize
from tests.test_delta_net import SHAPES, inputs_of, layer, mathematics, pools

pytest.importorskip("triton")
from pipeline.kernels.gpu.attention import attend_one, attend_prompts
from pipeline.kernels.gpu.delta_net import delta_net
from pipeline.kernels.gpu.experts import experts

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # root mean square, of the numbers' own
NOTHING = float("nan")  # where a kernel has no business


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def packed(
    num_experts: int, outputs: int, inputs: int, bits: int, group: int, generator: torch.Generator
) -> PackedWeight:
    codes = torch.randint(
        -(2**31),
        2**31 - 1,
        (num_experts, outputs // 32, inputs * bits // 32, 32),
        dtype=torch.int32,
        generator=generator,
    )
    scales = torch.rand(num_experts, outputs // 32, inputs // group, 32, generator=generator) / 2**bits
    return PackedWeight(codes.to(DEVICE), scales.half().to(DEVICE), bits)


@pytest.mark.parametrize(
    ("bits", "group", "num_tokens", "hidden", "inner", "dtype"),
    [
        (4, 128, 1, 256, 128, torch.float32),
        (4, 128, 9, 256, 128, HALF),
        (4, 32, 40, 64, 96, HALF),
        (8, 64, 7, 128, 64, torch.float32),
        (8, 64, 7, 128, 64, HALF),
        (2, 64, 90, 64, 64, HALF),
        (4, 96, 3, 192, 96, torch.float32),
    ],
)
def test_experts_are_those_of_the_weights_written_out(
    bits: int, group: int, num_tokens: int, hidden: int, inner: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(bits * num_tokens)
    num_experts, top_k = 5, 3
    gate_up, down = (
        packed(num_experts, *shape, bits, group, generator) for shape in ((2 * inner, hidden), (hidden, inner))
    )
    x = torch.randn(num_tokens, hidden, generator=generator).to(DEVICE, dtype)
    chosen = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :top_k].to(DEVICE)
    weights = torch.rand(num_tokens, top_k, generator=generator).to(DEVICE)
    chosen[0, 1], chosen[-1, 2] = -1, num_experts  # of no expert: they count for nothing
    into, out_of = dequantize(gate_up, torch.float64), dequantize(down, torch.float64)
    expected = torch.zeros(num_tokens, hidden, dtype=torch.float64)
    for token in range(num_tokens):
        for expert, weight in zip(chosen[token].tolist(), weights[token].tolist(), strict=True):
            if 0 <= expert < num_experts:
                gate, up = (into[expert] @ x[token].double()).chunk(2)
                answer = out_of[expert] @ (torch.nn.functional.silu(gate) * up)
                expected[token] += weight * answer.cpu()
    found = experts(x, chosen, weights, gate_up, down)
    assert found.dtype == dtype
    assert relative_error(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(
    ("heads", "key_heads", "size", "window"), [(4, 2, 16, None), (6, 1, 20, 5), (9, 3, 64, 40), (2, 2, 128, None)]
)
def test_attention_is_that_of_each_sequence_to_itself(
    heads: int, key_heads: int, size: int, window: int | None, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(size)
    starts, lengths = torch.tensor([3, 50, 200], device=DEVICE), torch.tensor([1, 37, 150], device=DEVICE)
    keys = torch.full((600, key_heads, size), NOTHING, dtype=dtype, device=DEVICE)
    values = keys.clone()
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        for pool in (keys, values):
            pool[start : start + length] = torch.randn(length, key_heads, size, generator=generator).to(DEVICE, dtype)
    exact = (keys.double(), values.double())

    one = torch.randn(3, heads, size, generator=generator).to(DEVICE, dtype)
    found = attend_one(one, keys, values, starts, lengths, 0.3, window)
    expected = attend_one_in_torch(one.double(), *exact, starts, lengths, 0.3, window)
    assert relative_error(found, expected) < TOLERANCE[dtype]

    spans = torch.tensor([[0, 1, 3, 0], [1, 30, 50, 7], [31, 150, 200, 0]], device=DEVICE)
    prompts = torch.randn(181, heads, size, generator=generator).to(DEVICE, dtype)
    found = attend_prompts(prompts, keys, values, spans, 0.3, window)
    expected = attend_prompts_in_torch(prompts.double(), *exact, spans, 0.3, window)
    assert relative_error(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_the_delta_rule_is_that_of_the_formulas(shape: tuple[int, int, int, int]) -> None:
    generator = torch.Generator().manual_seed(7)
    weights = layer(shape, 4, generator)
    inputs = inputs_of(weights, 26, generator)
    windows, states = pools(weights, 5, generator)
    spans = [(0, 0, 1, False), (2, 1, 2, False), (1, 3, 18, True)]
    spans.append((4, 21, 5, False))
    there = layer(shape, 4, torch.Generator().manual_seed(7))
    for name in ("taps", "rate", "bias", "norm"):
        object.__setattr__(there, name, getattr(there, name).to(DEVICE))
    moved_windows, moved_states = windows.to(DEVICE, copy=True), states.to(DEVICE, copy=True)
    found = delta_net(
        there,
        DeltaNetInputs(*(part.to(DEVICE) for part in inputs)),
        torch.tensor(spans, device=DEVICE),
        moved_windows,
        moved_states,
    )
    for slot, first, num_tokens, begins in spans:
        window, state = (torch.zeros_like(pool[slot]) if begins else pool[slot] for pool in (windows, states))
        own = DeltaNetInputs(*(part[first : first + num_tokens] for part in inputs))
        expected, after = mathematics(weights, own, window, state)
        assert relative_error(found[first : first + num_tokens], expected) < TOLERANCE[torch.float32]
        assert relative_error(moved_states[slot], after) < TOLERANCE[torch.float32]
        mixed = torch.cat([part.flatten(1) for part in own[:3]], dim=1)
        assert torch.equal(moved_windows[slot].cpu(), torch.cat([window, mixed])[-len(window) :])
    assert torch.equal(moved_states[3].cpu(), states[3]), "nobody's slot"
