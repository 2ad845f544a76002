"""What requests begin with alike is computed once, and the answers are those of each alone."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engines import slot_cache
from pipeline.engines.kept_prefix import KeptPrefix, common_prefix
from pipeline.engines.prefixes import LEAST_SHARED_TOKENS, Prefixes
from pipeline.engines.schedule import Schedule, Seat
from pipeline.kernels.attention import attend_one
from tests.tiny_models import PACKED, answers, engine_of, prompts, request, tampered, texts, tiny_model

SHARED = [7 + place % 60 for place in range(40)]


@dataclass(eq=False)
class Prompt:
    """A request of this prompt and `answer` tokens more."""

    prompt: tuple[int, ...]
    answer: int
    given: int = 0
    alone: bool = False

    @property
    def num_known(self) -> int:
        return len(self.prompt) + self.given

    @property
    def num_most(self) -> int:
        return len(self.prompt) + self.answer


alike = st.tuples(st.integers(1, 3), st.lists(st.integers(0, 1), max_size=24), st.integers(1, 6))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40), alike, st.booleans()), min_size=1, max_size=24))
def test_everyone_comes_to_the_end_and_borrows_only_what_is_its_own_and_computed(
    shapes: list[tuple[int, int, tuple[int, list[int], int], bool]],
) -> None:
    schedule: Schedule[Prompt] = Schedule(num_slots=5, room_tokens=600)
    prefixes: Prefixes[Prompt] = Prefixes()
    rows = [
        Prompt((group,) * length + (first, *others), answer, alone=alone and length % 5 == 0)
        for group, length, (first, others, answer), alone in shapes
    ]
    for row in rows:
        schedule.add(row)
    held_back: dict[int, tuple[int, ...]] = {}  # by slot: tokens whose keys and values its room holds
    for _ in range(10_000):
        for seat in schedule.admit():
            prefixes.add(seat)
            held_back[seat.slot] = ()
        if not schedule.live:
            break
        for loan in prefixes.settle():
            lender, borrower, count = loan.lender, loan.borrower, loan.num_tokens
            assert schedule.live[lender.slot] is lender
            assert schedule.live[borrower.slot] is borrower
            assert borrower.computed == 0
            assert LEAST_SHARED_TOKENS <= count < borrower.row.num_known
            held_back[borrower.slot] = held_back[lender.slot][:count]
            borrower.computed = count
        for slot, other in prefixes.alike().items():
            assert schedule.live[other.seat.slot] is other.seat
            assert other.seat.slot != slot
            assert held_back[slot][: other.num_tokens] == held_back[other.seat.slot][: other.num_tokens]
            assert 0 < other.num_tokens <= len(schedule.live[slot].row.prompt) <= schedule.live[slot].computed
        parts = schedule.parts(30, prefixes.held)
        assert parts, "someone can always go on"
        for part in parts:
            row, slot = part.seat.row, part.seat.slot
            held_back[slot] += (row.prompt + (9,) * row.given)[part.begin : part.end]
            part.seat.computed = part.end
            assert held_back[slot] == (row.prompt + (9,) * row.given)[: part.end]
            if part.gives_token:
                row.given += 1
                if row.given == row.answer:
                    schedule.release(part.seat)
                    prefixes.remove(part.seat)
    assert [row.given for row in rows] == [row.answer for row in rows]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 60), st.integers(1, 30)), max_size=12), st.integers(0, 70))
def test_the_common_prefix_saves_most_and_leaves_each_a_token(shapes: list[tuple[int, int, int]], length: int) -> None:
    prompts = [(7,) * length + (group,) * shared + (8,) * rest for group, shared, rest in shapes]
    prefix = common_prefix(prompts)
    if not prefix:
        return
    sharing = [prompt for prompt in prompts if prompt[: len(prefix)] == prefix]
    assert len(sharing) >= 2
    assert any(len(prompt) > len(prefix) for prompt in sharing)
    if length >= 32 and len(prompts) >= 2:
        assert len(prefix) * (len(sharing) - 1) >= length * (len(prompts) - 1)


def test_a_common_prefix_is_found_beside_prompts_that_do_not_share_it() -> None:
    shared = tuple(range(100, 160))
    prompts = [(*shared, place, 1, 2) for place in range(9)] + [(5, 6), tuple(range(50)), (300,) * 80]
    assert common_prefix(prompts) == shared
    assert common_prefix(prompts[-3:]) == common_prefix([]) == ()


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 20), st.integers(1, 6)), min_size=1, max_size=20),
    st.integers(60, 300),
)
def test_a_kept_prefix_is_lent_whole_and_gives_way(shapes: list[tuple[bool, int, int]], room: int) -> None:
    """It never gives a token, and a request that needs its room gets it."""
    shared = (7,) * 40
    schedule: Schedule[Prompt | KeptPrefix] = Schedule(num_slots=3, room_tokens=room)
    prefixes: Prefixes[Prompt | KeptPrefix] = Prefixes(latest_only=True)
    rows = [Prompt((shared if shares else ()) + (1,) * rest, answer) for shares, rest, answer in shapes]
    for row in rows:
        schedule.add(row)
    schedule.keep(KeptPrefix(shared))
    for _ in range(2_000):
        for seat in schedule.admit():
            prefixes.add(seat, schedule.kept)
        if not schedule.live:
            break
        for loan in prefixes.settle():
            assert loan.lender is schedule.kept
            assert loan.lender.computed == loan.num_tokens == len(shared), "whole, and nothing after it"
            loan.borrower.computed = loan.num_tokens
        parts = schedule.parts(16, prefixes.held)
        assert parts
        for part in parts:
            part.seat.computed = part.end
            assert part.end <= part.seat.size
            if part.gives_token:
                row = part.seat.row
                assert isinstance(row, Prompt)
                row.given += 1
                if row.given == row.answer:
                    schedule.release(part.seat)
                    prefixes.remove(part.seat)
    assert [row.given for row in rows] == [row.answer for row in rows]


@pytest.mark.parametrize("name", PACKED)
def test_answers_of_prompts_that_begin_alike_are_those_of_each_alone(name: str) -> None:
    tails = [[], *prompts(10, seed=6)]
    requests = [
        request(index, SHARED[: 40 - index % 3] + tail, max_new_tokens=4 + index % 9)
        for index, tail in enumerate(tails)
    ]
    requests.append(replace(request(11, SHARED), generated=(3, 4, 5)))
    whole = texts(answers(engine_of(tiny_model(name)), requests))
    for slots, step_tokens in ((3, 16), (12, 512)):
        found = answers(engine_of(tiny_model(name), engine="slots", slots=slots, step_tokens=step_tokens), requests)
        assert texts(found) == whole


@pytest.mark.parametrize("name", ["llama", "qwen3-next", "qwen3.5"])
def test_what_is_shared_is_computed_once(name: str) -> None:
    sizes: list[int] = []
    model = tampered(lambda ids: sizes.append(ids.shape[1]), name=name)
    requests = [request(index, [*SHARED, index], max_new_tokens=3 + index, ignore_eos=True) for index in range(9)]
    answers(engine_of(model, engine="slots", slots=3), requests)
    assert sum(sizes) == len(SHARED) + 9 + sum(2 + index for index in range(9))


def test_a_lender_that_fails_leaves_its_borrowers_their_answers() -> None:
    def refuse(input_ids: torch.Tensor) -> None:
        if (input_ids == 200).any():
            raise RuntimeError("not this one")

    # The longest is admitted first and so lends to all others.
    requests = [request(0, [*SHARED, 200, *SHARED]), *(request(index, [*SHARED, index]) for index in range(1, 6))]
    found = answers(engine_of(tampered(refuse), engine="slots", slots=6), requests)
    assert found.pop((0, 0)).error
    assert texts(found) == texts(answers(engine_of(tiny_model("llama")), requests[1:]))


def test_a_kept_prefix_whose_step_fails_costs_nobody_an_answer() -> None:
    calls = 0

    def fail_first(_: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("once")

    requests = [request(index, [*SHARED, index], max_new_tokens=6) for index in range(6)]
    found = answers(engine_of(tampered(fail_first, name="qwen3-next"), engine="slots"), requests)
    assert texts(found) == texts(answers(engine_of(tiny_model("qwen3-next")), requests))


def test_another_instruction_takes_the_place_of_one_that_nobody_has_any_more() -> None:
    sizes: list[int] = []
    model = tampered(lambda ids: sizes.append(ids.shape[1]), name="qwen3-next")
    other = [90 + place % 50 for place in range(48)]
    requests = [request(index, [*SHARED, index], max_new_tokens=2, ignore_eos=True) for index in range(20)]
    requests += [request(20 + index, [*other, index], max_new_tokens=2, ignore_eos=True) for index in range(40)]
    found = answers(engine_of(model, engine="slots", slots=2, window=2), requests)
    assert texts(found) == texts(answers(engine_of(tiny_model("qwen3-next")), requests))
    whole = sum(len(one.token_ids) + 1 for one in requests)
    assert sum(sizes) < whole / 4, "both instructions are computed a few times, not sixty"


def test_those_that_begin_alike_all_name_one_of_them() -> None:
    system, examples = (1,) * 100, (2,) * 400
    prompts = [
        *[(*system, *examples, 3 + place, *(4,) * place) for place in range(3)],
        *[(*system, *(5,) * 700, place) for place in range(3)],  # share more with each other than with those
        (*system, 9),
        (10, 11),
    ]
    live = [Seat(Prompt(prompt, 1), slot, 1000 * slot, 1000, len(prompt)) for slot, prompt in enumerate(prompts)]
    prefixes: Prefixes[Prompt] = Prefixes()
    for seat in reversed(live):
        prefixes.add(seat)

    def named() -> dict[int, tuple[int, int]]:
        return {slot: (other.seat.slot, other.num_tokens) for slot, other in prefixes.alike().items()}

    assert named() == {1: (0, 500), 2: (0, 500), 3: (0, 100), 5: (4, 800), 6: (4, 100)}
    prefixes.remove(live[0])
    live[3].computed = 700  # its prompt is not yet computed
    assert named() == {2: (1, 500), 4: (1, 100), 6: (5, 100)}
    prefixes.remove(live[4])
    assert named() == {2: (1, 500), 5: (1, 100), 6: (1, 100)}


def test_a_step_reads_what_rows_begin_with_at_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor | None] = []

    def spy(*numbers: Any) -> torch.Tensor:
        seen.append(numbers[7])
        return attend_one(*numbers)

    monkeypatch.setattr(slot_cache, "attend_one", spy)
    engine = engine_of(tiny_model("llama"), engine="slots", slots=4)
    answers(engine, [request(index, [*SHARED, index], max_new_tokens=6, ignore_eos=True) for index in range(4)])
    together = [alike.tolist() for alike in seen if alike is not None and len(alike) == 4]
    assert together
    for alike in together:
        assert sorted(count for _, count in alike) == [0, 32, 32, 32]
        assert len({start for start, count in alike if count}) == 1


def test_what_is_borrowed_is_read_of_states_too() -> None:
    """A control: without the copies of states the borrowers answer otherwise."""
    engine = engine_of(tiny_model("qwen3-next"), engine="slots")
    requests = [request(index, [*SHARED, index], max_new_tokens=6) for index in range(4)]
    expected = texts(answers(engine, requests))
    engine._model._states.copy = lambda *_: None
    assert texts(answers(engine, requests)) != expected


def test_what_is_borrowed_is_read() -> None:
    """A control: with a lender whose keys and values are spoilt on the way, the borrowers answer otherwise."""
    engine = engine_of(copy.deepcopy(tiny_model("llama")), engine="slots")
    requests = [request(index, [*SHARED, index], max_new_tokens=6) for index in range(4)]
    expected = texts(answers(engine, requests))
    cache = engine._model.cache
    cache.copy = lambda *_: None
    for pools in cache._pools.values():
        for pool in pools:
            with torch.inference_mode():
                pool.normal_()
    assert texts(answers(engine, requests)) != expected
