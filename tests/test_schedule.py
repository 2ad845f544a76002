"""The schedule gives every request its turn, never more slots or room than there are, and long ones first."""

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engines.schedule import Room, Schedule


@dataclass
class Request:
    """A request of `prompt` tokens and `answer` more, of which `given` are there."""

    prompt: int
    answer: int
    given: int = 0
    alone: bool = False
    computed: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])

    @property
    def num_known(self) -> int:
        return self.prompt + self.given

    @property
    def num_most(self) -> int:
        return self.prompt + self.answer


sizes = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=40)


@given(sizes, st.integers(1, 6), st.integers(1, 200), st.integers(1, 50))
def test_every_request_is_computed_once_within_slots_room_and_budget(
    shapes: list[tuple[int, int]], num_slots: int, room_tokens: int, budget: int
) -> None:
    schedule: Schedule[Request] = Schedule(num_slots=num_slots, room_tokens=room_tokens)
    requests = [Request(*shape) for shape in shapes]
    for request in requests:
        schedule.add(request)
    for _ in range(100_000):
        schedule.admit()
        if not schedule.live:
            break
        seats = list(schedule.live.values())
        assert len({seat.slot for seat in seats}) == len(seats) <= num_slots
        assert all(0 <= seat.slot < num_slots for seat in seats)
        pieces = sorted((seat.start, seat.start + seat.size) for seat in seats)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(pieces))
        assert pieces[-1][1] <= max(room_tokens, seats[0].size if len(seats) == 1 else 0)

        parts = schedule.parts(budget)
        assert parts, "whoever is live comes to something"
        decoding = [part for part in parts if part.begin > 0 and part.end - part.begin == 1]
        assert sum(part.end - part.begin for part in parts) <= max(budget, len(decoding) + 1)
        for part in parts:
            seat = part.seat
            assert part.begin == seat.computed < part.end <= seat.row.num_known
            seat.row.computed.append((part.begin, part.end))
            seat.computed = part.end
            if part.gives_token:
                seat.row.given += 1
                if seat.row.given == seat.row.answer:
                    schedule.release(seat)
    assert schedule.num_waiting == 0
    for request in requests:
        assert request.given == request.answer
        ends = [0, *(end for _, end in request.computed)]
        assert [begin for begin, _ in request.computed] == ends[:-1]
        assert ends[-1] == request.num_most - 1, "the last token of an answer is not computed on"


def drain(schedule: Schedule[Request]) -> list[float]:
    """Run to the end; how full the slots were in each step."""
    full: list[float] = []
    while True:
        schedule.admit()
        if not schedule.live:
            return full
        parts = schedule.parts(64)
        full.append(len(schedule.live) / schedule.num_slots)
        for part in parts:
            part.seat.computed = part.end
            if part.gives_token:
                part.seat.row.given += 1
                if part.seat.row.given == part.seat.row.answer:
                    schedule.release(part.seat)


def test_slots_stay_full_until_the_tail_and_the_tail_is_short() -> None:
    schedule: Schedule[Request] = Schedule(num_slots=8, room_tokens=8 * 150)
    for number in range(100):
        schedule.add(Request(10 + number % 30, 20 + 7 * number % 100))
    full = drain(schedule)
    before_tail = full[: -len(full) // 10]
    assert sum(before_tail) / len(before_tail) > 0.95


def test_one_long_request_does_not_empty_the_slots() -> None:
    schedule: Schedule[Request] = Schedule(num_slots=8, room_tokens=400)
    schedule.add(Request(10, 310))
    for _ in range(30):
        schedule.add(Request(5, 5))
    schedule.admit()
    assert len(schedule.live) == 8


def test_a_request_that_does_not_fit_is_passed_but_not_for_ever() -> None:
    schedule: Schedule[Request] = Schedule(num_slots=4, room_tokens=100)
    first = [Request(10, 10) for _ in range(4)]
    for request in first:
        schedule.add(request)
    schedule.admit()
    long = Request(50, 50)
    schedule.add(long)
    for _ in range(1000):
        schedule.release(next(iter(schedule.live.values())))
        schedule.add(Request(10, 10))
        schedule.admit()
        if any(seat.row is long for seat in schedule.live.values()):
            return
        if not schedule.live:
            break
    pytest.fail("the long request never had its turn")


def test_who_is_to_be_alone_is() -> None:
    schedule: Schedule[Request] = Schedule(num_slots=4, room_tokens=1000)
    for _ in range(3):
        schedule.add(Request(5, 5))
    lonely = Request(7, 3, alone=True)
    schedule.add(lonely)
    schedule.admit()
    assert [part.seat.row for part in schedule.parts(100)] == [lonely]


@given(st.integers(1, 100), st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=60))
def test_room_is_never_given_twice_and_comes_back_whole(size: int, steps: list[tuple[bool, int]]) -> None:
    room = Room(size)
    taken: list[tuple[int, int]] = []
    for takes, amount in steps:
        if takes:
            start = room.take(amount)
            if start is not None:
                assert 0 <= start <= size - amount
                assert all(start + amount <= begin or begin + length <= start for begin, length in taken)
                taken.append((start, amount))
        elif taken:
            room.give_back(*taken.pop(amount % len(taken)))
    for piece in taken:
        room.give_back(*piece)
    assert room.take(size) == 0


def decoding_beside_a_prompt() -> Schedule[Request]:
    """Four that decode, and two that came after and have prompts of 30 tokens."""
    schedule: Schedule[Request] = Schedule(num_slots=6, room_tokens=1000)
    for _ in range(4):
        schedule.add(Request(10, 10))
    schedule.admit()
    for part in schedule.parts(100):
        part.seat.computed = part.end
        part.seat.row.given = 1
    for _ in range(2):
        schedule.add(Request(30, 10))
    schedule.admit()
    return schedule


def test_answers_wait_for_prompts_where_these_go_first() -> None:
    schedule = decoding_beside_a_prompt()
    assert [part.end - part.begin for part in schedule.parts(50)] == [1, 1, 1, 1, 30, 16]
    for sizes_of_parts in ([30, 20], [10]):
        parts = schedule.parts(50, prompts_first=True)
        assert [part.end - part.begin for part in parts] == sizes_of_parts
        for part in parts:
            part.seat.computed = part.end
            part.seat.row.given = part.gives_token
    assert [part.end - part.begin for part in schedule.parts(50, prompts_first=True)] == [1] * 6


def test_who_came_last_waits_where_rows_are_too_many() -> None:
    schedule = decoding_beside_a_prompt()
    first = list(schedule.live.values())[:3]
    schedule.most_rows = 3
    assert [part.seat for part in schedule.parts(50)] == first
    schedule.release(first[0])
    assert schedule.admit() == []
    assert [part.seat for part in schedule.parts(50)] == [*first[1:], list(schedule.live.values())[2]]
