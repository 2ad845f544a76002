"""What a run's journal says has happened: the fold of its records, in the order in which they were written.

The ledger applies each record that it writes to the same fold, so that a run that goes on and a run that is read back
know the same. The kinds of record, and their fields beside `kind`:

    header      version; id, of this journal alone (not in version 1); fields (of the job, dotted, and --limit and
                --shard), num_samples, input: sha256, num_bytes, num_items, files; merged: the digests of the shards'
                outputs that the run was put together from
    input       input, as in the header: the input grew at its end
    session     started_at (Unix time): a process took up the run; mark: what it noted to be compared after its death;
                death: the cause of the death of the session before, null where nothing tells
    loaded      load_s: it has loaded the model; generation time counts from here, `at` (Unix time); conditions: what it
                works under and what it expects, for `report` (null); journals of before have neither of the two
    admit       numbers: about to be handed to the engine
    commit      start, end, sha256 of a group in the partial file; numbers of its lines in their order; failed: those
                answered with an error; memory_bytes, held by the process (null or absent where nothing tells); tally;
                elapsed_s, the session's generation time so far
    unfinished  answers: [number, kept, token ids] each: the ids that follow the first `kept` known ones; elapsed_s
    end         ended, elapsed_s: the session ended in good order
    retry       all answers that are errors are asked for again
    merged      all answers of the shards have been repeated above
    publish     sha256 and num_bytes of the output that is about to appear; companions: the same of the files that
                appear beside it, by suffix; summary; input as it is now; elapsed_s

The number of an answer is index * num_samples + sample; `numbers` are runs as `journal.write_runs` writes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from pipeline.ledger.identity import Header, input_from_record, input_to_record
from pipeline.ledger.journal import (
    Record,
    damaged,
    read_first_and_last,
    read_journal,
    read_runs,
    unreadable,
    whole_lines,
)
from pipeline.records import Json
from pipeline.source.lines import InputDigest
from pipeline.summary import Session, Tally

VERSION = 2
_KNOWN_VERSIONS = (
    1,
    VERSION,
)  # of version 1 no line tells whose it is; a program that knows no other must not read ours
ANSWERED, FAILED = 1, 2  # in History.done
# As `encode_line` writes them: what of a commit counts, and the records of which nothing does.
_COMMIT, _TALLY = b'{"kind":"commit"', b'"tally":'
_COUNTS = re.compile(rb'"tally":\{"completed":(\d+),"failed":(\d+),"input_tokens":(\d+),"output_tokens":(\d+),')
_ELAPSED = re.compile(rb'.*"elapsed_s":([\d.]+)')
_NOT_COUNTED = (b'{"kind":"admit"', b'{"kind":"unfinished"')
_RETRIED = bytes(0 if state == FAILED else state for state in range(256))


@dataclass(frozen=True, slots=True)
class FileDigest:
    """What a file holds."""

    sha256: str  # hexadecimal
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Published:
    """The output that the run has decided on; from then on this and no other file may have its name."""

    sha256: str
    num_bytes: int
    summary: Mapping[str, Json]
    companions: Mapping[str, FileDigest] = field(default_factory=dict[str, FileDigest])  # by suffix: beside the output

    @classmethod
    def from_record(cls, record: Record) -> Published:
        companions = {suffix: FileDigest(*digest) for suffix, digest in record.get("companions", {}).items()}
        return cls(record["sha256"], record["num_bytes"], record["summary"], companions)


@dataclass(frozen=True, slots=True)
class Charge:
    """A fault ended a process while an answer was in flight; `alone` proves that it was this answer's doing."""

    cause: str  # crashed | stalled | out_of_memory
    alone: bool


