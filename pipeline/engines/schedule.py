"""Who computes what in the next step: slots, room in the cache, and how much of each prompt; pure, without torch.

A request holds a slot and room for all of its tokens, prompt and answer, from its first step to its last: what is
admitted always finishes. Among those that wait, the longest goes first, so that a lack of memory shows early and the
tail of a run is short; a shorter one may pass one that does not fit yet, but not for ever.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Container
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

_MOST_PASSES = 64  # so often may shorter requests pass one that does not fit


class Sized(Protocol):
    """What the schedule has to know of a request. `alone`: it is to be computed without neighbours."""

    alone: bool

    @property
    def num_known(self) -> int:
        """Tokens whose place in the cache is to be computed: prompt, and the answer so far."""
        ...

    @property
    def num_most(self) -> int:
        """Tokens at the end, if the answer becomes as long as it may."""
        ...


T = TypeVar("T", bound=Sized)


@dataclass(slots=True)
class Seat(Generic[T]):
    """An admitted request: its slot, its room in the cache, and how many of its tokens are computed."""

    row: T
    slot: int
    start: int  # of its room
    size: int  # of its room, in tokens
    computed: int = 0


@dataclass(frozen=True, slots=True)
class Part(Generic[T]):
    """Tokens `begin` to `end` of a request, computed in one step."""

    seat: Seat[T]
    begin: int
    end: int

    @property
    def gives_token(self) -> bool:
        """Whether the next token of the answer follows from this part."""
        return self.end == self.seat.row.num_known


class Room:
    """Places 0 to `size` of the cache, given out in contiguous pieces, first fit."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free: list[tuple[int, int]] = [(0, size)]  # (start, end), apart from each other, in order

    def take(self, size: int) -> int | None:
        """The start of a free piece of that size; None where there is none."""
        for place, (start, end) in enumerate(self._free):
            if end - start >= size:
                self._free[place : place + 1] = [(start + size, end)] if end - start > size else []
                return start
        return None

    def give_back(self, start: int, size: int) -> None:
        insort(self._free, (start, start + size))
        merged: list[tuple[int, int]] = []
        for begin, end in self._free:
            if merged and merged[-1][1] == begin:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((begin, end))
        self._free = merged


class Schedule(Generic[T]):
    """At most `num_slots` requests at a time in `room_tokens` of cache; `most_rows` may be lowered for a while.

    Then those that came last wait where they are.

    Beside them one prefix may be kept, in a slot after theirs and in room of theirs, which it leaves to a request that
    would have to run alone otherwise.
    """

    def __init__(self, *, num_slots: int, room_tokens: int) -> None:
        self.num_slots = self.most_rows = num_slots
        self.live: dict[int, Seat[T]] = {}
        self.kept: Seat[T] | None = None
        self._room = self._usual_room = Room(room_tokens)
        self._free_slots = list(range(num_slots - 1, -1, -1))  # the lowest is taken first
        self._waiting: list[T] = []  # the longest last
        self._num_passes = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def room_tokens(self) -> int:
        """Tokens that the cache has to hold now: more than usual only while a longer request runs alone."""
        return self._room.size

    def add(self, row: T) -> None:
        insort(self._waiting, row, key=_size)

    def keep(self, row: T) -> None:
        """Keep this prefix, if that leaves room for the longest that waits."""
        longest = self._waiting[-1].num_most if self._waiting else 0
        if self.kept is None and self._room is self._usual_room and row.num_most + longest <= self._room.size:
            start = self._room.take(row.num_most)
            if start is not None:
                self.kept = Seat(row, self.num_slots, start, row.num_most)

    def drop_kept(self) -> None:
        """The prefix is of no more use, or in the way."""
        if self.kept is not None:
            self._usual_room.give_back(self.kept.start, self.kept.size)
            self.kept = None

    def admit(self) -> list[Seat[T]]:
        """Give slots and room to those that wait, as far as both reach."""
        admitted: list[Seat[T]] = []
        while self._waiting and len(self.live) < self.most_rows:
            seat = self._seat_next()
            if seat is None:
                break
            admitted.append(seat)
        return admitted

    def parts(self, budget: int, held: Container[int] = (), *, prompts_first: bool = False) -> list[Part[T]]:
        """What to compute next: a token of each answer under way, then prompts up to `budget` tokens in all.

        Slots that are `held` have to wait; with `prompts_first` answers wait too as long as prompts can be computed.
        Empty only if nothing is live or all are held.
        """
        seats = list(self.live.values())[: self.most_rows]
        alone = next((seat for seat in seats if seat.row.alone), None)
        decoding: list[Part[T]] = []
        beginning: list[Part[T]] = []
        kept = () if self.kept is None or self.kept.computed == self.kept.size else (self.kept,)
        for seat in (*kept, *seats) if alone is None else (alone,):
            if seat.slot in held:
                continue
            left = seat.row.num_known - seat.computed
            if left == 1 and seat.computed:
                decoding.append(Part(seat, seat.computed, seat.computed + 1))
            else:
                beginning.append(Part(seat, seat.computed, min(seat.row.num_known, seat.size)))
        if prompts_first and beginning:
            decoding = []
        budget = max(budget - len(decoding), 1)
        prefill: list[Part[T]] = []
        for part in sorted(beginning, key=lambda part: part.seat.row.num_known - part.begin):
            end = min(part.end, part.begin + budget)
            prefill.append(Part(part.seat, part.begin, end))
            budget -= end - part.begin
            if budget <= 0:
                break
        return decoding + prefill

    def release(self, seat: Seat[T]) -> None:
        """The request is answered, or has to begin anew: its slot and room are free."""
        del self.live[seat.slot]
        self._free_slots.append(seat.slot)
        self._free_slots.sort(reverse=True)
        self._room.give_back(seat.start, seat.size)
        if not self.live:
            self._room = self._usual_room

    def _seat_next(self) -> Seat[T] | None:
        for place in range(len(self._waiting) - 1, -1, -1):
            row = self._waiting[place]
            start = self._room.take(row.num_most)
            if start is None and not self.live and place == len(self._waiting) - 1:
                self.drop_kept()
                start = self._room.take(row.num_most)
                if start is None:
                    self._room = Room(row.num_most)  # longer than the whole cache: it runs alone
                    start = self._room.take(row.num_most)
            if start is None:
                self._num_passes += place == len(self._waiting) - 1
                if self._num_passes > _MOST_PASSES:
                    return None
                continue
            if place == len(self._waiting) - 1:
                self._num_passes = 0
            del self._waiting[place]
            seat = Seat(row, self._free_slots.pop(), start, row.num_most)
            self.live[seat.slot] = seat
            return seat
        return None


def _size(row: Sized) -> int:
    return row.num_most
