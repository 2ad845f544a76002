"""All that is wrong with the files of a run, told one by one, where recovery refuses the first of them.

Reads without the lock, in the memory of the done set and one group, and changes nothing. What a crash may leave (a torn
end of journal or partial file) is no fault.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from pipeline.compression import DamagedStreamError, decompressing
from pipeline.errors import DataError, Problem
from pipeline.ledger.files import RunPaths
from pipeline.ledger.history import History, Published, begin_history
from pipeline.ledger.journal import JournalLine, Record, scan_journal, unreadable
from pipeline.ledger.partial import Group, LineIndex, open_to_read, read_exactly, read_group
from pipeline.ledger.publish import sha256_of, summary_bytes
from pipeline.output.forms import Form
from pipeline.output.native import NATIVE
from pipeline.summary import Session

Tell = Callable[[Problem], None]

_DIFFERS = "is not what was published: its SHA-256 differs"


class Audit:
    """A run's journal, read to its end past all damage; then its answers, and its output."""

    def __init__(self, output: Path, tell: Tell) -> None:
        """Tells what is wrong with the journal. Raises DataError where it cannot be read, or not what the run is."""
        self._paths = RunPaths(output)
        self._tell = tell
        self._refused: set[int] = set()  # offsets of records that make no sense
        self.journal_is_sound = True
        self.answers_are_sound = True
        journal = self._paths.journal
        try:
            # Up to here all had reached the disk once: a bad line before it is damage, one after it a torn tail.
            self._known = max((line.synced for line in scan_journal(journal)), default=0)
            self._end: int | None = None
            self.history, self._end = self._replay()
        except OSError as error:
            raise unreadable(journal, error) from error

    def groups(self, on_retry: Callable[[], None]) -> Iterator[Group]:
        """Every sound committed group in the order of the journal; what is wrong with the others is told.

        `on_retry` is called where, between two groups, all failed answers were asked for again.
        """
        journal, partial = self._paths.journal, self._paths.partial
        if not self.history.committed_bytes:
            return
        next_line = 1  # of the partial file
        with open_to_read(partial) as descriptor:
            for line in self._trusted():
                if line.text is None or line.offset in self._refused:
                    continue
                record = line.record
                if record["kind"] == "retry":
                    on_retry()
                if record["kind"] != "commit":
                    continue
                try:
                    group = read_group(descriptor, journal, partial, record)
                except DataError as error:
                    self.answers_are_sound = False
                    data = read_exactly(descriptor, record["end"] - record["start"], record["start"])
                    for problem in error.problems:  # those of the partial file begin at its line
                        self._tell(replace(problem, line=next_line) if problem.file == str(partial) else problem)
                    next_line += data.count(b"\n")
                else:
                    next_line += len(group.numbers)
                    yield group

    def check_output(self, lines: LineIndex | None, *, summary_line: bool, form: Form = NATIVE) -> None:
        """Tell whether what was published is not what is there; `lines` are the answers, if they are sound."""
        history, paths = self.history, self._paths
        if history.is_published:
            published = history.published[-1]
            self._check_bytes(published, lines, form, summary_line=summary_line)
            self._check_companions(published)
            self._check_summary(published)
        elif os.path.lexists(paths.output) and sha256_of(paths.output) not in {it.sha256 for it in history.published}:
            self._tell(Problem("exists, and this run has not published it", file=str(paths.output)))

    def _replay(self) -> tuple[History, int]:
        journal = str(self._paths.journal)
        history: History | None = None
        end = 0
        gap = False  # lines before this one are lost
        for number, line in enumerate(self._trusted(), 1):
            if line.synced > line.offset:
                gap = self._lost(Problem(f"lines are missing before byte {line.offset}", file=journal, line=number))
            if line.text is None:
                message = f"bytes {line.offset} to {line.end} are damaged: the line fails its checksum"
                gap = self._lost(Problem(message, file=journal, line=number))
                continue
            try:
                record = line.record
                if history is None:
                    history = begin_history(record)
                else:
                    if gap:
                        _bridge(history, record)
                        gap = record["kind"] != "commit"
                    history.apply(record)
            except (KeyError, TypeError, ValueError, IndexError) as error:
                if history is None:
                    raise DataError(
                        Problem(f"does not begin with what the run is: {error}", file=journal, line=number)
                    ) from None
                self._refused.add(line.offset)
                gap = self._lost(
                    Problem(f"the record at byte {line.offset} makes no sense: {error}", file=journal, line=number)
                )
            end = line.end
        if history is None:
            raise DataError(Problem("has no whole line", file=journal))
        if history.is_published and not history.is_complete and self.journal_is_sound:
            missing = len(history.done) - history.num_done
            self._tell(Problem(f"says that the output was published with {missing} answers missing", file=journal))
        return history, end

    def _trusted(self) -> Iterator[JournalLine]:
        """The lines up to the torn tail, or to the end of the first reading of a journal that still grows."""
        for line in scan_journal(self._paths.journal):
            if line.text is None and line.offset >= self._known:
                return
            if self._end is not None and line.offset >= self._end:
                return
            yield line

    def _lost(self, problem: Problem) -> bool:
        self._tell(problem)
        self.journal_is_sound = False
        return True

    def _check_bytes(self, published: Published, lines: LineIndex | None, form: Form, *, summary_line: bool) -> None:
        output, summary = self._paths.output, self._paths.summary
        if not os.path.lexists(output):
            if summary.exists():
                self._tell(Problem("is missing; `overnight run` publishes it again", file=str(output)))
            return
        try:
            if lines is None or not self.history.is_complete:
                if sha256_of(output) != published.sha256:
                    self._tell(Problem(_DIFFERS, file=str(output)))
            else:
                self._compare(published, lines, form, summary_line=summary_line)
        except DamagedStreamError as error:
            self._tell(Problem(str(error), file=str(output)))
        except OSError as error:
            self._tell(Problem(f"cannot be read: {error.strerror}", file=str(output)))

    def _compare(self, published: Published, lines: LineIndex, form: Form, *, summary_line: bool) -> None:
        """The output, byte by byte, with what the form makes of the answers and the summary."""
        output = self._paths.output
        answers = ""

        def conclude(sha256: str) -> bytes:
            nonlocal answers
            answers = sha256
            return summary_bytes(published.summary)

        if not form.has_lines:  # another version of the library writes other bytes for the same rows
            if sha256_of(output) != published.sha256:
                self._tell(Problem(_DIFFERS, file=str(output)))
            deque(form.encode(lines.read_in_order(), conclude, summary_line=summary_line), maxlen=0)
            self._check_digest(answers, published)
            return
        offset, line = 0, 1
        with output.open("rb") as raw, decompressing(raw, output.name) as file:
            for expected in form.encode(lines.read_in_order(), conclude, summary_line=summary_line):
                found = file.read(len(expected))
                if found != expected:
                    same = _num_common(found, expected)
                    what = "ends" if same == len(found) else "differs from the run's answers"
                    place = line + expected.count(b"\n", 0, same)
                    self._tell(Problem(f"{what} at byte {offset + same}", file=str(output), line=place))
                    return
                offset, line = offset + len(found), line + found.count(b"\n")
            if file.read(1):
                self._tell(Problem(f"goes on after byte {offset}, where it was to end", file=str(output), line=line))
                return
        self._check_digest(answers if sha256_of(output) == published.sha256 else None, published)

    def _check_digest(self, answers: str | None, published: Published) -> None:
        if answers != published.summary.get("output_sha256"):
            message = "names another SHA-256 than that of the output, whose bytes are the run's answers"
            self._tell(Problem(message, file=str(self._paths.journal)))

    def _check_companions(self, published: Published) -> None:
        for suffix, digest in published.companions.items():
            path = self._paths.companion(suffix)
            try:
                sha256 = sha256_of(path)
            except OSError as error:
                self._tell(Problem(f"cannot be read: {error.strerror}", file=str(path)))
                continue
            if sha256 is None:
                self._tell(Problem("is missing; `overnight run` publishes it again", file=str(path)))
            elif sha256 != digest.sha256:
                self._tell(Problem(_DIFFERS, file=str(path)))

    def _check_summary(self, published: Published) -> None:
        path, expected = self._paths.summary, summary_bytes(published.summary)
        try:
            with path.open("rb") as file:
                found = file.read(len(expected) + 1)
        except FileNotFoundError:
            if self._paths.output.exists():
                self._tell(Problem("is missing; `overnight run` writes it again", file=str(path)))
        except OSError as error:
            self._tell(Problem(f"cannot be read: {error.strerror}", file=str(path)))
        else:
            if found != expected:
                same = _num_common(found, expected)
                self._tell(Problem(f"is not the summary that was published: byte {same} differs", file=str(path)))


def _num_common(a: bytes, b: bytes) -> int:
    """How many bytes are the same from the beginning."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(a), len(b)))


def _bridge(history: History, record: Record) -> None:
    """Make sense of a record that follows lost ones, so that their loss is not told again with each."""
    if not history.sessions:
        history.sessions.append(Session(0.0, 0.0, 0.0, 0, "running"))
    if record["kind"] == "commit":
        history.committed_bytes = record["start"]
