"""The padded engine keeps within its limits, takes the longest first and gives control back after each step."""

import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engines.padded import batch_size
from pipeline.records import Request, Unfinished
from tests.tiny_models import (
    answers,
    engine_of,
    prompts,
    request,
    tampered,
    tiny_model,
)

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
