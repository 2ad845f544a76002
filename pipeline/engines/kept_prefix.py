"""The beginning that most prompts of a job share, computed once and kept for as long as it is of use; pure.

Recurrent layers know only their latest state, so nobody who has gone further can lend what a prompt begins with: it is
computed by itself, in a slot of its own, and stays there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

LEAST_KEPT_TOKENS = 32  # fewer are computed sooner than states are copied

_LEAST_PROMPTS = 16  # among which something shared is looked for


@dataclass(eq=False)
class KeptPrefix:
    """Tokens to compute, after which no token is asked for: a request without an answer, as far as schedules go."""

    prompt: tuple[int, ...]
    alone: bool = False

    @property
    def num_known(self) -> int:
        return len(self.prompt) + 1  # so that its last token is never the one before an answer

    @property
    def num_most(self) -> int:
        return len(self.prompt)

    def tokens(self, begin: int, end: int) -> list[int]:
        return list(self.prompt[begin:end])

    def start(self) -> None:
        """Nobody asks how long it waited."""


class LatestPrompts:
    """The prompts that came last, and what most of them begin with: looked for once for as many as there are slots.

    Not those that wait: in a small window these may be short ones that all others pass.
    """

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._prompts: deque[tuple[int, ...]] = deque(maxlen=max(2 * num_slots, _LEAST_PROMPTS))
        self._num_new = num_slots  # since they were looked through; the first are at once

    def add(self, prompt: tuple[int, ...]) -> None:
        self._prompts.append(prompt)
        self._num_new += 1

    def better_prefix(self, kept: tuple[int, ...]) -> tuple[int, ...]:
        """What to keep in the place of `kept`, of which nothing is left to compute; empty: nothing else."""
        if self._num_new < self._num_slots:
            return ()
        self._num_new = 0
        prefix = common_prefix(self._prompts)
        gain = saved_tokens(prefix, self._prompts) - len(prefix)
        return prefix if gain > saved_tokens(kept, self._prompts) else ()


def saved_tokens(prefix: tuple[int, ...], prompts: Sequence[tuple[int, ...]]) -> int:
    """How many tokens of these prompts need not be computed where the prefix is at hand."""
    return len(prefix) * sum(prompt[: len(prefix)] == prefix for prompt in prompts)


def common_prefix(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The beginning that saves most if it is computed once; empty where none is worth it.

    Whoever shares it with most others is in the middle when prompts are sorted, so all are compared with that one. At
    least one token is left to each prompt.
    """
    if len(prompts) < 2:
        return ()
    middle = sorted(prompts)[len(prompts) // 2]
    shared = sorted((num_shared(middle, prompt) for prompt in prompts if prompt is not middle), reverse=True)
    shared = [min(length, len(middle) - 1) for length in shared]
    saved, longest = max((length * (place + 1), length) for place, length in enumerate(shared))
    return middle[:longest] if saved and longest >= LEAST_KEPT_TOKENS else ()


def num_shared(one: Sequence[int], other: Sequence[int], most: int | None = None) -> int:
    """Tokens that both begin with, `most` at most."""
    least, most = 0, min(len(one), len(other), len(other) if most is None else most)
    while least < most:  # slices compare as fast as memory; a loop over tokens does not
        middle = (least + most + 1) // 2
        if one[:middle] == other[:middle]:
            least = middle
        else:
            most = middle - 1
    return least
