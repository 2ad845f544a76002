"""Generates with a fixed pool of slots: every step computes a token of each answer under way and parts of new prompts.

Each sequence has its own position, context and end; one that finishes is replaced at once. What a step fails on is
found by computing its sequences one by one.
"""
# pyright: basic

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.engines import self_check
from pipeline.engines.failures import NOT_FINITE, is_fatal, item_error
from pipeline.engines.headroom import Headroom
from pipeline.engines.kept_prefix import KeptPrefix, LatestPrompts
from pipeline.engines.memory import release_memory
from pipeline.engines.packed_model import PackedModel
from pipeline.engines.prefixes import Prefixes
from pipeline.engines.row import Row
from pipeline.engines.sampling import Sampler, stream_key
from pipeline.engines.schedule import Part, Schedule, Seat
from pipeline.engines.sizing import Sizing
from pipeline.engines.slot_cache import Span
from pipeline.engines.vocabulary import vocabulary_of
from pipeline.plan.streaming import STEP_TOKENS
from pipeline.records import Completion, ItemError, Request, Unfinished

if TYPE_CHECKING:
    import torch

    from pipeline.prompting.encoder import ThinkingTags

_LEAST_STEP_TOKENS = 16  # memory that does not suffice for so few will not suffice for fewer


class SlotEngine:
    """At most `slots` sequences are live; all of their tokens, prompt and the longest answer, fit `cache_tokens`.

    A longer sequence runs alone. `window` requests wait beyond those that are live, for the longest of them to go
    first. `sized`: fewer slots are used where timing shows that more bring nothing. `report` takes sentences for the
    user. `deterministic`: answers are the same bit by bit whatever is computed beside them. Raises NotServedError for a
    model that cannot be packed.
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
        step_tokens: int = STEP_TOKENS,
        sized: bool = False,
        deterministic: bool = False,
    ) -> None:
        self._own = model
        self._tokenizer = tokenizer
        # The self-check takes two.
        self._model = PackedModel(model, max(slots, 2), row_by_row=deterministic)
        self._vocabulary = vocabulary_of(model, tokenizer, thinking)
        self._sampler = Sampler(slots, self._model.vocabulary, self._model.device)
        self._slots = slots
        self._cache_tokens = cache_tokens
        self._window = window
        self._rows = Headroom(slots)
        self._sizing = Sizing(slots) if sized else Sizing(slots, slots)
        self._step_tokens = Headroom(max(step_tokens, slots), least=_LEAST_STEP_TOKENS)
        self._report = report
        self._in_flight: dict[tuple[int, int], Row] = {}
        self.out_of_memory_events = 0
        self._begin()

    @property
    def slots(self) -> int:
        """How many of its slots it has found to be of use."""
        return self._sizing.chosen

    def generate(self, requests: Iterator[Request]) -> Generator[Completion | None]:
        self._begin()
        try:
            while True:
                yield from self._take(requests)
                self._admit()
                if not self._schedule.live:
                    return
                yield from self._step()
        finally:
            self._begin()

    def unfinished(self) -> Sequence[Unfinished]:
        """Answers taken and not yet given, with their tokens so far; none once the iterator is closed."""
        return [row.unfinished() for row in self._in_flight.values() if row.reply.tokens]

    def close(self) -> None:
        """Give up the model and its memory; nothing can be generated after."""
        vars(self).pop("_model", None)
        vars(self).pop("_own", None)
        release_memory()

    def self_check(self) -> tuple[float, float]:
        """How far packed scores are from the model's own for a few prompts, and how far rounding may take them.

        What can be computed in fewer passes is from here on.
        """
        import torch

        prompt = self._tokenizer(self_check.TEXT)["input_ids"]
        with torch.inference_mode():
            self._model.fuse(prompt)
        return self_check.difference_by_packing(self._own, self._model, prompt)

    def bits_check(self) -> bool:
        """Whether scores of a few prompts are the same bit by bit alone, together and in parts."""
        return self_check.same_bits(self._model, self._tokenizer(self_check.TEXT)["input_ids"])

    def _begin(self) -> None:
        self._in_flight = {}
        self._schedule: Schedule[Any] = Schedule(num_slots=self._slots, room_tokens=self._cache_tokens)
        self._prefixes: Prefixes[Any] = Prefixes(latest_only=self._model.is_recurrent)
        self._latest = LatestPrompts(self._slots)

    def _take(self, requests: Iterator[Request]) -> Iterator[Completion]:
        """Let requests in until as many wait as may; answers that an earlier session finished are given at once."""
        while self._schedule.num_waiting + len(self._schedule.live) < self._slots + self._window:
            request = next(requests, None)
            if request is None:
                return
            row = Row(request, self._vocabulary)
            self._in_flight[row.key] = row
            if row.reply.finish_reason:
                del self._in_flight[row.key]
                yield row.completion()
            else:
                self._schedule.add(row)
                self._latest.add(row.prompt)

    def _drop_kept(self) -> None:
        if (kept := self._schedule.kept) is not None:
            self._schedule.drop_kept()
            self._prefixes.remove(kept)

    def _admit(self) -> None:
        kept = self._schedule.kept
        if self._model.is_recurrent and (prefix := self._latest.better_prefix(kept.row.prompt if kept else ())):
            self._drop_kept()
            self._schedule.keep(KeptPrefix(prefix))
        self._schedule.most_rows = min(self._rows.most, self._sizing.limit(len(self._schedule.live)))
        for seat in self._schedule.admit():
            request, reply = seat.row.request, seat.row.reply
            key = stream_key(request.settings.seed, request.item.index, request.sample)
            self._sampler.assign(seat.slot, request.settings, key, request.token_ids, reply.tokens)
            self._prefixes.add(seat, self._schedule.kept)
        self._sizing.admitted(len(self._schedule.live), self._schedule.num_waiting)
        self._model.resize(self._schedule.room_tokens)

    def _step(self) -> Generator[Completion | None]:
        for loan in self._prefixes.settle():
            self._model.copy(loan.lender, loan.borrower, loan.num_tokens)
            loan.borrower.computed = loan.num_tokens
        parts = self._schedule.parts(
            self._step_tokens.most, self._prefixes.held, prompts_first=self._sizing.is_gathering
        )
        for part in parts:
            part.seat.row.start()
        giving = [part.seat for part in parts if part.gives_token]
        began = time.perf_counter()
        try:
            tokens = self._compute(parts, giving)
        except Exception as exception:  # a model may raise anything; the row at fault is found by going one by one
            if is_fatal(exception):
                raise
            yield from self._begin_anew(parts, exception)
            return
        self._time(parts, time.perf_counter() - began)
        for part in parts:
            part.seat.computed = part.end
        answers = [answer for seat, token in zip(giving, tokens, strict=True) if (answer := self._push(seat, token))]
        yield from answers or [None]

    def _compute(self, parts: Sequence[Part[Row]], giving: Sequence[Seat[Row]]) -> list[int]:
        """The next tokens of those whose known tokens all are computed with this step; -1 where there is none."""
        import torch

        token_ids: list[int] = []
        decoding: list[Span] = []
        prefill: list[Span] = []
        wanted: list[int] = []
        # Kernels of GPUs read each row's own places.
        alike = self._prefixes.alike() if self._model.device.type == "cpu" else {}
        for part in parts:
            seat, num_tokens = part.seat, part.end - part.begin
            # A prompt of one token is prefill too: its slot holds nothing yet, or another's state.
            spans = decoding if num_tokens == 1 and part.begin and not prefill else prefill
            other = alike.get(seat.slot)
            elsewhere = (0, 0) if other is None else (other.seat.start, other.num_tokens)
            spans.append(Span(seat.slot, len(token_ids), num_tokens, seat.start, part.begin, *elsewhere))
            token_ids += seat.row.tokens(part.begin, part.end)
            if part.gives_token:
                wanted.append(len(token_ids) - 1)
        with torch.inference_mode():
            scores = self._model.forward(token_ids, decoding, prefill, wanted)
            if not giving:
                return []
            slots = torch.tensor([seat.slot for seat in giving], device=scores.device)
            with self._model.arithmetic():
                return self._sampler.next_tokens(scores, slots, _forced(giving, scores.device)).tolist()

    def _time(self, parts: Sequence[Part[Row]], seconds: float) -> None:
        """A step in which all live rows decoded, and nothing else was done, tells how many rows are of use."""
        decodes_all = len(parts) == len(self._schedule.live) and all(
            part.begin and part.end - part.begin == 1 for part in parts
        )
        if decodes_all and self._sizing.timed(len(parts), seconds):
            self._report(self._sizing.verdict())

    def _push(self, seat: Seat[Row], token: int) -> Completion | None:
        """Give a sequence its next token; the answer if that was the last."""
        row = seat.row
        if token < 0:
            self._release(seat)
            return self._fail(row, NOT_FINITE)
        try:
            row.push(token)
            answer = row.completion() if row.reply.finish_reason else None
        except Exception as exception:  # noqa: BLE001 - its text cannot be made
            self._release(seat)
            return self._fail(row, item_error(exception, row.num_known, row.num_most - row.num_known))
        row.alone = False
        if answer is None:
            return None
        del self._in_flight[row.key]
        self._grow()
        self._release(seat)
        return answer

    def _release(self, seat: Seat[Row]) -> None:
        self._schedule.release(seat)
        self._prefixes.remove(seat)

    def _begin_anew(self, parts: Sequence[Part[Row]], exception: Exception) -> Iterator[Completion]:
        """After a step failed: its sequences are computed again from their first token, fewer together or alone.

        Their tokens so far are kept. One that failed alone is answered with the error.
        """
        if any(part.seat is self._schedule.kept for part in parts):
            parts = [part for part in parts if part.seat is not self._schedule.kept]
            self._drop_kept()
            if not parts:  # nobody's answer was in this step
                return
        rows = [part.seat.row for part in parts]
        num_tokens = sum(part.end - part.begin for part in parts)
        error = item_error(exception, *max((row.num_known, row.num_most - row.num_known) for row in rows))
        out_of_memory = error.type == "out_of_memory"
        self.out_of_memory_events += out_of_memory
        for part in parts:
            self._release(part.seat)
        if len(rows) == 1 and (not out_of_memory or num_tokens <= _LEAST_STEP_TOKENS):
            yield self._fail(rows[0], error)
            return
        if out_of_memory:
            self._shrink(len(rows), num_tokens)
        for row in rows:
            row.alone = not out_of_memory
            self._schedule.add(row)

    def _shrink(self, num_rows: int, num_tokens: int) -> None:
        """Memory ran out in a step of so many rows and tokens: take half of it for a while."""
        release_memory()
        self._rows.shrink(num_rows)
        self._step_tokens.shrink(num_tokens)  # what is computed again keeps within it too
        self._sizing.out_of_memory()
        self._report(
            f"out of memory with {num_rows} rows and {num_tokens} tokens in a step; going on with "
            f"{self._rows.most} and {self._step_tokens.most}"
        )

    def _grow(self) -> None:
        """An answer came to its end: what was taken back for lack of memory is tried again."""
        self._sizing.answered()
        if len(self._schedule.live) >= self._rows.most:
            self._rows.grow()
            self._step_tokens.grow()

    def _fail(self, row: Row, error: ItemError) -> Completion:
        del self._in_flight[row.key]
        return row.failure(error)


def _forced(seats: Sequence[Seat[Row]], device: torch.device) -> torch.Tensor | None:
    """The tokens that rows are made to take next, int64 [rows], -1 where a row chooses; None where all choose."""
    import torch

    forced = [seat.row.reply.forced_token for seat in seats]
    if all(token is None for token in forced):
        return None
    return torch.tensor([-1 if token is None else token for token in forced], device=device)
