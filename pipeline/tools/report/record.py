"""What the files of a run tell, folded into a page's worth of numbers whatever the number of answers."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import Problem
from pipeline.ledger.files import RunPaths
from pipeline.ledger.history import History, begin_history
from pipeline.ledger.journal import Record, damaged, read_journal
from pipeline.ledger.partial import open_to_read, read_group
from pipeline.ledger.recovery import RunState, no_run, read_run
from pipeline.output.openai_batch import KEPT_FIELDS
from pipeline.source.json_object import BadJsonError, read_object
from pipeline.summary import Histogram, Session, unix_time
from pipeline.tools.report.timeline import Axis, Spread, Stretch

NUM_SLOWEST = 10
_EXAMPLES = 3  # of each kind of error
_MOST_KINDS = 50  # of errors; there are about twenty
_TEXT_CHARS = 400

Answer = Mapping[str, Any]  # a line of the partial file


@dataclass(slots=True)
class ErrorKind:
    """Failed answers of one type, and the first of them in the order in which they came."""

    count: int = 0
    examples: list[Answer] = field(default_factory=list[Answer])


@dataclass(slots=True)
class Lengths:
    """Numbers of tokens, and the exact greatest of them."""

    histogram: Histogram = field(default_factory=Histogram)
    longest: int = 0

    def add(self, num_tokens: int) -> None:
        self.histogram.add(num_tokens)
        self.longest = max(self.longest, num_tokens)


@dataclass(slots=True)
class SessionRecord:
    """What the journal says of one session beside its length."""

    conditions: Mapping[str, Any] = field(default_factory=dict[str, Any])  # as Expectation.conditions has them
    generation_at: float | None = None  # Unix time
    peak_bytes: int | None = None  # the most memory that was noted


class RunRecord:
    """One run, read from its journal and its answers without the lock, in memory that does not grow with them.

    Raises NotFoundError where there is no run, DataError where its files are damaged, OSError never.
    """

    def __init__(self, output: Path) -> None:
        self.paths = RunPaths(output)
        if not self.paths.journal.exists():
            raise no_run(self.paths)
        self.run: RunState = read_run(output)
        if self.run.history is None:
            assert self.run.problem is not None
            raise self.run.problem
        self.sessions = [SessionRecord() for _ in self.run.history.sessions]
        self.axis = Axis([(at, one.load_s, one.duration) for at, one in self._beginnings(self.run.history)])
        self.output_tokens = Spread(self.axis.length)
        self.in_flight_s = Spread(self.axis.length)
        self.failures = Spread(self.axis.length)
        self.memory = [0] * len(self.output_tokens.totals())  # the most of each bin, in bytes; 0: nothing noted
        self.prompts = Lengths()
        self.outputs = Lengths()
        self.reasoning = Lengths()  # of answers that have any
        self.finish_reasons: dict[str, int] = {}
        self.errors: dict[str, ErrorKind] = {}
        self._slowest: list[tuple[float, int, Answer]] = []  # a heap, the fastest of them first
        self.history = self._read()

    @property
    def slowest(self) -> list[Answer]:
        """The answers that took longest, the longest first."""
        return [answer for _, _, answer in sorted(self._slowest, key=lambda entry: entry[:2], reverse=True)]

    @property
    def slots(self) -> int | None:
        """Sequences that could be decoded together in the last session that says so."""
        told = (session.conditions.get("slots") for session in reversed(self.sessions))
        return next((slots for slots in told if slots), None)

    @property
    def peak_bytes(self) -> int | None:
        """The most memory that any session held."""
        return max((session.peak_bytes for session in self.sessions if session.peak_bytes), default=None)

    @property
    def problem(self) -> Problem | None:
        """What is wrong with the run's files, if that does not keep them from being read."""
        return self.run.problem.problems[0] if self.run.problem is not None else None

    def _beginnings(self, history: History) -> Iterator[tuple[float, Session]]:
        """Each session with the Unix time at which its generation began."""
        number = -1
        for record in self._records():
            if record["kind"] == "session":
                number += 1
            elif record["kind"] == "loaded" and 0 <= number < len(self.sessions):
                # Journals of before have neither.
                self.sessions[number].conditions = record.get("conditions") or {}
                self.sessions[number].generation_at = record.get("at")
        for session, told in zip(history.sessions, self.sessions, strict=True):
            at = told.generation_at
            yield session.started_at + session.load_s if at is None else at, session

    def _records(self) -> Iterator[Record]:
        try:
            yield from (record for record, _ in read_journal(self.paths.journal))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise damaged(self.paths.journal, f"cannot be used: {error}") from error

    def _read(self) -> History:
        history: History | None = None
        partial = self.paths.partial
        with open_to_read(partial) if partial.exists() else nullcontext(-1) as descriptor:
            for record in self._records():
                if history is None:
                    history = begin_history(record)
                    continue
                history.apply(record)
                if record["kind"] == "commit":
                    number = min(len(history.sessions), len(self.sessions)) - 1
                    stretch = self.axis.stretches[number]
                    committed_at = min(stretch.end, stretch.generation + record["elapsed_s"])
                    self._hold(record.get("memory_bytes"), self.sessions[number], committed_at)
                    group = read_group(descriptor, self.paths.journal, partial, record)
                    for line in group.data.split(b"\n")[:-1]:
                        self._answer(line, stretch, committed_at)
                elif record["kind"] == "retry":
                    self.errors.clear()
                    self.finish_reasons.pop("error", None)
        if history is None:
            raise damaged(self.paths.journal, "has no readable first line")
        if self.run.state != "running":
            history.end_as_killed()
        return history

    def _hold(self, held: int | None, session: SessionRecord, committed_at: float) -> None:
        if held:
            session.peak_bytes = max(session.peak_bytes or 0, held)
            place = min(len(self.memory) - 1, int(committed_at / self.output_tokens.width))
            self.memory[place] = max(self.memory[place], held)

    def _answer(self, line: bytes, stretch: Stretch, committed_at: float) -> None:
        try:
            answer = read_object(line)
            error = answer["error"]
            reason = answer["finish_reason"]
            self.finish_reasons[reason] = self.finish_reasons.get(reason, 0) + 1
            if error is not None:
                self._error(answer, error["type"], committed_at)
            else:
                self._completed(answer, answer["usage"], answer["timing"], stretch)
        except (BadJsonError, KeyError, TypeError, ValueError) as error:
            raise damaged(self.paths.partial, f"holds a line that is no answer: {error}") from error

    def _error(self, answer: Answer, kind: str, committed_at: float) -> None:
        self.failures.add(committed_at, committed_at, 1.0)
        if kind not in self.errors and len(self.errors) >= _MOST_KINDS:
            kind = "others"
        errors = self.errors.setdefault(kind, ErrorKind())
        errors.count += 1
        if len(errors.examples) < _EXAMPLES:
            errors.examples.append(shortened(answer))

    def _completed(self, answer: Answer, usage: Mapping[str, Any], timing: Mapping[str, Any], stretch: Stretch) -> None:
        num_tokens = usage["completion_tokens"]
        self.prompts.add(usage["prompt_tokens"])
        self.outputs.add(num_tokens)
        if usage["reasoning_tokens"]:
            self.reasoning.add(usage["reasoning_tokens"])
        started_at, total_s = unix_time(timing["started_at"]), timing["total_s"]
        position = stretch.position
        end = position(started_at + total_s)
        computed = position(started_at + timing["queue_s"])
        first = position(started_at + timing["time_to_first_token_s"])
        # The first token comes with the prefill, and every other one in its turn.
        self.output_tokens.add(first, end, num_tokens)
        self.in_flight_s.add(computed, end, end - computed)
        # Of two that took as long the earlier line is kept.
        entry = total_s, -answer["index"]
        if len(self._slowest) < NUM_SLOWEST:
            heapq.heappush(self._slowest, (*entry, shortened(answer)))
        elif entry > self._slowest[0][:2]:
            heapq.heapreplace(self._slowest, (*entry, shortened(answer)))


def shortened(answer: Answer) -> Answer:
    """What a page shows of an answer; texts only so far as a page holds them."""
    return {**answer, "completion": _clipped(answer["completion"]), "reasoning": None, "input": _prompt(answer)}


def _prompt(answer: Answer) -> str | None:
    """The prompt as far as the answer repeats it: the text, the last message, or whatever fields there are.

    Of a batch line it stands in the body; None where the answers keep no body, as those in OpenAI's format.
    """
    fields: Any = answer["input"]
    if not isinstance(fields, dict) or set(fields) == {*KEPT_FIELDS}:  # pyright: ignore[reportUnknownArgumentType] - JSON
        return None
    body: Any = fields.get("body")  # pyright: ignore[reportUnknownMemberType,reportUnknownVariableType]
    asked: Any = body if isinstance(body, dict) else fields  # pyright: ignore[reportUnknownVariableType]
    messages, prompt = asked.get("messages"), asked.get("prompt")
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        prompt = messages[-1].get("content")  # pyright: ignore[reportUnknownMemberType,reportUnknownVariableType]
    return _clipped(prompt if prompt is not None else fields)


def _clipped(value: Any) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= _TEXT_CHARS else text[: _TEXT_CHARS - 1] + "…"
