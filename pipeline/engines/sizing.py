"""How many rows are decoded together: growing sizes are tried at the beginning of a run, on its own answers; pure.

A step of more rows gives more tokens and takes longer, and where contexts are long or a machine is at its limits the
second may outgrow the first. What is timed is the run's own work with its own contexts, so that trying costs nothing.
"""

from __future__ import annotations

FIRST_SIZE = 16

_NUM_STEPS = 3  # timed at each size; the fastest counts, for whatever else happens makes a step slower
_SLACK = 0.03  # so much less than the best is as good, with fewer rows
_HOPELESS = 0.5  # of the best: at such a size no larger one is tried
_LEAST_SHARE = 0.75  # of the rows that were gathered: with fewer of them left a step tells nothing of the size
_FIRST_PATIENCE = 16  # times as many answers as rows, until larger sizes are tried again


class Sizing:
    """At most `most` rows of `full`; one size after the other is tried, each twice the one before, from `first` on.

    When as many rows are live as may be, nobody is let in until all of them decode and a few such steps are timed. Once
    `full` is timed too, the smallest size stays that is about as good as the best. Where less than `full` stays, larger
    ones are tried again after some answers: contexts change, and so does what else a machine does.
    """

    def __init__(self, full: int, first: int = FIRST_SIZE) -> None:
        self.most = min(first, full)
        self.chosen = full  # by the latest trial that came to its end; before that nothing speaks against any
        self._full = full
        self._is_trying = self.most < full
        self._gathered = 0  # rows that were live when the doors closed; 0: they are open
        self._steps: list[float] = []  # tokens a second of those timed with these rows
        self.rates: dict[int, float] = {}  # tokens a second by size, of the latest trial
        self._patience = _FIRST_PATIENCE
        self._num_left = 0  # answers until the next trial

    @property
    def is_gathering(self) -> bool:
        """Whether a step of nothing but decoding is waited for."""
        return self._gathered > 0

    def verdict(self) -> str:
        """What was found, for the user."""
        timed = ", ".join(f"{size} decode {rate:.0f} tokens/s" for size, rate in self.rates.items())
        return f"slots: {self.chosen} of {self._full} from here on, as timed in this run ({timed})"

    def limit(self, num_live: int) -> int:
        """How many rows may be live now that so many are."""
        if num_live < _LEAST_SHARE * self._gathered:  # answers are too short to time this size
            self._go_on()
        return num_live if self._gathered else self.most

    def admitted(self, num_live: int, num_waiting: int) -> None:
        """So many rows are live, and so many wait because neither slots nor room are left."""
        if self._is_trying and not self._gathered and num_live and (num_waiting or num_live >= self.most):
            self._gathered = num_live

    def timed(self, num_rows: int, seconds: float) -> bool:
        """A step decoded all live rows and did nothing else; whether a size was found with it."""
        if not self._gathered:
            return False
        self._steps.append(num_rows / seconds)
        if len(self._steps) < _NUM_STEPS:
            return False
        # Rows that the cache has no room for would not be there with all slots either.
        size = self.most if self._gathered >= self.most else self._full
        self.rates[size] = max(self._steps)
        self._go_on()
        return not self._is_trying

    def out_of_memory(self) -> None:
        """Too much is tried: one of the sizes that were timed before is chosen."""
        if self._is_trying:
            self._settle(self._best() if self.rates else self.most)

    def answered(self) -> None:
        """An answer came to its end."""
        if self._is_trying or self.most == self._full:
            return
        self._num_left -= 1
        if self._num_left <= 0:
            self._is_trying, self.rates = True, {}

    def _go_on(self) -> None:
        """To the next size, or to the end of the trial."""
        self._gathered, self._steps = 0, []
        latest, best = (list(self.rates.values())[-1], max(self.rates.values())) if self.rates else (0.0, 0.0)
        if self._full in self.rates or latest < _HOPELESS * best:
            self._settle(self._best())
        elif self.most == self._full:  # it could not be timed: nothing speaks against it
            self._settle(self._full)
        else:
            self.most = min(2 * self.most, self._full)

    def _best(self) -> int:
        enough = (1 - _SLACK) * max(self.rates.values())
        return min(size for size, rate in self.rates.items() if rate >= enough)

    def _settle(self, size: int) -> None:
        first = min(self.rates, default=size)
        self._patience = 2 * self._patience if size == first else _FIRST_PATIENCE
        self._num_left = self._patience * size
        self.most = self.chosen = size
        self._is_trying = False
        self._gathered, self._steps = 0, []
