"""How much is computed together while memory is short: what fits is remembered, and more is tried now and then."""

from __future__ import annotations

_FIRST_PATIENCE = 16
_MOST_PATIENCE = 4096


class Headroom:
    """At most `most` of something, rows or tokens, of `full`.

    `shrink` halves it after memory ran out, and `grow` takes it back at once to what is known to fit. A quarter more is
    tried only after so many answers: twice as many after each time that memory ran out, half as many after each time
    that it did not.
    """

    def __init__(self, full: int, *, least: int = 1) -> None:
        self.most = self._fits = self._full = full
        self._least = least
        self._patience = self._left = 0  # answers from one trial of more to the next, and until it

    def shrink(self, num: int) -> None:
        """Memory ran out with so many together."""
        self.most = max(self._least, min(self.most, num) // 2)
        if num <= self._fits:  # it did fit once: there is less memory now
            self._fits = self.most
        self._patience = self._left = min(max(2 * self._patience, _FIRST_PATIENCE), _MOST_PATIENCE)

    def grow(self, num_answers: int = 1) -> None:
        """So many answers came to their end with as many together as may be."""
        if self.most < self._fits:
            self.most = min(self.most + self.most // 4 + 1, self._fits)
            return
        if self.most > self._fits:  # what was tried does fit
            self._fits = self.most
            self._patience = self._left = self._patience // 2
        self._left -= num_answers
        if self._left <= 0:
            self.most = min(self.most + self.most // 4 + 1, self._full)
