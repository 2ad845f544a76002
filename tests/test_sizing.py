"""Slots are used as far as timing shows that they bring something, at no noticeable price and with the same answers."""

import itertools
import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engines.sizing import FIRST_SIZE, Sizing
from tests.tiny_models import answers, engine_of, prompts, request, tampered, texts, tiny_model

SLOTS = 128


def settled(step_s: Callable[[int], float], full: int, *, room: int = 10_000, waiting: int = 100_000) -> Sizing:
    """Of a machine whose steps take so long, where so many rows fit and answers do not end."""
    sizing = Sizing(full)
    live = 0
    for _ in range(1000):
        admitted = max(0, min(sizing.limit(live), room, live + waiting) - live)
        live, waiting = live + admitted, waiting - admitted
        sizing.admitted(live, waiting)
        if sizing.timed(live, step_s(live)):
            break
    return sizing


@given(full=st.integers(1, 600), knee=st.integers(1, 600), per_row=st.floats(0, 0.005))
def test_the_smallest_size_that_is_about_as_good_as_the_best_is_found(full: int, knee: int, per_row: float) -> None:
    def step_s(rows: int) -> float:
        return (1.0 if rows <= knee else 10.0 * rows / knee) + per_row * rows

    sizing = settled(step_s, full)
    rates = {size: size / step_s(size) for size in [*range(1, full + 1)] if size in (16, 32, 64, 128, 256, 512, full)}
    assert sizing.most == sizing.chosen == min(size for size in rates if rates[size] >= 0.97 * max(rates.values()))


@given(full=st.integers(17, 600))
def test_fewer_slots_are_used_where_more_bring_nothing(full: int) -> None:
    assert settled(lambda rows: 0.01 * rows, full).most == FIRST_SIZE


def test_a_step_that_something_else_made_slow_decides_nothing() -> None:
    for slow in range(12):
        calls = iter(range(1000))
        assert settled(lambda _, calls=calls, slow=slow: 50.0 if next(calls) == slow else 1.0, 128).most == 128


def test_what_the_cache_has_no_room_for_is_not_waited_for() -> None:
    sizing = settled(lambda rows: 1.0 if rows <= 40 else 9.0, 256, room=50)
    assert (sizing.most, list(sizing.rates)) == (32, [16, 32, 256])


def test_a_run_with_few_requests_is_never_held_up() -> None:
    sizing = Sizing(256)
    assert sizing.limit(0) == FIRST_SIZE
    sizing.admitted(FIRST_SIZE - 2, 0)
    assert not sizing.is_gathering
    assert sizing.chosen == 256


@given(ends=st.lists(st.integers(0, 20), min_size=60, max_size=400), data=st.data())
def test_whatever_ends_when_rows_are_let_in_again(ends: list[int], data: st.DataObject) -> None:
    sizing = Sizing(64)
    live = 0
    for number in ends:
        limit = sizing.limit(live)
        assert limit >= (1 if live == 0 else 0)
        live = max(live, limit)
        assert live <= 64
        sizing.admitted(live, 1)
        if data.draw(st.booleans()):
            sizing.timed(live, data.draw(st.floats(0.001, 1)))
        live = max(0, live - number)


def sizes_in_steps(sizing: Sizing, step_s: Callable[[int], float], num_steps: int) -> list[int]:
    """How many rows are live in each step, of which one ends with an answer."""
    live = sizing.most
    sizes: list[int] = []
    for _ in range(num_steps):
        live = max(live, sizing.limit(live))
        sizing.admitted(live, 9)
        sizing.timed(live, step_s(live))
        sizes.append(live)
        sizing.answered()
        live -= 1
    return sizes


def test_larger_sizes_are_tried_again_ever_more_rarely() -> None:
    def slow(rows: int) -> float:
        return 1.0 if rows <= 32 else 9.0

    sizing = settled(slow, 128)
    large = [step for step, size in enumerate(sizes_in_steps(sizing, slow, 40_000)) if size == 64]
    gaps = [gap for one, other in itertools.pairwise([0, *large]) if (gap := other - one) > 100]
    assert 3 <= len(gaps) <= 8
    assert all(later >= 1.5 * gap for gap, later in itertools.pairwise(gaps))
    assert len(large) <= 4 * len(gaps)
    assert sizing.most == 32


def test_what_made_large_sizes_slow_is_not_for_ever() -> None:
    sizing = settled(lambda rows: 1.0 if rows <= 32 else 9.0, 128)
    assert sizing.most == 32
    assert sizes_in_steps(sizing, lambda _: 1.0, 3000)[-1] == 128


# In the engine


def quiet(_sentence: str) -> None:
    pass


def run(step_s: Callable[[int], float], num_requests: int = 400) -> tuple[list[int], list[str], int]:
    """Tokens of each step, what was reported, and how many slots are of use, of a model whose steps take so long."""
    steps: list[int] = []

    def nap(input_ids: torch.Tensor) -> None:
        rows = input_ids.shape[1]
        steps.append(rows)
        time.sleep(step_s(rows))

    reports: list[str] = []
    engine = engine_of(
        tampered(nap),
        engine="slots",
        slots=SLOTS,
        cache_tokens=20 * SLOTS,
        window=SLOTS,
        sized=True,
        report=reports.append,
    )
    requests = [request(index, [1 + index % 90], max_new_tokens=14, ignore_eos=True) for index in range(num_requests)]
    answers(engine, requests)
    return steps, reports, engine.slots


def test_an_engine_whose_steps_jump_beyond_32_rows_keeps_32() -> None:
    steps, reports, slots = run(lambda rows: 0.002 if rows <= 32 else 0.04)
    assert [report[: report.index(" from")] for report in reports] == ["slots: 32 of 128"]
    assert slots == 32
    assert max(steps[-20:]) == 32
    assert sum(rows > 32 for rows in steps) <= 4, "those that are too many wait"


def test_an_engine_whose_steps_take_the_same_with_any_rows_uses_all() -> None:
    steps, reports, slots = run(lambda _: 0.01)
    assert [report[: report.index(" from")] for report in reports] == ["slots: 128 of 128"]
    assert slots == SLOTS
    assert sum(rows < SLOTS for rows in steps[:16]) == 13


def test_a_size_for_which_memory_runs_out_is_not_chosen() -> None:
    def run_out(rows: int) -> float:
        if rows >= 64:
            raise MemoryError
        return 0.003

    _, reports, slots = run(run_out, num_requests=200)
    assert reports[0].startswith("out of memory with 64 rows")
    assert slots == 32
    assert not any(report.startswith("slots") for report in reports)


@pytest.mark.parametrize("name", ["llama", "qwen3-next"])
def test_answers_are_the_same_as_without_sizing(name: str) -> None:
    requests = [
        request(index, prompt, temperature=index % 2, max_new_tokens=1 + index % 9)
        for index, prompt in enumerate(prompts(150, seed=8))
    ]
    plain = engine_of(tiny_model(name), engine="slots", slots=64)
    sized = engine_of(tiny_model(name), engine="slots", slots=64, sized=True, report=quiet)
    assert texts(answers(sized, requests)) == texts(answers(plain, requests))


def test_answers_of_one_token_lose_hardly_a_step() -> None:
    def num_steps(*, sized: bool) -> int:
        steps: list[int] = []
        model = tampered(lambda ids: steps.append(ids.shape[1]))
        engine = engine_of(model, engine="slots", slots=64, sized=sized, report=quiet)
        answers(engine, [request(index, [5] * 4, max_new_tokens=1) for index in range(640)])
        return len(steps)

    assert num_steps(sized=True) <= num_steps(sized=False) + 3
