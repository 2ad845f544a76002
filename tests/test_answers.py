"""Both engines answer every request once, as stock `generate` would alone, whatever its neighbours are."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from pipeline.records import Request
from tests.tiny_models import (
    CONFIGS,
    END,
    ENDS,
    ENGINES,
    PACKED,
    THINKING,
    answers,
    bytes_tokenizer,
    engine_of,
    prompts,
    request,
    tampered,
    texts,
    tiny_model,
)

pytestmark = pytest.mark.parametrize("engine", ENGINES)


def stock(model: Any, request: Request) -> tuple[str, str, int]:
    """What unmodified transformers answers to this one request, greedily."""
    prompt = torch.tensor([request.token_ids])
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=request.settings.max_new_tokens,
        repetition_penalty=request.settings.repetition_penalty,
    )
    tokens = output[0, prompt.shape[1] :].tolist()
    if tokens[-1] in ENDS:
        return bytes_tokenizer().decode(tokens[:-1], skip_special_tokens=True), "stop", len(tokens)
    return bytes_tokenizer().decode(tokens, skip_special_tokens=True), "length", len(tokens)


@pytest.mark.parametrize("name", CONFIGS)
def test_answers_in_batches_equal_stock_answers_one_by_one(engine: str, name: str) -> None:
    if engine == "slots" and name not in PACKED:
        pytest.skip("its positions are no input, so its tokens cannot be packed")
    model = tiny_model(name)
    lengths = [3, 12, 25]
    requests = [
        request(index, prompt, max_new_tokens=lengths[index % 3], repetition_penalty=1.0 + index % 2 / 10)
        for index, prompt in enumerate(prompts(12))
    ]
    found = texts(answers(engine_of(model, engine=engine, slots=5), requests))
    assert found == {(request.item.index, 0): stock(model, request) for request in requests}
    reasons = {reason for _, reason, _ in found.values()}
    assert reasons == ({"length"} if name == "mamba" else {"stop", "length"})  # this mamba repeats itself for ever


SAMPLED = [
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 10},
    {"temperature": 1.2, "top_p": 0.8, "seed": 3},
    {"temperature": 1.0, "min_p": 0.05, "repetition_penalty": 1.2},
    {},
]


def test_a_sampled_answer_depends_on_its_own_item_alone(engine: str) -> None:
    model = tiny_model("qwen3")
    requests = [
        request(index, prompt, sample=sample, ignore_eos=True, **SAMPLED[index % len(SAMPLED)])
        for index, prompt in enumerate(prompts(7))
        for sample in (0, 1)
    ]
    expected = texts(answers(engine_of(model, engine=engine), requests))
    assert texts(answers(engine_of(model, engine=engine, slots=1), requests)) == expected
    random.Random(0).shuffle(requests)
    assert texts(answers(engine_of(model, engine=engine, slots=9, window=5), requests)) == expected
    assert [expected[index, 0] == expected[index, 1] for index in range(7)] == [index == 4 for index in range(7)]


def test_the_seed_changes_a_sampled_answer_and_not_a_greedy_one(engine: str) -> None:
    model, (prompt,) = tiny_model("qwen3"), prompts(1)
    requests = [request(0, prompt, temperature=temperature, seed=seed) for temperature in (0.0, 1.0) for seed in (0, 1)]
    greedy, greedy_again, sampled, other = (
        texts(answers(engine_of(model, engine=engine), [one]))[0, 0] for one in requests
    )
    assert greedy == greedy_again
    assert len({greedy, sampled, other}) == 3


@pytest.mark.parametrize("settings", SAMPLED)
def test_an_answer_resumed_after_any_token_is_the_same(engine: str, settings: dict[str, Any]) -> None:
    generator = engine_of(tiny_model("llama"), engine=engine)
    whole = [
        request(index, prompt, max_new_tokens=8 - index, ignore_eos=True, **settings)
        for index, prompt in enumerate(prompts(3, seed=4))
    ]
    running = generator.generate(iter(whole))
    states = [{(state.index, state.sample): state.token_ids for state in generator.unfinished()} for _ in running]
    expected = texts(answers(generator, whole))
    for state in states:
        resumed = [replace(one, generated=state.get((one.item.index, 0), ())) for one in whole]
        assert texts(answers(generator, resumed)) == expected
    assert {len(tokens) for state in states for tokens in state.values()} >= set(range(1, 8))


def test_an_answer_that_an_earlier_session_finished_is_not_computed_again(engine: str) -> None:
    def refuse(input_ids: torch.Tensor) -> None:
        raise AssertionError("there is nothing to compute")

    generated = (*bytes_tokenizer()("Hello")["input_ids"], END)
    found = answers(engine_of(tampered(refuse), engine=engine), [replace(request(0, [1, 2]), generated=generated)])
    assert texts(found) == {(0, 0): ("Hello", "stop", 6)}


def test_stop_strings_end_an_answer_where_the_text_first_holds_one(engine: str) -> None:
    model = tiny_model("qwen3")
    requests = [request(index, prompt, max_new_tokens=25) for index, prompt in enumerate(prompts(8, seed=2))]
    expected: dict[tuple[int, int], tuple[str, str, int]] = {}
    for place, one in enumerate(requests):
        text, reason, count = stock(model, one)
        letters = [letter for letter in text if letter.isascii()]
        if letters:
            stop = letters[-1]
            requests[place] = replace(one, settings=replace(one.settings, stop=(stop,)))
            text = text[: text.index(stop)]
        expected[place, 0] = (text, "stop" if letters else reason, count)
    found = texts(answers(engine_of(model, engine=engine), requests))
    assert {key: answer[:2] for key, answer in found.items()} == {key: answer[:2] for key, answer in expected.items()}
    assert all(found[key][2] <= expected[key][2] for key in found)


def test_ignored_end_tokens_do_not_end_the_answer(engine: str) -> None:
    requests = [request(index, prompt, ignore_eos=True, max_new_tokens=9) for index, prompt in enumerate(prompts(6))]
    found = answers(engine_of(tiny_model("gpt2"), engine=engine), requests)
    assert {(answer.finish_reason, answer.usage.completion_tokens) for answer in found.values() if answer.usage} == {
        ("length", 9)
    }


def test_the_thinking_budget_holds_within_a_batch(engine: str) -> None:
    requests = [
        replace(
            request(index, prompt, thinking_budget=budget, max_new_tokens=20, ignore_eos=True),
            reasoning_open=budget is not None,
        )
        for index, (prompt, budget) in enumerate(zip(prompts(5), [None, 1, 4, 7, 4], strict=True))
    ]
    found = answers(engine_of(tiny_model("llama"), engine=engine, thinking=THINKING), requests)
    usages = [found[index, 0].usage for index in range(5)]
    assert [usage and (usage.completion_tokens, usage.reasoning_tokens) for usage in usages] == [
        (20, budget) for budget in (0, 1, 4, 7, 4)
    ]
    assert [found[index, 0].reasoning is None for index in range(5)] == [True, False, False, False, False]
