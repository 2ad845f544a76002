"""What memory did not suffice for is remembered, and tried again ever more rarely, but always again."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.engines.headroom import Headroom


def events_with_room_for(fits: int, full: int, num_answers: int) -> tuple[list[int], Headroom]:
    """The answers before which memory ran out, of an engine that always takes as much as it may."""
    headroom = Headroom(full)
    events: list[int] = []
    for answer in range(num_answers):
        while headroom.most > fits:
            events.append(answer)
            headroom.shrink(headroom.most)
        headroom.grow()
    return events, headroom


@given(full=st.integers(2, 300), data=st.data())
def test_a_limit_that_stays_is_run_into_ever_more_rarely_and_used_well(full: int, data: st.DataObject) -> None:
    fits = data.draw(st.integers(1, full - 1))
    events, headroom = events_with_room_for(fits, full, 4000)
    at_first = sum(answer == 0 for answer in events)
    assert at_first <= full.bit_length()
    assert 1 <= len(events) - at_first <= 12  # tried again, and not for every answer
    assert headroom._fits <= fits < 2 * (headroom._fits + 1)


@given(full=st.integers(16, 300), nums=st.lists(st.integers(1, 300), max_size=8), least=st.integers(1, 16))
def test_it_stays_within_its_bounds_and_comes_back(full: int, nums: list[int], least: int) -> None:
    headroom = Headroom(full, least=least)
    for num in nums:
        before = headroom.most
        headroom.shrink(num)
        assert least <= headroom.most <= max(least, before // 2)
    for _ in range(20_000):
        headroom.grow()
        assert least <= headroom.most <= full
    assert headroom.most == full


def test_a_passing_shortage_is_soon_forgotten() -> None:
    headroom = Headroom(64)
    headroom.shrink(64)
    assert headroom.most == 32
    for _ in range(16 + 8 + 4):
        headroom.grow()
    assert headroom.most == 64
