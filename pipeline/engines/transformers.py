"""Generates with any causal language model of transformers, in bounded batches of requests of like length.

A batch keeps its rows until they finish; a row that finishes leaves at once. What fails is halved until the row at
fault is alone, so that its mates are answered. The state of an answer (`reply`) and the choice of tokens (`sampling`)
know nothing of batches.
"""
# pyright: basic

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.engines import self_check
from pipeline.engines.batch import Batch, CausalModel
from pipeline.engines.failures import is_fatal, item_error, release_memory
from pipeline.engines.reply import Reply, Vocabulary
from pipeline.engines.sampling import Sampler, stream_key
from pipeline.engines.vocabulary import pad_id_of, vocabulary_of
from pipeline.records import Completion, ItemError, Request, Timing, Unfinished

if TYPE_CHECKING:
    import torch

    from pipeline.prompting.encoder import ThinkingTags

_NOT_FINITE = ItemError("engine_error", "the model's scores for the next token are not numbers (NaN or infinite)")


class TransformersEngine:
    """At most `slots` rows are decoded together; their tokens, with padding and room to grow, fit `cache_tokens`.

    Requests are taken `window` at a time and answered longest first, prompt and room for the answer together: the rows
    of a batch are then alike and a lack of memory shows early. A request longer than `cache_tokens` runs alone.
    `report` takes sentences for the user.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        *,
        thinking: ThinkingTags | None,
        slots: int,
        cache_tokens: int,
        window: int,
        report: Callable[[str], None],
    ) -> None:
        self._model = CausalModel(model)
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary_of(model, tokenizer, thinking)
        self._pad_id = pad_id_of(tokenizer, self._vocabulary)
        self._slots = slots
        self._most_rows = slots  # fewer after memory ran out
        self._cache_tokens = cache_tokens
        self._window = max(window, 1)
        self._report = report
        self._in_flight: dict[tuple[int, int], _Row] = {}

    def generate(self, requests: Iterator[Request]) -> Generator[Completion | None]:
        try:
            while window := [_Row(request, self._vocabulary) for request in itertools.islice(requests, self._window)]:
                self._in_flight = {row.key: row for row in window}
                waiting = sorted(window, key=lambda row: sum(row.size), reverse=True)
                while waiting:
                    num_rows = batch_size([row.size for row in waiting], self._most_rows, self._cache_tokens)
                    yield from self._run(waiting[:num_rows])
                    del waiting[:num_rows]
        finally:
            self._in_flight = {}

    def unfinished(self) -> Sequence[Unfinished]:
        """Answers taken and not yet given, with their tokens so far; none once the iterator is closed."""
        return [
            Unfinished(row.request.item.index, row.request.sample, tuple(row.reply.tokens))
            for row in self._in_flight.values()
            if row.reply.tokens
        ]

    def close(self) -> None:
        """Give up the model and its memory; nothing can be generated after."""
        vars(self).pop("_model", None)
        release_memory()

    def self_check(self) -> bool:
        """Whether a few prompts give the same scores together as alone; if not, `report` says what that means.

        Where they differ beyond rounding, padding or a neighbour reaches a row's scores.
        """
        token_ids = self._tokenizer(self_check.TEXT)["input_ids"]
        difference, rounding = self_check.difference_by_batch(self._model, token_ids, self._pad_id)
        if difference <= rounding:
            return True
        self._report(
            f"self-check: {self._model.name} scores the next token otherwise in a batch than alone (they differ by "
            f"{difference:.0%} of their spread), so an answer may depend on the lines that are answered with it; "
            "with batch.slots: 1 it does not"
        )
        return False

    def _run(self, rows: list[_Row]) -> Generator[Completion | None]:
        """Answer these rows together, or in halves where that fails; the answer of one failing alone is the error."""
        error = _NOT_FINITE
        try:
            yield from self._decode(rows)
        except Exception as exception:  # a model may raise anything; the row at fault is found below
            if is_fatal(exception):
                raise
            error = item_error(exception, *max(row.size for row in rows))
        left = [row for row in rows if row.key in self._in_flight]
        if not left:
            if len(rows) >= self._most_rows:
                self._most_rows = min(self._most_rows + self._most_rows // 4 + 1, self._slots)
            return
        if error.type == "out_of_memory":
            self._give_way(len(rows))
        if len(rows) == 1:
            del self._in_flight[rows[0].key]
            yield Completion.failed(rows[0].request.item, rows[0].request.sample, error)
            return
        middle = (len(left) + 1) // 2
        yield from self._run(left[:middle])
        if left[middle:]:
            yield from self._run(left[middle:])

    def _give_way(self, num_rows: int) -> None:
        """Memory ran out with so many rows: free what can be freed and take fewer for a while."""
        release_memory()
        if num_rows > 1:
            self._most_rows = num_rows // 2
            self._report(f"out of memory with {num_rows} rows together; going on with {self._most_rows}")

    def _decode(self, rows: Sequence[_Row]) -> Generator[Completion | None]:
        """Answer these rows together; those whose scores are not numbers are left in flight."""
        import torch

        if finished := [row for row in rows if row.reply.finish_reason]:  # by tokens of an earlier session
            yield from self._complete(finished)
        rows = [row for row in rows if not row.reply.finish_reason]
        if not rows:
            return
        with torch.inference_mode():
            batch, sampler, logits = self._prefill(rows)
        live: list[_Row | None] = [*rows]
        places = torch.arange(len(live), device=logits.device)  # of the batch's rows in the sampler
        while True:
            with torch.inference_mode():
                tokens = sampler.next_tokens(logits, places, _forced(live, logits.device))
            yield from self._complete(_push(live, tokens.tolist()))  # `tolist`: the only wait for the device
            kept = [place for place, row in enumerate(live) if row]
            if not kept:
                return
            with torch.inference_mode():
                if len(kept) < len(live) and batch.keep(torch.tensor(kept, device=self._model.device)):
                    live = [live[place] for place in kept]
                    places, tokens = places[kept], tokens[kept]
                # A row that has left but could not be dropped goes on unheard.
                logits = batch.step(tokens.clamp(min=0).to(self._model.device))

    def _prefill(self, rows: Sequence[_Row]) -> tuple[Batch, Sampler, torch.Tensor]:
        for row in rows:
            row.start()
        room = max(row.size[1] for row in rows)
        batch = Batch(self._model, [row.token_ids for row in rows], room, self._pad_id)
        logits = batch.prefill()
        sampler = Sampler(len(rows), self._model.vocabulary, logits.device)
        for place, row in enumerate(rows):
            request = row.request
            key = stream_key(request.settings.seed, request.item.index, request.sample)
            sampler.assign(place, request.settings, key, request.token_ids, row.reply.tokens)
        return batch, sampler, logits

    def _complete(self, finished: Sequence[_Row]) -> Iterator[Completion | None]:
        for row in finished:
            completion = row.completion()
            del self._in_flight[row.key]
            yield completion
        if not finished:
            yield None


class _Row:
    """A request in flight: its answer so far and its times. Monotonic clocks, but for the date it was taken at."""

    def __init__(self, request: Request, vocabulary: Vocabulary) -> None:
        self.request = request
        self.reply = Reply(request, vocabulary)
        self._started_at = time.time()
        self._taken = time.perf_counter()
        self._computed: float | None = None
        self._first_token: float | None = None

    @property
    def key(self) -> tuple[int, int]:
        return self.request.item.index, self.request.sample

    @property
    def token_ids(self) -> list[int]:
        """All tokens known: those of the prompt and, after an interruption, of the answer."""
        return [*self.request.token_ids, *self.reply.tokens]

    @property
    def size(self) -> tuple[int, int]:
        """Tokens known, and at most to come."""
        num_generated = len(self.reply.tokens)
        return len(self.request.token_ids) + num_generated, self.request.settings.max_new_tokens - num_generated

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


def batch_size(sizes: Sequence[tuple[int, int]], most_rows: int, cache_tokens: int) -> int:
    """How many of the first rows fit together, at least one; a size is (tokens known, at most to come).

    Rows are padded to the longest and the cache grows to the most to come: rows x (longest + most) <= cache_tokens.
    """
    longest = most_to_come = 0
    for num_rows, (known, to_come) in enumerate(sizes[:most_rows]):
        longest, most_to_come = max(longest, known), max(most_to_come, to_come)
        if (num_rows + 1) * (longest + most_to_come) > cache_tokens:
            return max(num_rows, 1)
    return min(len(sizes), most_rows)


def _push(live: list[_Row | None], tokens: Sequence[int]) -> list[_Row]:
    """Give each row its token; those that finish or get none (-1) leave their place in `live`. Returns the finished."""
    finished: list[_Row] = []
    for place, (row, token) in enumerate(zip(live, tokens, strict=True)):
        if row is None:
            continue
        if token >= 0:
            row.push(token)
        if token < 0 or row.reply.finish_reason:
            live[place] = None
        if row.reply.finish_reason:
            finished.append(row)
    return finished


def _forced(live: Sequence[_Row | None], device: torch.device) -> torch.Tensor | None:
    """The tokens that rows are made to take next, int64 [rows], -1 where a row chooses; None where all choose."""
    import torch

    forced = [row.reply.forced_token if row else None for row in live]
    if all(token is None for token in forced):
        return None
    return torch.tensor([-1 if token is None else token for token in forced], device=device)
