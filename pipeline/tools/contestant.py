"""One engine in a process of its own that runs through the same requests as often as it is told; `bench` times it.

A process each, because stock loading changes transformers for the whole process, and so that memory is counted apart.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any, Literal, Self

from pipeline import talk
from pipeline.errors import DataError, OvernightError, Problem
from pipeline.job import locate_model, prepare
from pipeline.probe import peak_memory_held
from pipeline.records import Completion, Engine, Prompt, Request
from pipeline.source.inputs import expand_inputs
from pipeline.source.line_parser import LineParser
from pipeline.source.lines import read_lines
from pipeline.spec.keys import JobSpec

Kind = Literal["warm-up", "prefill", "whole"]

_WARM_UP_TOKENS = 20  # of each request: an engine needs as many to find out how many slots are of use


@dataclass(frozen=True, slots=True)
class Introduction:
    """What a contestant says of itself once it is loaded."""

    engine: str
    load_strategy: str
    dtype: str
    weights: str
    slots: int  # that there are
    num_threads: int
    load_s: float
    num_requests: int
    num_rejected: int  # lines that no engine sees
    speed_key: tuple[tuple[str, str], ...] = field(repr=False)  # of its plan


@dataclass(frozen=True, slots=True)
class Pass:
    """One time through all requests. Times in seconds."""

    duration_s: float
    prompt_tokens: int
    output_tokens: int
    num_failed: int
    slots: int  # that the engine found to be of use
    occupancy: float | None  # part of the slots in use until the last request began; None where nothing was timed
    answers_sha256: str  # of all answers in input order, texts and token counts
    answer_digests: tuple[str, ...] = field(repr=False)  # of each, in input order
    peak_host_bytes: int  # most memory that the process has held so far


class Contestant:
    """A loaded engine in a child process. Raises what loading raises; use as a context manager."""

    def __init__(self, spec: JobSpec, *, limit: int | None, stock: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, spec, limit, stock), daemon=True)
        self._process.start()
        theirs.close()
        self.introduction: Introduction = self._receive()

    def measure(self, kind: Kind) -> Pass:
        """Run through the requests: whole, to the first token of each (`prefill`), or a few tokens of a slotful."""
        self._connection.send(kind)
        return self._receive()

    def close(self) -> None:
        self._connection.close()  # the child's `recv` ends
        self._process.join(10)
        self._process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self) -> Any:
        try:
            received = self._connection.recv()
        except EOFError:
            self._process.join()
            raise OvernightError(
                f"the process that was measured ended with {self._process.exitcode}; its last words are above"
            ) from None
        if isinstance(received, OvernightError):
            raise received
        return received


def _serve(connection: Connection, spec: JobSpec, limit: int | None, stock: bool) -> None:
    """The child: load, introduce, then one pass for each word received, until the parent hangs up."""
    try:
        engine, requests, introduction = _load(spec, limit, stock)
    except OvernightError as error:
        connection.send(error)
        return
    with closing(engine):
        connection.send(introduction)
        while True:
            try:
                kind: Kind = connection.recv()
            except EOFError:
                return
            try:
                connection.send(run_pass(engine, select(requests, kind, introduction.slots)))
            except OvernightError as error:
                connection.send(error)
                return


def _load(spec: JobSpec, limit: int | None, stock: bool) -> tuple[Engine, list[Request], Introduction]:
    from pipeline.engines import choose_stock_engine
    from pipeline.loading import apply_environment

    facts, _ = locate_model(spec, talk.say, quiet=True)
    plan, choice = prepare(spec, facts)
    if stock:
        if facts is None:
            message = "has no model that stock transformers could run; compare jobs of a model"
            raise DataError(Problem(message, field="model.engine"))
        choice = choose_stock_engine(spec, plan, facts)
    apply_environment(plan)
    encoder = choice.encoder()
    parser = LineParser(spec)
    requests: list[Request] = []
    num_rejected = 0
    for line in read_lines(expand_inputs(spec.input.path), max_line_bytes=spec.input.max_line, stop=limit):
        prompt = parser.parse(line)
        request = encoder.encode(prompt) if isinstance(prompt, Prompt) else prompt
        if isinstance(request, Request):
            requests += [replace(request, sample=sample) for sample in range(spec.generation.num_samples)]
        else:
            num_rejected += 1
    if not requests:
        raise DataError("the input has no line that can be answered")
    if stock:
        from pipeline.engines.stock import check_greedy

        check_greedy(requests)
    engine, load_s = choice.open(talk.say, False)
    introduction = Introduction(
        engine="stock" if stock else plan.engine,
        load_strategy=plan.load_strategy,
        dtype=plan.dtype,
        weights=plan.weights,
        slots=engine.slots,
        num_threads=plan.num_threads,
        load_s=round(load_s, 3),
        num_requests=len(requests),
        num_rejected=num_rejected,
        speed_key=plan.speed_key,
    )
    return engine, requests, introduction


def select(requests: Sequence[Request], kind: Kind, slots: int) -> Sequence[Request]:
    """The requests of one pass: all as they are, all for one token, or the first slotful for a few."""
    if kind == "whole":
        return requests
    num_tokens = 1 if kind == "prefill" else _WARM_UP_TOKENS
    chosen = requests if kind == "prefill" else requests[:slots]
    return [
        replace(
            request,
            settings=replace(request.settings, max_new_tokens=min(num_tokens, request.settings.max_new_tokens)),
        )
        for request in chosen
    ]


def run_pass(engine: Engine, requests: Sequence[Request]) -> Pass:
    """Let the engine answer all requests once."""
    began = time.perf_counter()
    with closing(engine.generate(iter(requests))) as stream:
        answers = [answer for answer in stream if answer is not None]
    duration_s = time.perf_counter() - began
    answers.sort(key=lambda answer: (answer.item.index, answer.sample))
    digests = tuple(_digest(answer) for answer in answers)
    usages = [answer.usage for answer in answers if answer.usage]
    return Pass(
        duration_s=duration_s,
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        output_tokens=sum(usage.completion_tokens for usage in usages),
        num_failed=sum(answer.error is not None for answer in answers),
        slots=engine.slots,
        occupancy=occupancy(answers, engine.slots),
        answers_sha256=hashlib.sha256("".join(digests).encode()).hexdigest(),
        answer_digests=digests,
        peak_host_bytes=peak_memory_held(),
    )


def occupancy(answers: Sequence[Completion], slots: int) -> float | None:
    """The part of slots x time in which an answer was computed, from the first beginning to the last.

    After the last request has begun, slots can only fall empty: that tail says nothing of the engine.
    """
    spans = [
        (timing.started_at + timing.queue_s, timing.started_at + timing.total_s)
        for answer in answers
        if (timing := answer.timing)
    ]
    if not spans:
        return None
    first, last = min(begin for begin, _ in spans), max(begin for begin, _ in spans)
    if last <= first:
        return None
    return sum(min(end, last) - begin for begin, end in spans) / (slots * (last - first))


def _digest(answer: Completion) -> str:
    tokens = answer.usage.completion_tokens if answer.usage else 0
    said = (answer.item.index, answer.sample, answer.text, answer.reasoning, answer.finish_reason, tokens)
    return hashlib.sha256(repr(said).encode()).hexdigest()
