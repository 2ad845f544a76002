"""The transformers engine answers every request once, as stock `generate` would alone, within its limits."""

import random
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engines.transformers import batch_size
from pipeline.records import Request, Unfinished
from tests.tiny_models import (
    CONFIGS,
    END,
    ENDS,
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


# The answers


@pytest.mark.parametrize("name", CONFIGS)
def test_answers_in_batches_equal_stock_answers_one_by_one(name: str) -> None:
    model = tiny_model(name)
    lengths = [3, 12, 25]
    requests = [
        request(index, prompt, max_new_tokens=lengths[index % 3], repetition_penalty=1.0 + index % 2 / 10)
        for index, prompt in enumerate(prompts(12))
    ]
    found = texts(answers(engine_of(model, slots=5), requests))
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


def test_a_sampled_answer_depends_on_its_own_item_alone() -> None:
    model = tiny_model("qwen3")
    requests = [
        request(index, prompt, sample=sample, ignore_eos=True, **SAMPLED[index % len(SAMPLED)])
        for index, prompt in enumerate(prompts(7))
        for sample in (0, 1)
    ]
    expected = texts(answers(engine_of(model), requests))
    assert texts(answers(engine_of(model, slots=1), requests)) == expected
    random.Random(0).shuffle(requests)
    assert texts(answers(engine_of(model, slots=9, window=5), requests)) == expected
    assert [expected[index, 0] == expected[index, 1] for index in range(7)] == [index == 4 for index in range(7)]


def test_the_seed_changes_a_sampled_answer_and_not_a_greedy_one() -> None:
    model, (prompt,) = tiny_model("qwen3"), prompts(1)
    requests = [request(0, prompt, temperature=temperature, seed=seed) for temperature in (0.0, 1.0) for seed in (0, 1)]
    greedy, greedy_again, sampled, other = (texts(answers(engine_of(model), [one]))[0, 0] for one in requests)
    assert greedy == greedy_again
    assert len({greedy, sampled, other}) == 3


@pytest.mark.parametrize("settings", SAMPLED)
def test_an_answer_resumed_after_any_token_is_the_same(settings: dict[str, Any]) -> None:
    engine = engine_of(tiny_model("llama"))
    whole = [
        request(index, prompt, max_new_tokens=8 - index, ignore_eos=True, **settings)
        for index, prompt in enumerate(prompts(3, seed=4))
    ]
    running = engine.generate(iter(whole))
    states = [{(state.index, state.sample): state.token_ids for state in engine.unfinished()} for _ in running]
    expected = texts(answers(engine, whole))
    for state in states:
        resumed = [replace(one, generated=state.get((one.item.index, 0), ())) for one in whole]
        assert texts(answers(engine, resumed)) == expected
    assert {len(tokens) for state in states for tokens in state.values()} >= set(range(1, 8))


def test_an_answer_that_an_earlier_session_finished_is_not_computed_again() -> None:
    def refuse(input_ids: torch.Tensor) -> None:
        raise AssertionError("there is nothing to compute")

    generated = (*bytes_tokenizer()("Hello")["input_ids"], END)
    found = answers(engine_of(tampered(refuse)), [replace(request(0, [1, 2]), generated=generated)])
    assert texts(found) == {(0, 0): ("Hello", "stop", 6)}


def test_stop_strings_end_an_answer_where_the_text_first_holds_one() -> None:
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
    found = texts(answers(engine_of(model), requests))
    assert {key: answer[:2] for key, answer in found.items()} == {key: answer[:2] for key, answer in expected.items()}
    assert all(found[key][2] <= expected[key][2] for key in found)


def test_ignored_end_tokens_do_not_end_the_answer() -> None:
    requests = [request(index, prompt, ignore_eos=True, max_new_tokens=9) for index, prompt in enumerate(prompts(6))]
    found = answers(engine_of(tiny_model("gpt2")), requests)
    assert {(answer.finish_reason, answer.usage.completion_tokens) for answer in found.values() if answer.usage} == {
        ("length", 9)
    }


def test_the_thinking_budget_holds_within_a_batch() -> None:
    requests = [
        replace(
            request(index, prompt, thinking_budget=budget, max_new_tokens=20, ignore_eos=True),
            reasoning_open=budget is not None,
        )
        for index, (prompt, budget) in enumerate(zip(prompts(5), [None, 1, 4, 7, 4], strict=True))
    ]
    found = answers(engine_of(tiny_model("llama"), thinking=THINKING), requests)
    usages = [found[index, 0].usage for index in range(5)]
    assert [usage and (usage.completion_tokens, usage.reasoning_tokens) for usage in usages] == [
        (20, budget) for budget in (0, 1, 4, 7, 4)
    ]
    assert [found[index, 0].reasoning is None for index in range(5)] == [True, False, False, False, False]


# Scheduling


sizes = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50)), min_size=1, max_size=12)


