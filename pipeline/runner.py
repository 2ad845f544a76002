"""The loop: pull prompts that are not done, let the engine answer them, append every answer to the ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace

from pipeline.ledger.ledger import Ledger
from pipeline.records import Completion, Engine, Prompt, Rejection, Request
from pipeline.stop import Stop
from pipeline.summary import Tally


@dataclass(frozen=True, slots=True)
class Runner:
    """The parts of one run. `observe` sees the tally after each commit: what it shows is on disk."""

    encode: Callable[[Prompt], Request | Rejection]
    engine: Engine
    ledger: Ledger
    render: Callable[[Completion], bytes]
    num_samples: int
    stop: Stop
    observe: Callable[[Tally], None]

    def run(self, prompts: Iterable[Prompt | Rejection]) -> None:
        """Answer every prompt that has no answer yet, or as many as come before the stop; what is finished is kept."""
        requests = self.ledger.admitting(self._requests(prompts))
        with closing(self.engine.generate(requests)) as completions:
            for completion in completions:
                self._take(completion)
                if self.stop.overdue:
                    break
        self.ledger.commit()
        self.observe(self.ledger.tally)

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
                    yield request if sample == 0 else replace(request, sample=sample)

    def _take(self, completion: Completion | None) -> None:
        """Append an answer, or None at a heartbeat; commit when it is time."""
        if completion is not None:
            self.ledger.append(completion, self.render(completion))
        if self.ledger.commit_if_due():
            self.observe(self.ledger.tally)
