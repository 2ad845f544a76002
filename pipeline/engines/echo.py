"""An engine without a model: answers with the prompt's own words; deterministic, for rehearsals and tests.

It takes as many requests at once as it has slots and finishes short answers first, as a batching engine does. It can
be told to be slow, to fail, to crash, to run out of memory and to hang.
"""

from __future__ import annotations

import heapq
import itertools
import os
import random
import signal
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from pipeline.records import Completion, FinishReason, ItemError, Request, Timing, Unfinished, Usage

_NAP_S = 0.05  # longest sleep between two heartbeats
_END = 0  # the token that ends an answer, where it is reached


@dataclass(frozen=True, slots=True)
class Misbehaviour:
    """What a rehearsal asks the echo to do wrong; an index is an item's."""

    delay_s: float = 0.0  # per answer, spread evenly over its tokens
    fail_every: int | None = None  # every so manieth item is answered with an error
    crash_at: int | None = None  # a segmentation fault
    oom_at: int | None = None  # runs out of memory beside others, and alone too
    hang_at: int | None = None  # never returns


class EchoEngine:
    """Token ids are the UTF-8 bytes of the prompt; the answer is the prompt, up to `max_new_tokens` bytes.

    With a temperature the words are shuffled by the item's own random stream, so that what depends on the seed, the
    index and the sample of a real engine does so here too.
    """

    def __init__(self, *, slots: int, misbehaviour: Misbehaviour | None = None) -> None:
        self.slots = slots
        self._most = slots  # fewer after memory ran out
        self._misbehaviour = misbehaviour or Misbehaviour()
        self._writing: _Answer | None = None
        self.out_of_memory_events = 0

    def generate(self, requests: Iterator[Request]) -> Generator[Completion | None]:
        # The clock counts steps: an answer of n tokens taken at step t is finished at step t + n.
        clock = 0
        in_flight: list[tuple[int, int, _Answer]] = []
        taken = itertools.count()
        try:
            while True:
                while len(in_flight) < self._most and (request := next(requests, None)) is not None:
                    if in_flight and self._runs_out_of_memory(request):
                        requests = itertools.chain([request], requests)
                        continue
                    answer = self._begin(request)
                    heapq.heappush(in_flight, (clock + answer.num_to_come, next(taken), answer))
                if not in_flight:
                    return
                clock, _, self._writing = heapq.heappop(in_flight)
                yield from self._writing.write()
                self._most = min(self._most + 1, self.slots)
                completion, self._writing = self._writing.completion, None
                yield completion
        finally:
            self._writing = None

    def unfinished(self) -> Sequence[Unfinished]:
        """The answer that is being written; the others in flight have no token yet."""
        answer = self._writing
        if answer is None or not answer.num_written:
            return ()
        return (Unfinished(answer.request.item.index, answer.request.sample, answer.token_ids),)

    def close(self) -> None:
        pass

    def _runs_out_of_memory(self, request: Request) -> bool:
        if request.item.index != self._misbehaviour.oom_at:
            return False
        self.out_of_memory_events += 1
        self._most = 1
        return True

    def _begin(self, request: Request) -> _Answer:
        index, told = request.item.index, self._misbehaviour
        if index == told.crash_at:
            os.kill(os.getpid(), signal.SIGSEGV)
        if index == told.hang_at:
            while True:
                time.sleep(3600)
        error = None
        if told.fail_every and (index + 1) % told.fail_every == 0:
            error = ItemError("echo_failure", f"the job asks the echo to fail every {told.fail_every} items")
        elif self._runs_out_of_memory(request):
            error = ItemError("out_of_memory", "the job asks the echo to run out of memory here")
        return _Answer(request, told.delay_s, error)


class _Answer:
    """An answer on its way: all of it is known, and so much of it is written as its time has come."""

    def __init__(self, request: Request, delay_s: float, error: ItemError | None) -> None:
        text, self._num_tokens, finish_reason = _echo(request)
        self._token_s = delay_s / self._num_tokens
        self.request = request
        self._text = text
        self.num_written = len(request.generated)
        if error is not None:
            self.completion = Completion.failed(request.item, request.sample, error)
            return
        self.completion = Completion(
            item=request.item,
            sample=request.sample,
            finish_reason=finish_reason,
            text=text,
            usage=Usage(prompt_tokens=len(request.token_ids), completion_tokens=self._num_tokens),
            timing=Timing(time.time(), queue_s=0.0, prefill_s=0.0, decode_s=self._token_s * self.num_to_come),
        )

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of what is written."""
        return (*self._text.encode(), _END)[: self.num_written]

    @property
    def num_to_come(self) -> int:
        return self._num_tokens - self.num_written

    def write(self) -> Iterator[None]:
        """Take the time that the tokens to come take, with a heartbeat now and then."""
        written_before = self.num_written
        began = time.monotonic()
        until = began + self.num_to_come * self._token_s
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _NAP_S))
            if left > _NAP_S:
                num_new = int((time.monotonic() - began) / self._token_s)
                self.num_written = min(written_before + num_new, self._num_tokens - 1)
                yield None


def _echo(request: Request) -> tuple[str, int, FinishReason]:
    """Text, number of tokens (bytes, and one for the end where it is reached) and finish reason."""
    settings = request.settings
    text = bytes(request.token_ids).decode(errors="replace")
    if settings.temperature > 0:
        words = text.split(" ")
        identity = f"{settings.seed}/{request.item.index}/{request.sample}".encode()
        random.Random(blake2b(identity, digest_size=8).digest()).shuffle(words)
        text = " ".join(words)
    limit = settings.max_new_tokens
    data = text.encode()
    cut = min((at for stop in settings.stop if (at := data.find(stop.encode())) >= 0), default=None)
    if cut is not None and cut < limit:
        return data[:cut].decode(), cut + 1, "stop"
    if len(data) < limit:
        return text, len(data) + 1, "stop"
    return data[:limit].decode(errors="ignore"), limit, "length"
