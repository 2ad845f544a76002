"""Which live requests begin alike: what they share is computed once, copied, and read once a step; pure, no torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from pipeline.engines.kept_prefix import num_shared
from pipeline.engines.schedule import Seat, Sized

LEAST_SHARED_TOKENS = 16  # computing fewer costs no more than copying them in every layer


class Prompted(Sized, Protocol):
    """What is to be known of a request here: its prompt."""

    @property
    def prompt(self) -> tuple[int, ...]: ...


T = TypeVar("T", bound=Prompted)


@dataclass(frozen=True, slots=True)
class Alike(Generic[T]):
    """The first tokens of a request are those of another, and lie there as well."""

    seat: Seat[T]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Loan(Generic[T]):
    """The first tokens of one request are those of another, which computes them, or has done so already."""

    lender: Seat[T]
    borrower: Seat[T]
    num_tokens: int


class Prefixes(Generic[T]):
    """The prompts of the live requests in order: whoever shares most with a new one is its neighbour there.

    A borrower waits until its lender has computed what both begin with. Lenders are older than their borrowers, so
    nobody waits in a circle; if one leaves early, its borrowers compute for themselves. `latest_only`: what a lender
    holds is good for its latest token alone (recurrent states), so only a kept prefix lends.
    """

    def __init__(self, *, latest_only: bool = False) -> None:
        self._latest_only = latest_only
        self._prompts: list[tuple[tuple[int, ...], int]] = []  # and the slot
        self._num_shared: list[int] = []  # tokens that each shares with the one before it
        self._seats: dict[int, Seat[T]] = {}
        self._loans: dict[int, Loan[T]] = {}  # by the borrower's slot

    @property
    def held(self) -> frozenset[int]:
        """The slots of those that wait for a lender."""
        return frozenset(self._loans)

    def add(self, seat: Seat[T], kept: Seat[T] | None = None) -> None:
        """A request was admitted. One that is to be alone borrows nothing: it may not wait for others."""
        place = bisect_left(self._prompts, (seat.row.prompt, seat.slot))
        if self._latest_only:
            self._borrow_kept(seat, kept)
        elif not seat.row.alone:
            near = [self._seats[slot] for _, slot in self._prompts[max(0, place - 1) : place + 1]]
            loans = [
                Loan(lender, seat, num_shared(lender.row.prompt, seat.row.prompt, seat.row.num_known - 1))
                for lender in near
            ]
            best = max(loans, key=lambda loan: loan.num_tokens, default=None)
            if best is not None and best.num_tokens >= LEAST_SHARED_TOKENS:
                self._loans[seat.slot] = best
        self._prompts.insert(place, (seat.row.prompt, seat.slot))
        self._seats[seat.slot] = seat
        self._num_shared.insert(place, 0)
        for changed in (place, place + 1):
            if 0 < changed < len(self._prompts):
                self._num_shared[changed] = num_shared(self._prompts[changed - 1][0], self._prompts[changed][0])

    def _borrow_kept(self, seat: Seat[T], kept: Seat[T] | None) -> None:
        if kept is None or seat.row.alone or seat.row.num_known <= kept.size:
            return
        if seat.row.prompt[: kept.size] == kept.row.prompt:
            self._loans[seat.slot] = Loan(kept, seat, kept.size)

    def remove(self, seat: Seat[T]) -> None:
        """A request has left its slot, or a kept prefix its own."""
        if self._seats.pop(seat.slot, None) is not None:
            place = bisect_left(self._prompts, (seat.row.prompt, seat.slot))
            del self._prompts[place]
            shared = self._num_shared.pop(place)
            if place < len(self._num_shared):
                self._num_shared[place] = min(shared, self._num_shared[place])
        self._loans.pop(seat.slot, None)
        self._loans = {slot: loan for slot, loan in self._loans.items() if loan.lender is not seat}

    def settle(self) -> Iterator[Loan[T]]:
        """The loans whose tokens are computed, each once; the caller copies them before it asks for the next."""
        for slot, loan in list(self._loans.items()):
            if loan.lender.computed >= loan.num_tokens:
                del self._loans[slot]
                yield loan

    def alike(self) -> dict[int, Alike[T]]:
        """By slot, of those whose prompts are computed: whose first tokens they have.

        Of neighbours in the order of prompts one is chosen for all of them, as long as it shares with each at least
        half of what that one shares with the one before.
        """
        found: dict[int, Alike[T]] = {}
        chosen: Seat[T] | None = None
        with_chosen = with_previous = 0
        for (prompt, slot), shared in zip(self._prompts, self._num_shared, strict=True):
            seat = self._seats[slot]
            with_chosen, with_previous = min(with_chosen, shared), min(with_previous, shared)
            if seat.computed < len(prompt):
                continue
            if chosen is not None and with_chosen and with_chosen >= with_previous / 2:
                found[slot] = Alike(chosen, with_chosen)
            else:
                chosen, with_chosen = seat, len(prompt)
            with_previous = len(prompt)
        return found
