"""Generates with any causal language model of transformers, in padded batches of requests of like length.

A batch keeps its rows until they finish; a row that finishes leaves at once. What fails is halved until the row at
fault is alone, so that its mates are answered. The state of an answer (`reply`) and the choice of tokens (`sampling`)
know nothing of batches.
"""
# pyright: basic

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.engines import self_check
from pipeline.engines.batch import Batch, CausalModel
from pipeline.engines.failures import NOT_FINITE, is_fatal, item_error
from pipeline.engines.headroom import Headroom
from pipeline.engines.memory import release_memory
from pipeline.engines.row import Row
from pipeline.engines.sampling import Sampler, stream_key
from pipeline.engines.vocabulary import pad_id_of, vocabulary_of
from pipeline.records import Completion, Request, Unfinished

if TYPE_CHECKING:
    import torch

    from pipeline.prompting.encoder import ThinkingTags


class PaddedEngine:
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
        self.slots = slots
        self._rows = Headroom(slots)
        self._cache_tokens = cache_tokens
        self._window = max(window, 1)
        self._report = report
        self._in_flight: dict[tuple[int, int], Row] = {}
        self.out_of_memory_events = 0

    def generate(self, requests: Iterator[Request]) -> Generator[Completion | None]:
        try:
            while window := [Row(request, self._vocabulary) for request in itertools.islice(requests, self._window)]:
                self._in_flight = {row.key: row for row in window}
                waiting = sorted(window, key=lambda row: row.num_most, reverse=True)
                while waiting:
                    num_rows = batch_size([_size(row) for row in waiting], self._rows.most, self._cache_tokens)
                    yield from self._run(waiting[:num_rows])
                    del waiting[:num_rows]
        finally:
            self._in_flight = {}

    def unfinished(self) -> Sequence[Unfinished]:
        """Answers taken and not yet given, with their tokens so far; none once the iterator is closed."""
        return [row.unfinished() for row in self._in_flight.values() if row.reply.tokens]

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

    def _run(self, rows: list[Row]) -> Generator[Completion | None]:
        """Answer these rows together, or in halves where that fails; the answer of one failing alone is the error."""
        error = NOT_FINITE
        try:
            yield from self._decode(rows)
        except Exception as exception:  # a model may raise anything; the row at fault is found below
            if is_fatal(exception):
                raise
            error = item_error(exception, *max(_size(row) for row in rows))
        left = [row for row in rows if row.key in self._in_flight]
        if not left:
            if len(rows) >= self._rows.most:
                self._rows.grow(len(rows))
            return
        if error.type == "out_of_memory":
            self._give_way(len(rows))
        if len(rows) == 1:
            del self._in_flight[rows[0].key]
            yield rows[0].failure(error)
            return
        middle = (len(left) + 1) // 2
        yield from self._run(left[:middle])
        if left[middle:]:
            yield from self._run(left[middle:])

    def _give_way(self, num_rows: int) -> None:
        """Memory ran out with so many rows: free what can be freed and take fewer for a while."""
        release_memory()
        self.out_of_memory_events += 1
        if num_rows > 1:
            self._rows.shrink(num_rows)
            self._report(f"out of memory with {num_rows} rows together; going on with {self._rows.most}")

    def _decode(self, rows: Sequence[Row]) -> Generator[Completion | None]:
        """Answer these rows together; those whose scores are not numbers are left in flight."""
        import torch

        if finished := [row for row in rows if row.reply.finish_reason]:  # by tokens of an earlier session
            yield from self._complete(finished)
        rows = [row for row in rows if not row.reply.finish_reason]
        if not rows:
            return
        with torch.inference_mode():
            batch, sampler, logits = self._prefill(rows)
        live: list[Row | None] = [*rows]
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

    def _prefill(self, rows: Sequence[Row]) -> tuple[Batch, Sampler, torch.Tensor]:
        for row in rows:
            row.start()
        room = max(_size(row)[1] for row in rows)
        batch = Batch(self._model, [row.tokens(0, row.num_known) for row in rows], room, self._pad_id)
        logits = batch.prefill()
        sampler = Sampler(len(rows), self._model.vocabulary, logits.device)
        for place, row in enumerate(rows):
            request = row.request
            key = stream_key(request.settings.seed, request.item.index, request.sample)
            sampler.assign(place, request.settings, key, request.token_ids, row.reply.tokens)
        return batch, sampler, logits

    def _complete(self, finished: Sequence[Row]) -> Iterator[Completion | None]:
        for row in finished:
            completion = row.completion()
            del self._in_flight[row.key]
            yield completion
        if not finished:
            yield None


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


def _size(row: Row) -> tuple[int, int]:
    """Tokens known, and at most to come."""
    return row.num_known, row.num_most - row.num_known


def _push(live: list[Row | None], tokens: Sequence[int]) -> list[Row]:
    """Give each row its token; those that finish or get none (-1) leave their place in `live`. Returns the finished."""
    finished: list[Row] = []
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


def _forced(live: Sequence[Row | None], device: torch.device) -> torch.Tensor | None:
    """The tokens that rows are made to take next, int64 [rows], -1 where a row chooses; None where all choose."""
    import torch

    forced = [row.reply.forced_token if row else None for row in live]
    if all(token is None for token in forced):
        return None
    return torch.tensor([-1 if token is None else token for token in forced], device=device)
