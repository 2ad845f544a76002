"""Amounts over the time in which a run was at work, in a fixed number of bins whatever its length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NUM_BINS = 240


@dataclass(frozen=True, slots=True)
class Stretch:
    """One session on the axis of working time, in seconds from the run's first: loading, then generation.

    The time between sessions is left out: a night's run that is resumed a week later still fits on a page.
    """

    begin: float
    generation: float  # where loading ends
    end: float
    generation_at: float  # Unix time at `generation`

    def position(self, unix_time: float) -> float:
        """Where a moment of this session's generation lies; clocks may jump, so never outside of it."""
        return min(self.end, max(self.generation, self.generation + unix_time - self.generation_at))


class Axis:
    """The working time of all sessions, one after the other."""

    def __init__(self, sessions: Sequence[tuple[float, float, float]]) -> None:
        """Each: the Unix time at which generation began, seconds of loading before it, and of generation."""
        self.stretches: list[Stretch] = []
        end = 0.0
        for generation_at, load_s, duration in sessions:
            begin, generation = end, end + load_s
            end = generation + duration
            self.stretches.append(Stretch(begin, generation, end, generation_at))
        self.length = end


class Spread:
    """Amounts that are spread evenly over intervals of an axis, added up by bin; each takes the same short time."""

    def __init__(self, length: float, num_bins: int = NUM_BINS) -> None:
        self._num_bins = num_bins
        self._length = length
        self.width = length / num_bins if length > 0 else 1.0
        self._own = [0.0] * num_bins
        self._change = [0.0] * (num_bins + 1)  # of what every bin from here on gets

    def add(self, begin: float, end: float, amount: float) -> None:
        """Spread `amount` over `begin` to `end`; over no time at all it goes into one bin."""
        first, last = self._bin(begin), self._bin(end)
        if first == last:
            self._own[first] += amount
            return
        density = amount / (end - begin)
        self._own[first] += density * ((first + 1) * self.width - begin)
        self._own[last] += density * (end - last * self.width)
        self._change[first + 1] += density * self.width
        self._change[last] -= density * self.width

    def totals(self) -> list[float]:
        """The amount in each bin."""
        level = 0.0
        totals: list[float] = []
        for own, change in zip(self._own, self._change, strict=False):
            level += change
            totals.append(own + max(0.0, level))
        return totals

    def _bin(self, position: float) -> int:
        return min(self._num_bins - 1, max(0, int(position / self.width)))