@dataclass(slots=True)
class History:
    """The state of a run. `apply` is its only way to change; all else reads."""

    header: Header
    first: int  # of the run's numbers: above 0 in a shard
    done: bytearray  # for each number from the first on 0, ANSWERED or FAILED
    num_done: int = 0
    committed_bytes: int = 0  # of the partial file
    tally: Tally = field(default_factory=Tally)
    sessions: list[Session] = field(default_factory=list[Session])
    mark: Mapping[str, Any] = field(default_factory=dict[str, Any])  # of the last session
    admitted: set[int] = field(default_factory=set[int])  # by the last session, and not answered
    suspects: dict[int, tuple[Charge, ...]] = field(default_factory=dict[int, tuple[Charge, ...]])  # not answered since
    unfinished: dict[int, tuple[int, ...]] = field(default_factory=dict[int, tuple[int, ...]])
    published: list[Published] = field(default_factory=list[Published])
    is_published: bool = False  # nothing has happened since the last of these
    is_retry: bool = False  # published before, and going on for answers that were errors
    is_half_merged: bool = False  # put together from shards, and some of their records may be missing

    @property
    def is_complete(self) -> bool:
        return self.num_done == self.header.num_answers

    @property
    def is_running(self) -> bool:
        """The last session has not ended in good order: its process is at work, or died."""
        return bool(self.sessions) and self.sessions[-1].ended == "running"

    def end_as_killed(self) -> None:
        """Of a run that no process holds: a session without an end was killed. What by, the next session judges."""
        if self.is_running:
            self._end("killed")

    def is_done(self, number: int) -> bool:
        """Whether this answer, one of those that the run has to give, is committed."""
        return self.done[number - self.first] != 0

    def next_missing(self, number: int) -> int | None:
        """The first number from this one on that lacks its answer; None where all have theirs."""
        place = self.done.find(0, max(0, number - self.first))
        return None if place < 0 else self.first + place

    def apply(self, record: Record) -> None:
        """Raises KeyError, TypeError or ValueError for a record that makes no sense here."""
        kind = record["kind"]
        if kind not in self._APPLY:
            raise ValueError(f"a record of the unknown kind {kind!r}, of a newer version of overnight")
        self._APPLY[kind](self, record)

    def _input(self, record: Record) -> None:
        header = replace(self.header, input=input_from_record(record["input"]))
        more = header.num_answers - len(self.done)
        if more < 0:
            raise ValueError("the input shrank")
        self.header = header
        self.done.extend(bytes(more))
        self.is_published = False

    def _session(self, record: Record) -> None:
        if self.is_running:
            self._end(record["death"] or "killed")
            if record["death"]:
                self._blame(record["death"])
        self.admitted.clear()
        self.mark = record["mark"]
        self.sessions.append(Session(record["started_at"], 0.0, 0.0, 0, "running"))

    def _loaded(self, record: Record) -> None:
        self.sessions[-1] = replace(self.sessions[-1], load_s=record["load_s"])

    def _admit(self, record: Record) -> None:
        self.admitted.update(read_runs(record["numbers"]))

    def _commit(self, record: Record) -> None:
        start, end, tally = record["start"], record["end"], Tally.from_json(record["tally"])
        if start != self.committed_bytes or end <= start:
            raise ValueError(f"bytes {start} to {end} do not follow byte {self.committed_bytes}")
        done, first, numbers = self.done, self.first, read_runs(record["numbers"])
        if min(numbers, default=first) < first:
            raise ValueError(f"number {min(numbers)} is of another shard")
        for number in numbers:
            if done[number - first]:
                raise ValueError(f"number {number} is answered twice")
            done[number - first] = ANSWERED
        for number in read_runs(record["failed"]):
            done[number - first] = FAILED
        self.num_done += len(numbers)
        self.committed_bytes = end
        self.tally.merge(tally)
        session = self.sessions[-1]
        completed = session.completed + tally.completed
        self.sessions[-1] = replace(session, completed=completed, duration=record["elapsed_s"])
        self.admitted = {number for number in self.admitted if not self.is_done(number)}
        for waiting in (self.suspects, self.unfinished):
            for number in [number for number in waiting if self.is_done(number)]:
                del waiting[number]

    def count(self, completed: int, failed: int, input_tokens: int, output_tokens: int, *, elapsed_s: float) -> None:
        """A commit, as far as it is counted."""
        self.num_done += completed + failed
        self.tally.merge(Tally(completed, failed, input_tokens, output_tokens))
        session = self.sessions[-1]
        self.sessions[-1] = replace(session, completed=session.completed + completed, duration=elapsed_s)

    def _unfinished(self, record: Record) -> None:
        for number, kept, token_ids in record["answers"]:
            self.unfinished[number] = self.unfinished.get(number, ())[:kept] + tuple(token_ids)
        self._elapsed(record)

    def _ended(self, record: Record) -> None:
        self._elapsed(record)
        self._end(record["ended"])
        if record["ended"] == "crashed":
            self._blame("crashed")
        self.admitted.clear()

    def _retry(self, _record: Record) -> None:
        if not self.is_published:
            raise ValueError("a retry of a run that was not finished")
        self.num_done -= self.tally.failed
        self.done = self.done.translate(_RETRIED)
        self.tally.failed = 0
        self.tally.errors.clear()
        self.is_published = False
        self.is_retry = True

    def _merged(self, _record: Record) -> None:
        self.is_half_merged = False

    def _publish(self, record: Record) -> None:
        self._elapsed(record)
        self._end("finished")
        self.published.append(Published.from_record(record))
        self.is_published = True
        self.is_retry = False

    def _elapsed(self, record: Record) -> None:
        self.sessions[-1] = replace(self.sessions[-1], duration=record["elapsed_s"])

    def _end(self, ended: str) -> None:
        self.sessions[-1] = replace(self.sessions[-1], ended=ended)

    def _blame(self, cause: str) -> None:
        """Whatever was in flight may have ended the process; what was in flight alone did."""
        charge = Charge(cause, alone=len(self.admitted) == 1)
        for number in self.admitted:
            self.suspects[number] = (*self.suspects.get(number, ()), charge)

    _APPLY: ClassVar[Mapping[str, Callable[[Any, Record], None]]] = {
        "input": _input,
        "session": _session,
        "loaded": _loaded,
        "admit": _admit,
        "commit": _commit,
        "unfinished": _unfinished,
        "end": _ended,
        "retry": _retry,
        "merged": _merged,
        "publish": _publish,
    }


