"""Every byte that a run writes: answers are committed in groups, and what is committed survives whatever happens.

A commit writes the group to X.partial and syncs it, then its record to X.journal and syncs that; only then are the
answers acknowledged. X itself appears at the end, whole. A ledger serves one thread.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Literal, Self

from pipeline.errors import OvernightError
from pipeline.ledger.files import DISK, Files, GrowingFile, Patience, RunPaths, creating, make_directories, writing
from pipeline.ledger.history import Charge, History, publish_record
from pipeline.ledger.identity import Identity
from pipeline.ledger.journal import Journal, Record, damaged, write_runs
from pipeline.ledger.lock import RunLock
from pipeline.ledger.partial import LineIndex, read_groups
from pipeline.ledger.publish import (
    companions_in_place,
    place_companions,
    place_output,
    sha256_of,
    write_output,
    write_summary,
)
from pipeline.ledger.recovery import Resume, begin, move_aside, no_run, recover, refuse_existing
from pipeline.ledger.witness import Witness
from pipeline.output.forms import Form
from pipeline.output.native import NATIVE
from pipeline.records import Completion, Json, Request, Unfinished
from pipeline.summary import Session, Tally

Summarize = Callable[[Tally, Sequence[Session], str], Mapping[str, Json]]
Ended = Literal["stopped", "time_limit", "low_memory", "failed", "crashed"]

_COMMIT_BYTES = 8 << 20
_COMMIT_S = 1.0
_ADMISSION_S = 0.1  # requests that are answered in this time share a line of the journal
_MAX_ADMISSION = 256
_MAX_LINE_BYTES = 0xFFFF_FFFF  # of an answer; lengths are kept in four bytes


class Ledger:
    """The only writer of a run's files, from `open`, which takes the lock, to `close`, which gives it back.

    Whatever writes raises WriteError when the disk refuses, and DataError where another program has written to the
    files; what was acknowledged stays, and the same command resumes.
    """

    num_answers: int  # that the whole run has to give
    unfinished: Mapping[tuple[int, int], tuple[int, ...]]  # (index, sample) → tokens that earlier sessions generated

    def __init__(
        self,
        files: Files,
        patience: Patience,
        paths: RunPaths,
        lock: RunLock,
        recovered: tuple[History, Journal, GrowingFile],
        witness: Witness,
    ) -> None:
        self._files = files
        self._patience = patience
        self._paths = paths
        self._lock = lock
        self._is_open = True
        self._is_whole = True  # False only while the files may know more than the history
        self._history, self._journal, self._partial = recovered
        self._num_samples = self._history.header.num_samples
        self._numbers = self._history.header.numbers
        self.num_answers = len(self._numbers)
        self._memory_held = witness.memory_held
        self._begin_group()
        self._generating_since = time.monotonic()
        self._num_appended = 0
        self.unfinished = {self._pair(number): tokens for number, tokens in self._history.unfinished.items()}
        history = self._history
        # Where all is answered only publishing is left, which is no session; an empty run has its one.
        self._has_session = not (history.is_published or (history.is_complete and history.sessions))
        if self._has_session:
            death = witness.cause(history.mark) if history.is_running else None
            self._record({"kind": "session", "started_at": time.time(), "death": death, "mark": witness.mark()})

    @classmethod
    def open(
        cls,
        output: Path,
        identity: Identity,
        *,
        resume: Resume = "if-unchanged",
        fresh: bool = False,
        retry: bool = False,
        files: Files = DISK,
        patience: Patience | None = None,
        witness: Witness | None = None,
        companions: Collection[str] = (),
    ) -> Self:
        """Take up the run whose output is `output`, or begin it; `fresh` moves the files of an earlier run aside first.

        `retry` takes up a finished run, or an earlier retry, for the answers that are errors: a finished run has those
        to give again. `companions` are the suffixes of what the output's form puts beside it.

        Raises BusyError where another holds the run; SpecError naming each changed key; DataError for a changed input
        or a damaged file; OutputError for a stranger's output, for an earlier run if `resume` is never, and where the
        files cannot be created. With `retry` NotFoundError where there is no run, UsageError where it is not finished.
        """
        paths = RunPaths(output)
        patience = patience or Patience()
        if retry and not paths.journal.exists():
            raise no_run(paths)
        if not paths.journal.exists():
            with creating(output.parent):
                make_directories(files, output.parent)
        lock = RunLock(paths.lock, files)
        try:
            if fresh:
                move_aside(files, paths, companions)
            if not paths.journal.exists():
                begin(files, patience, paths, identity, companions)
            elif resume == "never" and not retry:
                refuse_existing(paths)
            recovered = recover(files, patience, paths, identity, may_grow=resume == "always", retry=retry)
            return cls(files, patience, paths, lock, recovered, witness or Witness(paths.log))
        except BaseException:
            lock.release()
            raise

    @property
    def tally(self) -> Tally:
        """Of all that is committed, by all sessions."""
        return self._history.tally

    @property
    def sessions(self) -> Sequence[Session]:
        """All sessions; the last is this one unless the output was published before."""
        return self._history.sessions

    @property
    def input_sha256(self) -> str:
        """Hexadecimal digest of the decompressed input."""
        return self._history.header.input.sha256

    @property
    def items(self) -> range:
        """The indexes of the items that the run answers."""
        return self._history.header.items

    @property
    def is_complete(self) -> bool:
        """Everything is answered and committed; only `publish` is left to do."""
        return self._history.is_complete

    def is_done(self, index: int, sample: int) -> bool:
        """Whether this answer is committed."""
        return self._history.is_done(index * self._num_samples + sample)

    def next_unanswered_item(self, index: int) -> int | None:
        """The first item from `index` on that lacks an answer; None where all have theirs."""
        number = self._history.next_missing(index * self._num_samples)
        return None if number is None else number // self._num_samples

    @property
    def has_suspects(self) -> bool:
        """Whether a fault ended a session that had answers in flight which are still missing."""
        return bool(self._history.suspects)

    def next_suspect_item(self, index: int) -> int | None:
        """The first item from `index` on that is suspected of having killed a process; None where there is none."""
        numbers = (number for number in self._history.suspects if number >= index * self._num_samples)
        number = min(numbers, default=None)
        return None if number is None else number // self._num_samples

    def charges(self, index: int, sample: int) -> Sequence[Charge]:
        """The deaths of processes that this answer, still missing, may have caused."""
        return self._history.suspects.get(self._number(index, sample), ())

    def loaded(self, load_s: float, conditions: Mapping[str, Json] | None = None) -> None:
        """The model is loaded, which took `load_s` seconds; the session's generation time begins.

        `conditions` are kept for those who look at the run later: under what this session works.
        """
        self._generating_since = time.monotonic()
        self._record({"kind": "loaded", "load_s": load_s, "at": time.time(), "conditions": conditions})

    def admit(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Note that these (index, sample) are about to be handed to the engine, so that a death has its suspects."""
        numbers = (self._number(index, sample) for index, sample in pairs)
        self._record({"kind": "admit", "numbers": write_runs(numbers)})

    def admitting(self, requests: Iterator[Request]) -> Iterator[Request]:
        """Each request after it was admitted.

        Requests are drawn ahead only as many as were lately answered in a tenth of a second, so that a fast engine
        does not pay for a line of the journal each, and a slow one names no suspects that it never saw.
        """
        while chunk := list(islice(requests, self._admission_size())):
            self.admit((request.item.index, request.sample) for request in chunk)
            yield from chunk

    def append(self, completion: Completion, line: bytes) -> None:
        """Take an answer and its line, which ends with its only `\\n`; it is acknowledged by the next commit.

        Raises ValueError for an answer that is there already or that nobody asked for, and for any other line.
        """
        number = self._number(completion.item.index, completion.sample)
        if number in self._group or self._history.is_done(number):
            raise ValueError(f"item {completion.item.index}, sample {completion.sample} is answered already")
        if line.find(b"\n") != len(line) - 1 or not 0 < len(line) <= _MAX_LINE_BYTES:
            raise ValueError("an answer is one line of less than 4 GiB with a line end")
        if not self._group:
            self._group_began = time.monotonic()
        self._group[number] = line
        self._group_bytes += len(line)
        self._group_tally.add(completion)
        if completion.error is not None:
            self._group_failed.append(number)
        self._num_appended += 1

    def count_out_of_memory(self, num_events: int) -> None:
        """Memory ran out so many times more; the next commit says so."""
        self._group_tally.out_of_memory_events += num_events

    def commit_if_due(self) -> bool:
        """Commit when the oldest answer has waited a second or 8 MiB have gathered; whether it did."""
        if not self._group:
            return False
        if self._group_bytes < _COMMIT_BYTES and time.monotonic() - self._group_began < _COMMIT_S:
            return False
        self.commit()
        return True

    def commit(self) -> None:
        """All answers taken so far survive whatever happens after this returns."""
        if not self._group:
            return
        data = b"".join(self._group.values())
        partial, journal = self._partial, self._journal
        record: Record = {
            "kind": "commit",
            "start": partial.size,
            "end": partial.size + len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "numbers": write_runs(self._group),
            "failed": write_runs(self._group_failed),
            "memory_bytes": self._memory_held(),
            "tally": self._group_tally.to_json(),
            "elapsed_s": self._elapsed_s(),
        }
        partial.check_untouched()
        journal.file.check_untouched()
        sizes = partial.size, journal.file.size
        self._is_whole = False
        try:
            partial.append(data)
            partial.sync()
            journal.append(record)
            journal.sync()
        except BaseException:
            partial.take_back(sizes[0])
            journal.file.take_back(sizes[1])
            self._is_whole = True
            raise
        self._history.apply(record)
        self._begin_group()
        self._is_whole = True

    def save_unfinished(self, answers: Iterable[Unfinished]) -> None:
        """Keep the tokens so far of answers in flight: a later session finds them in `unfinished`.

        Only what is new since the last save is written, or all of an answer that was started over.
        """
        new: list[tuple[int, int, tuple[int, ...]]] = []
        for answer in answers:
            number = self._number(answer.index, answer.sample)
            known = self._history.unfinished.get(number, ())
            kept = len(known) if answer.token_ids[: len(known)] == known else 0
            if kept < len(answer.token_ids):
                new.append((number, kept, answer.token_ids[kept:]))
        if new:
            self._record({"kind": "unfinished", "answers": new, "elapsed_s": self._elapsed_s()}, sync=True)

    def publish(self, summarize: Summarize, *, summary_line: bool, form: Form = NATIVE) -> Mapping[str, Json]:
        """Commit, then make X in its form, what goes beside it and X.summary.json appear, and return the summary.

        `summarize` gets the tally, the sessions and the SHA-256 of the lines. It is not asked again when an earlier
        process got as far as deciding: the output is then exactly the one decided on. Raises ValueError while
        answers are missing, OutputError where a stranger's file has come into the output's place.
        """
        self.commit()
        history, paths = self._history, self._paths
        if not history.is_complete:
            raise ValueError(f"{self.num_answers - history.num_done} answers are missing")
        decided = history.published[-1] if history.is_published else None
        if decided is None or sha256_of(paths.output) != decided.sha256 or not companions_in_place(paths, decided):
            sessions = list(history.sessions)
            elapsed_s = self._elapsed_s() if self._has_session else sessions[-1].duration
            sessions[-1] = replace(sessions[-1], duration=elapsed_s, ended="finished")
            groups = read_groups(paths.journal, paths.partial)
            lines = LineIndex(paths.partial, self._numbers, groups)
            built = write_output(
                self._files,
                self._patience,
                paths,
                lines.read_in_order,
                lambda sha256: decided.summary if decided else summarize(history.tally, sessions, sha256),
                summary_line=summary_line,
                form=form,
            )
            if decided is None:
                record = publish_record(built, history.header.input)
                self._record({**record, "elapsed_s": elapsed_s}, sync=True)
            elif built != decided:
                raise damaged(paths.journal, "names an output that these answers do not make")
            place_companions(self._files, paths, built)
            place_output(self._files, paths, {published.sha256 for published in history.published})
        # Also where an earlier process placed the output and was killed before it could do this.
        with writing(paths.output):
            self._files.sync_directory(paths.output.parent)
        summary = history.published[-1].summary
        write_summary(self._files, self._patience, paths, summary)
        return summary

    def close(self, ended: Ended = "failed") -> None:
        """Commit what is open, note how the session ended unless it published, and give up the lock. Never raises for
        a disk that refuses: nothing acknowledged depends on it."""
        if not self._is_open:
            return
        self._is_open = False
        try:
            with suppress(OvernightError):
                if self._is_whole:
                    self.commit()
                if self._is_whole and self._has_session and not self._history.is_published:
                    self._record({"kind": "end", "ended": ended, "elapsed_s": self._elapsed_s()}, sync=True)
        finally:
            self._partial.close()
            self._journal.file.close()
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Only what nobody foresaw is evidence against the answers in flight; a full disk is not.
        unforeseen = kind is not None and issubclass(kind, Exception) and not issubclass(kind, OvernightError)
        self.close("crashed" if unforeseen else "failed")

    def _number(self, index: int, sample: int) -> int:
        number = index * self._num_samples + sample
        if not 0 <= sample < self._num_samples or number not in self._numbers:
            raise ValueError(f"the run has no item {index} with sample {sample}")
        return number

    def _pair(self, number: int) -> tuple[int, int]:
        return divmod(number, self._num_samples)

    def _elapsed_s(self) -> float:
        return round(time.monotonic() - self._generating_since, 3)

    def _admission_size(self) -> int:
        rate = self._num_appended / max(self._elapsed_s(), _COMMIT_S)
        return min(_MAX_ADMISSION, max(1, int(rate * _ADMISSION_S)))

    def _begin_group(self) -> None:
        self._group: dict[int, bytes] = {}  # number → line, in the order of arrival
        self._group_bytes = 0
        self._group_failed: list[int] = []
        self._group_tally = Tally()
        self._group_began = 0.0

    def _record(self, record: Record, *, sync: bool = False) -> None:
        # One whose sync fails may stay: it is true, and after it the journal takes no other.
        self._journal.append(record)
        if sync:
            self._journal.sync()
        self._history.apply(record)
