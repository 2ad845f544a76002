"""Which live requests begin alike, so that what they share is computed once and copied; pure, without torch."""

from __future__ import annotations

from bisect import bisect_left, insort
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
        self._seats: dict[int, Seat[T]] = {}
        self._loans: dict[int, Loan[T]] = {}  # by the borrower's slot

    @property
    def held(self) -> frozenset[int]:
        """The slots of those that wait for a lender."""
        return frozenset(self._loans)

    def add(self, seat: Seat[T], kept: Seat[T] | None = None) -> None:
        """A request was admitted. One that is to be alone borrows nothing: it may not wait for others."""
        if self._latest_only:
            self._borrow_kept(seat, kept)
            return
        entry = (seat.row.prompt, seat.slot)
        place = bisect_left(self._prompts, entry)
        if not seat.row.alone:
            near = [self._seats[slot] for _, slot in self._prompts[max(0, place - 1) : place + 1]]
            loans = [
                Loan(lender, seat, num_shared(lender.row.prompt, seat.row.prompt, seat.row.num_known - 1))
                for lender in near
            ]
            best = max(loans, key=lambda loan: loan.num_tokens, default=None)
            if best is not None and best.num_tokens >= LEAST_SHARED_TOKENS:
                self._loans[seat.slot] = best
        insort(self._prompts, entry)
        self._seats[seat.slot] = seat

    def _borrow_kept(self, seat: Seat[T], kept: Seat[T] | None) -> None:
        if kept is None or seat.row.alone or seat.row.num_known <= kept.size:
            return
        if seat.row.prompt[: kept.size] == kept.row.prompt:
            self._loans[seat.slot] = Loan(kept, seat, kept.size)

    def remove(self, seat: Seat[T]) -> None:
        """A request has left its slot, or a kept prefix its own."""
        if self._seats.pop(seat.slot, None) is not None:
            del self._prompts[bisect_left(self._prompts, (seat.row.prompt, seat.slot))]
        self._loans.pop(seat.slot, None)
        self._loans = {slot: loan for slot, loan in self._loans.items() if loan.lender is not seat}

    def settle(self) -> Iterator[Loan[T]]:
        """The loans whose tokens are computed, each once; the caller copies them before it asks for the next."""
        for slot, loan in list(self._loans.items()):
            if loan.lender.computed >= loan.num_tokens:
                del self._loans[slot]
                yield loan
