"""Greedy answers out of hundreds of slots are those of stock `generate`, one by one; in bfloat16 but for near ties."""

import copy
import math
from typing import Any

import pytest
import torch

from pipeline.engines.slots import SlotEngine
from pipeline.loading.builtin import prepare_builtin
from pipeline.records import Request
from tests.tiny_models import PACKED, engine_of, prompts, request, tiny_model

NEAR_TIE = 0.05  # of a score


def tokens_of(engine: SlotEngine, requests: list[Request]) -> list[list[int]]:
    """The tokens of each answer, in the order of the requests; the engine is asked just before it gives one."""
    found: dict[int, list[int]] = {}
    rows: dict[int, Any] = {}
    for answer in engine.generate(iter(requests)):
        rows |= {key[0]: row for key, row in engine._in_flight.items()}
        if answer is not None:
            assert answer.error is None
            found[answer.item.index] = rows[answer.item.index].reply.tokens
    return [found[one.item.index] for one in requests]


def stock_tokens(model: Any, request: Request) -> list[int]:
    prompt = torch.tensor([request.token_ids], device=model.device)
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=request.settings.max_new_tokens,
        eos_token_id=None,
    )
    return output[0, prompt.shape[1] :].tolist()


def excess_at_the_first_difference(
    model: Any, exact: Any, request: Request, found: list[int], expected: list[int]
) -> float | None:
    """By how much more than a near tie the model's own score of its choice is above ours; None if they never differ.

    A near tie is 0.05, or one unit in the last place: bfloat16 scores of 16 and more are 0.125 apart. Where the same
    weights in float32 (`exact`) prefer our choice by themselves, the rounding is stock's: its delta rule rounds
    between steps, ours does not.
    """
    for place, (ours, stock) in enumerate(zip(found, expected, strict=True)):
        if ours != stock:
            context = torch.tensor([[*request.token_ids, *expected[:place]]])
            with torch.inference_mode():
                scores, unrounded = (one(input_ids=context).logits[0, -1].float() for one in (model, exact))
            unit = 2.0 ** (math.floor(math.log2(float(scores[stock].abs()))) - 7)
            above = min(abs(float(scores[stock] - scores[ours])), float(unrounded[stock] - unrounded[ours]))
            return above - max(NEAR_TIE, unit)
    return None


def check_near_ties(model: Any, requests: list[Request], found: list[list[int]]) -> None:
    expected = [stock_tokens(model, one) for one in requests]
    exact = copy.deepcopy(model).float()
    found_excess = [
        excess_at_the_first_difference(model, exact, *three) for three in zip(requests, found, expected, strict=True)
    ]
    assert all(excess is None or excess <= 0 for excess in found_excess), found_excess
    assert found_excess.count(None) >= len(found) // 2


# Without experts: a near tie in a router of random weights sends a token to another expert, and its scores far away.
@pytest.mark.parametrize("name", sorted({*PACKED} - {"qwen3-moe", "qwen3-next"}))
def test_bfloat16_answers_differ_from_stock_at_near_ties_only(name: str) -> None:
    model = copy.deepcopy(tiny_model(name)).bfloat16()
    requests = [request(index, prompt, ignore_eos=True) for index, prompt in enumerate(prompts(16, seed=6))]
    found = tokens_of(engine_of(model, engine="slots", slots=16, step_tokens=64), requests)
    check_near_ties(model, requests, found)


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    import transformers

    directory = prepare_builtin("smollm2-135m-bf16")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval(), tokenizer


def real_requests(tokenizer: Any) -> list[Request]:
    questions = ["What is rain?", "Name three rivers.", "Say hello in French.", "Why is the sky blue?", "2 + 2 ="]
    return [
        request(
            index,
            tokenizer(f"{questions[index % 5]} " + "Think of the sea. " * (index % 7) * 5)["input_ids"],
            max_new_tokens=12 + index % 9,
            ignore_eos=True,
        )
        for index in range(20)
    ]


@pytest.mark.slow
def test_the_real_model_answers_as_stock_does_token_for_token_in_float32(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    requests = real_requests(tokenizer)
    found = tokens_of(engine_of(model, tokenizer, engine="slots", slots=12, cache_tokens=4000), requests)
    assert found == [stock_tokens(model, one) for one in requests]


@pytest.mark.slow
def test_the_real_model_differs_from_stock_at_near_ties_only_in_bfloat16(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = copy.deepcopy(smollm2[0]).bfloat16(), smollm2[1]
    requests = real_requests(tokenizer)
    found = tokens_of(engine_of(model, tokenizer, engine="slots", slots=12, cache_tokens=4000), requests)
    check_near_ties(model, requests, found)