def publish_record(published: Published, digest: InputDigest) -> Record:
    return {
        "kind": "publish",
        "sha256": published.sha256,
        "num_bytes": published.num_bytes,
        "companions": {suffix: [it.sha256, it.num_bytes] for suffix, it in published.companions.items()},
        "summary": published.summary,
        "input": input_to_record(digest),
    }


def begin_history(record: Record) -> History:
    """The state that a journal's first record tells. Raises KeyError, TypeError or ValueError for any other."""
    if record["kind"] != "header":
        raise ValueError("this is no journal of overnight")
    if record["version"] not in _KNOWN_VERSIONS:
        raise ValueError(f"a journal of version {record['version']}, and this program knows version {VERSION}")
    header = Header.from_record(record)
    first, num_answers = header.numbers.start, header.num_answers
    return History(header, first, bytearray(num_answers), is_half_merged=bool(header.merged))


def replay(path: Path) -> tuple[History, int]:
    """The history that the journal at `path` tells, and how many bytes of the file tell it; the rest is a torn tail.

    Raises DataError where the file cannot be read, is damaged, no journal, or of another version.
    """
    history: History | None = None
    end = 0
    try:
        for record, line_end in read_journal(path):
            if history is None:
                history = begin_history(record)
            else:
                history.apply(record)
            end = line_end
    except OSError as error:
        raise unreadable(path, error) from error
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise damaged(path, f"the record at byte {end} cannot be used: {error}") from error
    if history is None:
        raise damaged(path, "has no readable first line")
    return history, end


def skim(path: Path) -> tuple[History, int]:
    """As `replay`, ten times as fast, for what only counts: `done`, `admitted`, `unfinished` and the histograms of the
    tally stay empty, and whether the records make sense together is not checked.
    """
    history: History | None = None
    end = 0
    try:
        for line in whole_lines(path):
            text = line.text or b""
            if history is None:
                history = begin_history(line.record)
            elif text.startswith(_COMMIT):
                counts, elapsed = _COUNTS.match(text, text.find(_TALLY)), _ELAPSED.match(text, text.rfind(b","))
                if counts is None or elapsed is None:
                    raise ValueError("it does not count its answers")
                history.count(*map(int, counts.groups()), elapsed_s=float(elapsed[1]))
            elif not text.startswith(_NOT_COUNTED):
                history.apply(line.record)
            end = line.end
    except OSError as error:
        raise unreadable(path, error) from error
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise damaged(path, f"the record at byte {end} cannot be used: {error}") from error
    if history is None:
        raise damaged(path, "has no readable first line")
    return history, end


def read_published(path: Path) -> tuple[Header, Published] | None:
    """What a published run was and decided on, from the first and the last line of its journal alone.

    For a run of millions, where `replay` takes seconds. None where the last line does not say so.
    """
    try:
        first, last = read_first_and_last(path)
        if first["kind"] != "header" or first["version"] not in _KNOWN_VERSIONS or last["kind"] != "publish":
            return None
        header = replace(Header.from_record(first), input=input_from_record(last["input"]))
        return header, Published.from_record(last)
    except (OSError, KeyError, TypeError, ValueError):
        return None