@given(sizes, st.integers(1, 10), st.integers(1, 600))
def test_a_batch_is_as_large_as_rows_and_cache_allow(rows: list[tuple[int, int]], most: int, tokens: int) -> None:
    def cost(count: int) -> int:
        return count * (max(known for known, _ in rows[:count]) + max(to_come for _, to_come in rows[:count]))

    count = batch_size(rows, most, tokens)
    assert 1 <= count <= min(most, len(rows))
    assert count == 1 or cost(count) <= tokens
    assert count == min(most, len(rows)) or cost(count + 1) > tokens


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3-next", "mamba"])
def test_rows_and_cache_stay_within_their_limits_and_finished_rows_leave(name: str) -> None:
    calls: list[tuple[int, int]] = []
    model = tampered(lambda ids: calls.append((ids.shape[0], ids.shape[1])), name=name)
    requests = [
        request(index, prompt, max_new_tokens=3 + index, ignore_eos=True) for index, prompt in enumerate(prompts(20))
    ]
    answers(engine_of(model, slots=6, cache_tokens=160, window=20), requests)
    prefills = [place for place, call in enumerate(calls) if call[1] > 1]
    assert sum(calls[place][0] for place in prefills) == 20
    for start, end in zip(prefills, [*prefills[1:], len(calls)], strict=True):
        rows, width = calls[start]
        assert rows <= 6
        assert rows * (width + end - start) <= 160 or rows == 1
        assert [call[0] for call in calls[start:end]] == sorted((call[0] for call in calls[start:end]), reverse=True)
    assert sum(rows for rows, _ in calls) == sum(one.settings.max_new_tokens for one in requests)  # no step for nothing


def test_the_longest_of_a_window_are_answered_first() -> None:
    sizes = [(3, 4), (9, 4), (3, 12), (5, 4), (30, 4)]  # the last is in the next window
    requests = [
        request(index, [1] * known, max_new_tokens=to_come, ignore_eos=True)
        for index, (known, to_come) in enumerate(sizes)
    ]
    running = engine_of(tiny_model("llama"), slots=1, window=4).generate(iter(requests))
    assert [answer.item.index for answer in running if answer] == [2, 1, 3, 0, 4]


def test_requests_are_taken_a_window_at_a_time_and_each_step_gives_control_back() -> None:
    taken: list[int] = []

    def pull() -> Iterator[Request]:
        for index, prompt in enumerate(prompts(10)):
            taken.append(index)
            yield request(index, prompt, max_new_tokens=4, ignore_eos=True)

    answered = nothing = 0
    for answer in engine_of(tiny_model("llama"), slots=2, window=4).generate(pull()):
        assert len(taken) <= (answered // 4 + 1) * 4
        assert not torch.is_inference_mode_enabled()  # ours, not the caller's
        answered += answer is not None
        nothing += answer is None
    assert (answered, nothing) == (10, 5 * 3)  # five batches of two, whose first three tokens finish nothing


def test_an_abandoned_iterator_leaves_nothing_in_flight() -> None:
    engine = engine_of(tiny_model("llama"))
    running = engine.generate(iter([request(0, [1, 2, 3], ignore_eos=True)]))
    next(running)
    next(running)
    (state,) = engine.unfinished()
    assert isinstance(state, Unfinished)
    assert (state.index, state.sample, len(state.token_ids)) == (0, 0, 2)
    running.close()
    assert engine.unfinished() == []


def test_the_times_of_an_answer_add_up() -> None:
    model = tampered(lambda _: time.sleep(0.01))
    before, start = time.time(), time.perf_counter()
    requests = [request(index, [1, 2, 3], max_new_tokens=4, ignore_eos=True) for index in range(4)]
    found = answers(engine_of(model, slots=2), requests)
    elapsed = time.perf_counter() - start
    timings = sorted((answer.timing for answer in found.values() if answer.timing), key=lambda timing: timing.queue_s)
    assert len(timings) == 4
    for timing in timings:
        assert before <= timing.started_at <= time.time()
        assert timing.prefill_s >= 0.01
        assert timing.decode_s >= 0.03
        assert timing.total_s <= elapsed
    waits = [timing.queue_s for timing in timings]
    assert waits[2] - waits[1] > max(0.04, waits[1] - waits[0])  # the second batch waits for the first
