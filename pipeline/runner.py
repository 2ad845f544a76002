"""The loop: pull prompts that are not done, let the engine answer them, append every answer to the ledger."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace

from pipeline.ledger.ledger import Ledger
from pipeline.records import Completion, Engine, ItemError, Prompt, Rejection, Request
from pipeline.stop import Stop
from pipeline.summary import Tally

_FAULTS = {
    "crashed": "the process crashed",
    "stalled": "nothing moved any more",
    "out_of_memory": "the system killed the process for lack of memory",
}


@dataclass(slots=True)
class Runner:
    """The parts of one run. `observe` sees the tally after each commit: what it shows is on disk.

    `settle` does without an engine. `beat` is called whenever something has moved. The tokens of unfinished answers are
    saved every `save_unfinished_s` and at a stop, and taken up again; never where that is None.
    """

    encode: Callable[[Prompt], Request | Rejection]
    engine: Engine | None
    ledger: Ledger
    render: Callable[[Completion], bytes]
    num_samples: int
    stop: Stop
    beat: Callable[[], None]
    observe: Callable[[Tally, int], None]
    max_attempts: int
    save_unfinished_s: float | None
    _save_at: float = 0.0
    _num_in_flight: int = 0  # handed to the engine and not answered
    _num_out_of_memory: int = 0  # events of the engine that the ledger knows

    def settle(self, prompts: Iterable[Prompt | Rejection]) -> bool:
        """Answer what takes no engine, bad lines and suspects that are given up, as far as no other answer is missing
        before them; whether one is. So a model is not loaded to say that nothing is left for it."""
        for request in self._requests(prompts):
            if (error := self._giving_up(request)) is None:
                self._commit()
                return True
            self._take(Completion.failed(request.item, request.sample, error))
        self._commit()
        return False

    def run(self, prompts: Iterable[Prompt | Rejection]) -> None:
        """Answer every prompt that has no answer yet, or as many as come before the stop; what is finished is kept."""
        self._answer(self._requests(prompts))
        self._commit()

    def run_alone(self, prompts: Iterable[Prompt | Rejection]) -> None:
        """Answer the suspects among these prompts one by one, so that a death has one cause.

        One that was in flight at `max_attempts` deaths, and alone at one of them, is answered with the error.
        """
        for request in self._requests(prompts):
            if not self.ledger.charges(request.item.index, request.sample):
                continue
            if (error := self._giving_up(request)) is not None:
                self._take(Completion.failed(request.item, request.sample, error))
            else:
                self._answer(iter([request]))
            self._commit()

    def _giving_up(self, request: Request) -> ItemError | None:
        """The error that answers a suspect which is not tried again."""
        charges = self.ledger.charges(request.item.index, request.sample)
        if len(charges) < self.max_attempts or not any(charge.alone for charge in charges):
            return None
        cause, attempts = charges[-1].cause, len(charges)
        message = f"{_FAULTS[cause]} while this line was answered, in {attempts} attempts; it is not tried again"
        return ItemError(cause, message, attempts)

    def _answer(self, requests: Iterator[Request]) -> None:
        assert self.engine is not None
        self._schedule_save()
        self._num_in_flight = 0
        with closing(self.engine.generate(self._handed_on(requests))) as completions:
            for completion in completions:
                self.beat()
                self._num_in_flight -= completion is not None
                self._take(completion)
                overdue = self.stop.overdue
                if overdue or time.monotonic() >= self._save_at:
                    self._save()
                if overdue:
                    break

    def _handed_on(self, requests: Iterator[Request]) -> Iterator[Request]:
        for request in self.ledger.admitting(requests):
            self._num_in_flight += 1
            yield request

    def _requests(self, prompts: Iterable[Prompt | Rejection]) -> Iterator[Request]:
        for prompt in prompts:
            request = self.encode(prompt) if isinstance(prompt, Prompt) else prompt
            for sample in range(self.num_samples):
                if self.stop.requested:
                    return
                if self.ledger.is_done(prompt.item.index, sample):
                    continue
                if isinstance(request, Rejection):
                    self._take(Completion.failed(request.item, sample, request.error))
                else:
                    yield replace(request, sample=sample, generated=self._generated(request.item.index, sample))

    def _generated(self, index: int, sample: int) -> tuple[int, ...]:
        """The tokens of this answer that earlier sessions saved."""
        return () if self.save_unfinished_s is None else self.ledger.unfinished.get((index, sample), ())

    def _save(self) -> None:
        if self.save_unfinished_s is not None and self.engine is not None:
            self.ledger.save_unfinished(self.engine.unfinished())
        self._schedule_save()

    def _schedule_save(self) -> None:
        self._save_at = time.monotonic() + (self.save_unfinished_s or float("inf"))

    def _take(self, completion: Completion | None) -> None:
        """Append an answer, or None at a heartbeat; commit when it is time."""
        if completion is not None:
            self.ledger.append(completion, self.render(completion))
        self._count_out_of_memory()
        if self.ledger.commit_if_due():
            self.observe(self.ledger.tally, self._num_in_flight)

    def _commit(self) -> None:
        self._count_out_of_memory()
        self.ledger.commit()
        self.observe(self.ledger.tally, self._num_in_flight)

    def _count_out_of_memory(self) -> None:
        events = self.engine.out_of_memory_events if self.engine is not None else 0
        if events != self._num_out_of_memory:
            self.ledger.count_out_of_memory(events - self._num_out_of_memory)
            self._num_out_of_memory = events
