"""An engine without a model: answers with the prompt's own words; deterministic, for rehearsals and tests.

It takes as many requests at once as it has slots and finishes short answers first, as a batching engine does. It can
be told to be slow, to fail, to crash, to run out of memory and to hang.
"""

from __future__ import annotations

import heapq
import os
import random
import signal
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from pipeline.records import Completion, FinishReason, ItemError, Request, Timing, Unfinished, Usage

_NAP_S = 0.05  # longest sleep between two heartbeats


@dataclass(frozen=True, slots=True)
class Misbehaviour:
    """What a rehearsal asks the echo to do wrong; an index is an item's."""

    delay_s: float = 0.0  # per answer
    fail_every: int | None = None  # every so manieth item is answered with an error
    crash_at: int | None = None  # kills its own process
    oom_at: int | None = None  # is answered with an out-of-memory error
    hang_at: int | None = None  # never returns


class EchoEngine:
    """Token ids are the UTF-8 bytes of the prompt; the answer is the prompt, up to `max_new_tokens` bytes.

    With a temperature the words are shuffled by the item's own random stream, so that what depends on the seed, the
    index and the sample of a real engine does so here too.
    """

    def __init__(self, *, slots: int, misbehaviour: Misbehaviour | None = None) -> None:
        self._slots = slots
        self._misbehaviour = misbehaviour or Misbehaviour()

    def generate(self, requests: Iterator[Request]) -> Generator[Completion | None]:
        # The clock counts steps: an answer of n tokens taken at step t is finished at step t + n.
        clock = 0
        in_flight: list[tuple[int, int, Completion]] = []
        taken = 0
        exhausted = False
        while in_flight or not exhausted:
            while not exhausted and len(in_flight) < self._slots:
                request = next(requests, None)
                if request is None:
                    exhausted = True
                    break
                self._misbehave(request)
                completion = self._answer(request, time.time())
                length = completion.usage.completion_tokens if completion.usage else 0
                heapq.heappush(in_flight, (clock + length, taken, completion))
                taken += 1
            if in_flight:
                yield from _nap(self._misbehaviour.delay_s)
                clock, _, completion = heapq.heappop(in_flight)
                yield completion

    def unfinished(self) -> Sequence[Unfinished]:
        return ()

    def close(self) -> None:
        pass

    def _misbehave(self, request: Request) -> None:
        index = request.item.index
        if index == self._misbehaviour.crash_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == self._misbehaviour.hang_at:
            while True:
                time.sleep(3600)

    def _answer(self, request: Request, started_at: float) -> Completion:
        index, delay_s = request.item.index, self._misbehaviour.delay_s
        fail_every = self._misbehaviour.fail_every
        if fail_every and (index + 1) % fail_every == 0:
            error = ItemError("echo_failure", f"the job asks the echo to fail every {fail_every} items")
            return Completion.failed(request.item, request.sample, error)
        if index == self._misbehaviour.oom_at:
            error = ItemError("out_of_memory", "the job asks the echo to run out of memory here")
            return Completion.failed(request.item, request.sample, error)
        text, num_tokens, finish_reason = _echo(request)
        return Completion(
            item=request.item,
            sample=request.sample,
            finish_reason=finish_reason,
            text=text,
            usage=Usage(prompt_tokens=len(request.token_ids), completion_tokens=num_tokens),
            timing=Timing(started_at=started_at, queue_s=0.0, prefill_s=0.0, decode_s=delay_s),
        )


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


def _nap(seconds: float) -> Iterator[None]:
    """Sleep, with a heartbeat now and then."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        time.sleep(min(left, _NAP_S))
        if left > _NAP_S:
            yield None
