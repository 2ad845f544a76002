"""Which live requests begin alike, so that what they share is computed once and copied; pure, without torch."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

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
    nobody waits in a circle; if one leaves early, its borrowers compute for themselves.
    """

    def __init__(self) -> None:
        self._prompts: list[tuple[tuple[int, ...], int]] = []  # and the slot
        self._seats: dict[int, Seat[T]] = {}
        self._loans: dict[int, Loan[T]] = {}  # by the borrower's slot

    @property
    def held(self) -> frozenset[int]:
        """The slots of those that wait for a lender."""
        return frozenset(self._loans)

    def add(self, seat: Seat[T]) -> None:
        """A request was admitted. One that is to be alone borrows nothing: it may not wait for others."""
        entry = (seat.row.prompt, seat.slot)
        place = bisect_left(self._prompts, entry)
        if not seat.row.alone:
            near = [self._seats[slot] for _, slot in self._prompts[max(0, place - 1) : place + 1]]
            loans = [Loan(lender, seat, _num_shared(lender.row.prompt, seat.row)) for lender in near]
            best = max(loans, key=lambda loan: loan.num_tokens, default=None)
            if best is not None and best.num_tokens >= LEAST_SHARED_TOKENS:
                self._loans[seat.slot] = best
        insort(self._prompts, entry)
        self._seats[seat.slot] = seat

    def remove(self, seat: Seat[T]) -> None:
        """A request has left its slot."""
        del self._seats[seat.slot]
        del self._prompts[bisect_left(self._prompts, (seat.row.prompt, seat.slot))]
        self._loans.pop(seat.slot, None)
        self._loans = {slot: loan for slot, loan in self._loans.items() if loan.lender is not seat}

    def settle(self) -> Iterator[Loan[T]]:
        """The loans whose tokens are computed, each once; the caller copies them before it asks for the next."""
        for slot, loan in list(self._loans.items()):
            if loan.lender.computed >= loan.num_tokens:
                del self._loans[slot]
                yield loan


def _num_shared(prompt: Sequence[int], row: Prompted) -> int:
    """Tokens that both begin with; one at least is left to `row`, for the scores after it."""
    least, most = 0, min(len(prompt), len(row.prompt), row.num_known - 1)
    while least < most:  # slices compare as fast as memory; a loop over tokens does not
        middle = (least + most + 1) // 2
        if prompt[:middle] == row.prompt[:middle]:
            least = middle
        else:
            most = middle - 1
    return least
