"""A request in flight: its answer so far and its times; the same for every engine that generates token by token."""

from __future__ import annotations

import time

from pipeline.engines.reply import Reply, Vocabulary
from pipeline.records import Completion, ItemError, Request, Timing, Unfinished


class Row:
    """Its tokens are those of the prompt and of the answer so far. Clocks are monotonic, but for the date."""

    def __init__(self, request: Request, vocabulary: Vocabulary) -> None:
        self.request = request
        self.reply = Reply(request, vocabulary)
        self.alone = False  # to be computed without neighbours, after a step failed that it was part of
        self._num_prompt = len(request.token_ids)
        self._started_at = time.time()
        self._taken = time.perf_counter()
        self._computed: float | None = None
        self._first_token: float | None = None

    @property
    def key(self) -> tuple[int, int]:
        return self.request.item.index, self.request.sample

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.request.token_ids

    @property
    def num_known(self) -> int:
        """Tokens so far."""
        return self._num_prompt + len(self.reply.tokens)

    @property
    def num_most(self) -> int:
        """Tokens at the end, if the answer becomes as long as it may."""
        return self._num_prompt + self.request.settings.max_new_tokens

    def tokens(self, begin: int, end: int) -> list[int]:
        """Tokens from `begin` up to `end`."""
        answer = self.reply.tokens[max(0, begin - self._num_prompt) : max(0, end - self._num_prompt)]
        return [*self.request.token_ids[begin:end], *answer]

    def start(self) -> None:
        self._computed = self._computed or time.perf_counter()

    def push(self, token: int) -> None:
        self._first_token = self._first_token or time.perf_counter()
        self.reply.push(token)

    def completion(self) -> Completion:
        now = time.perf_counter()
        computed = self._computed or now
        first_token = self._first_token or now
        times = Timing(self._started_at, computed - self._taken, first_token - computed, now - first_token)
        return self.reply.completion(times)

    def failure(self, error: ItemError) -> Completion:
        return Completion.failed(self.request.item, self.request.sample, error)

    def unfinished(self) -> Unfinished:
        return Unfinished(self.request.item.index, self.request.sample, tuple(self.reply.tokens))
