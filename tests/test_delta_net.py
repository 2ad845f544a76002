"""The native gated delta rule against float64 mathematics and transformers' own layer; no sequence minds another."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engines.delta_net import DeltaNetLayer, is_served
from pipeline.engines.slot_cache import Span, Step
from pipeline.kernels import delta_net as kernel
from pipeline.kernels.delta_net import DeltaNetInputs, DeltaNetWeights, delta_net
from pipeline.kernels.native import native
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.skipif(native(kernel.SOURCE).library is None, reason="no C compiler")
TOLERANCE = 1e-5  # root mean square, as a part of the numbers' own; of small sums the norm at the end makes much
CPU = torch.device("cpu")
SHAPES = [(2, 4, 8, 8), (1, 1, 20, 13), (2, 2, 32, 32), (2, 6, 16, 40), (1, 2, 128, 128)]


def layer(shape: tuple[int, int, int, int], taps: int, generator: torch.Generator) -> DeltaNetWeights:
    key_heads, value_heads, key_size, value_size = shape
    channels = 2 * key_heads * key_size + value_heads * value_size
    return DeltaNetWeights(
        num_key_heads=key_heads,
        num_value_heads=value_heads,
        key_size=key_size,
        value_size=value_size,
        taps=torch.randn(taps, channels, generator=generator),
        rate=torch.rand(value_heads, generator=generator) * 2,
        bias=torch.randn(value_heads, generator=generator),
        norm=torch.rand(value_size, generator=generator) + 0.5,
        norm_eps=1e-6,
    )


def inputs_of(weights: DeltaNetWeights, num_tokens: int, generator: torch.Generator) -> DeltaNetInputs:
    heads, group = weights.num_key_heads, weights.num_value_heads // weights.num_key_heads
    sizes = [weights.key_size] * 2 + [group * weights.value_size] * 2 + [group] * 2
    joined = torch.randn(num_tokens, heads, sum(sizes), generator=generator)
    return DeltaNetInputs(*torch.split(joined, sizes, -1))


def mathematics(weights: DeltaNetWeights, inputs: DeltaNetInputs, window: Any, state: Any) -> tuple[Any, Any]:
    """One sequence, token by token, in float64, from the formulas of the paper; also the state after it."""
    heads, num_tokens = weights.num_value_heads, len(inputs.query)
    each = heads // weights.num_key_heads
    mixed = torch.cat([part.double().flatten(1) for part in inputs[:3]], dim=1)
    padded = torch.cat([window.double(), mixed])
    taps = weights.taps.double()
    convolved = sum(padded[tap : tap + num_tokens] * taps[tap] for tap in range(len(taps)))
    convolved = torch.nn.functional.silu(torch.as_tensor(convolved))
    keys = weights.num_key_heads * weights.key_size
    query, key, value = convolved.split([keys, keys, heads * weights.value_size], dim=1)
    query, key = (part.unflatten(1, (-1, weights.key_size)).repeat_interleave(each, 1) for part in (query, key))
    query, key = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (query, key))
    query, value = query * weights.key_size**-0.5, value.unflatten(1, (heads, -1))
    beta = inputs.beta.double().flatten(1).sigmoid()
    rate, bias = weights.rate.double(), weights.bias.double()
    decay = (-rate * torch.nn.functional.softplus(inputs.decay.double().flatten(1) + bias)).exp()
    state, outputs = state.double().clone(), []
    for token in range(num_tokens):
        state *= decay[token, :, None, None]
        delta = (value[token] - torch.einsum("hkv,hk->hv", state, key[token])) * beta[token, :, None]
        state += key[token, :, :, None] * delta[:, None]
        outputs.append(torch.einsum("hkv,hk->hv", state, query[token]))
    out = torch.stack(outputs)
    out = out / (out.square().mean(-1, keepdim=True) + weights.norm_eps).sqrt() * weights.norm.double()
    gate = torch.nn.functional.silu(inputs.gate.double()).flatten(1).unflatten(1, (heads, -1))
    return (out * gate).flatten(1), state


def pools(weights: DeltaNetWeights, slots: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    windows = torch.randn(slots, *weights.window_shape, generator=generator)
    return windows, torch.randn(slots, *weights.state_shape, generator=generator)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()).item()


@settings(max_examples=30)
@given(
    st.sampled_from(SHAPES),
    st.integers(2, 5),
    st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=4),
    st.integers(0, 1000),
)
def test_every_sequence_follows_the_formulas(
    shape: tuple[int, int, int, int], taps: int, sequences: list[tuple[int, bool]], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = layer(shape, taps, generator)
    windows, states = pools(weights, 6, generator)
    before = windows.clone(), states.clone()
    inputs = inputs_of(weights, sum(count for count, _ in sequences), generator)
    spans, first = [], 0
    for place, (count, begins) in enumerate(sequences):
        spans.append((5 - place, first, count, begins))
        first += count
    found = delta_net(weights, inputs, torch.tensor(spans), windows, states)
    for slot, first, count, begins in spans:
        part = DeltaNetInputs(*(numbers[first : first + count] for numbers in inputs))
        wanted, state = mathematics(weights, part, *(pool[slot] * (not begins) for pool in before))
        assert error(found[first : first + count], wanted) < TOLERANCE
        assert error(states[slot], state) < TOLERANCE
    for slot in {*range(6)} - {slot for slot, *_ in spans}:
        assert torch.equal(windows[slot], before[0][slot]), "what is no part of the step stays as it is"
        assert torch.equal(states[slot], before[1][slot])


def test_many_steps_of_one_token_do_not_drift() -> None:
    generator = torch.Generator().manual_seed(7)
    weights = layer((1, 2, 128, 128), 4, generator)
    windows, states = (torch.zeros_like(pool) for pool in pools(weights, 1, generator))
    inputs = inputs_of(weights, 300, generator)
    found = [
        delta_net(
            weights,
            DeltaNetInputs(*(part[place : place + 1] for part in inputs)),
            torch.tensor([(0, 0, 1, place == 0)]),
            windows,
            states,
        )
        for place in range(300)
    ]
    wanted, _ = mathematics(weights, inputs, torch.zeros(weights.window_shape), torch.zeros(weights.state_shape))
    assert error(torch.cat(found)[-50:], wanted[-50:]) < TOLERANCE


@given(st.sampled_from(SHAPES), st.lists(st.integers(1, 50), max_size=4), st.integers(0, 3), st.integers(1, 3))
def test_a_sequence_is_bit_by_bit_the_same_however_it_is_computed(
    shape: tuple[int, int, int, int], cuts: list[int], neighbours: int, threads: int
) -> None:
    """In parts, beside others, in another slot, by more threads."""
    generator = torch.Generator().manual_seed(3)
    weights = layer(shape, 4, generator)
    inputs = inputs_of(weights, 60, generator)
    windows, states = pools(weights, 8, generator)
    whole = delta_net(weights, inputs, torch.tensor([(0, 0, 60, True)]), windows, states)
    parts, begin = [], 0
    torch.set_num_threads(threads)
    try:
        for end in [*sorted({*cuts}), 60]:
            others = inputs_of(weights, neighbours, generator)
            own = DeltaNetInputs(*(part[begin:end] for part in inputs))
            joined = DeltaNetInputs(*(torch.cat(pair) for pair in zip(others, own, strict=True)))
            spans = [(1 + place, place, 1, False) for place in range(neighbours)]
            spans.append((7, neighbours, end - begin, begin == 0))
            parts.append(delta_net(weights, joined, torch.tensor(spans), windows, states)[neighbours:])
            begin = end
    finally:
        torch.set_num_threads(1)
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(states[7], states[0])
    assert torch.equal(windows[7], windows[0])


def test_numbers_that_are_none_stay_with_their_sequence() -> None:
    generator = torch.Generator().manual_seed(4)
    weights = layer((2, 4, 8, 8), 4, generator)
    windows, states = pools(weights, 3, generator)
    states[1] = float("nan")
    spans = [(slot, slot, 1, False) for slot in range(3)]
    found = delta_net(weights, inputs_of(weights, 3, generator), torch.tensor(spans), windows, states)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()
    again = [(1, 0, 1, True)]
    assert delta_net(weights, inputs_of(weights, 1, generator), torch.tensor(again), windows, states).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3-next", "qwen3.5", "qwen3.5-moe"])
def test_a_layer_of_transformers_gives_the_same_numbers(name: str, dtype: torch.dtype) -> None:
    model = copy.deepcopy(tiny_model(name)).to(dtype)
    module = next(module for module in model.modules() if is_served(module))
    ours = DeltaNetLayer(module, 3)
    hidden = torch.randn(1, 70, model.config.hidden_size, generator=torch.Generator().manual_seed(5)).to(dtype)
    with torch.inference_mode():
        wanted = module(hidden, cache_params=None, attention_mask=None)[0]
        first = ours.forward(hidden[:, :66], Step.of([], [Span(1, 0, 66, 0, 0)], CPU))
        rest = [ours.forward(hidden[:, at : at + 1], Step.of([Span(1, 0, 1, 0, at)], [], CPU)) for at in range(66, 70)]
    found = torch.cat([first, *rest], dim=1)[0]
    assert found.dtype == dtype
    assert error(found, wanted.double()) < (1e-5 if dtype == torch.float32 else 1e-2)  # of both together


def test_what_we_do_not_know_is_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    module = next(module for module in copy.deepcopy(tiny_model("qwen3-next")).modules() if is_served(module))
    module.activation = "gelu"
    assert not is_served(module)
    module.activation = "silu"
    module.conv1d.bias = torch.nn.Parameter(torch.zeros(4))
    assert not is_served(module)
    module.conv1d.bias = None
    assert is_served(module)
    monkeypatch.setattr(kernel, "_library", lambda: None)
    assert not is_served(module), "without a compiler the layer computes itself"
    monkeypatch.undo()
    module.__class__ = type("Qwen3NextGatedDeltaNet", (type(module),), {"__module__": "theirs"})
    assert not is_served(module)
