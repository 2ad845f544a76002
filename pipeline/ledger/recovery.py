"""From the files of a run to what it is: taken up again, told from outside, begun, or moved aside."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from pipeline.errors import DataError, NotFoundError, OutputError, Problem, UsageError
from pipeline.ledger.files import DISK, Files, GrowingFile, Patience, RunPaths, creating
from pipeline.ledger.history import VERSION, History, Published, read_published, replay, skim
from pipeline.ledger.identity import Header, Identity, check_input, check_job, input_to_record, is_untouched
from pipeline.ledger.journal import Journal, Record, damaged, encode_line, new_id
from pipeline.ledger.lock import lock_holder
from pipeline.ledger.partial import read_groups
from pipeline.ledger.publish import companions_in_place, place_journal, stranger, summary_bytes
from pipeline.records import Json

Resume = Literal["if-unchanged", "always", "never"]


@dataclass(frozen=True, slots=True)
class RunState:
    """What the files of a run tell, read without the lock and without a change to any of them."""

    state: Literal["absent", "running", "stopped", "publishing", "finished", "damaged"]
    history: History | None = None  # None where there is none to read
    process: int | None = None  # of a running run
    problem: DataError | None = None  # of a damaged one


def read_run(output: Path) -> RunState:
    """The state of the run whose output is `output`, its history skimmed. Hashes nothing: `finished` trusts the
    output's size, and of damage it sees what a journal shows at a glance; `verify` looks at all."""
    paths = RunPaths(output)
    if not paths.journal.exists():
        return RunState("absent")
    process = lock_holder(paths.lock)
    try:
        history, whole = skim(paths.journal)
    except DataError as error:
        return RunState("damaged", process=process, problem=error)
    if process is not None:
        return RunState("running", history, process)
    history.end_as_killed()
    if history.is_published and is_in_place(paths, history.published[-1]):
        return RunState("finished", history)
    try:
        _check_output(paths, history, whole)
    except DataError as error:
        return RunState("damaged", history, problem=error)
    except OutputError:  # a stranger's file, for `run` to refuse: it says nothing about how far the run is
        pass
    return RunState("publishing" if history.is_complete else "stopped", history)


def find_finished(
    output: Path, identity: Identity, *, resume: Resume = "if-unchanged", files: Files = DISK
) -> Mapping[str, Json] | None:
    """The summary of a run that is finished and of this very job; None where there is still something to do.

    Touches nothing and reads the input only if a name, size or time of its files has changed. Raises SpecError,
    DataError and OutputError as `Ledger.open` does.
    """
    paths = RunPaths(output)
    found = read_published(paths.journal)
    if found is None or not is_in_place(paths, found[1]):
        return None
    if resume == "never":
        refuse_existing(paths)
    header, published = found
    check_job(header, identity)
    if not is_untouched(header, identity) and check_input(header, identity, may_grow=resume == "always"):
        return None
    # A process that died between naming the summary and syncing the name left this to us.
    with suppress(OSError):
        files.sync_directory(output.parent)
    return published.summary


def begin(
    files: Files,
    patience: Patience,
    paths: RunPaths,
    identity: Identity,
    companions: Collection[str] = (),
    *,
    merged: tuple[str, ...] = (),
) -> None:
    """Make the journal of a new run, which will publish `companions` beside its output, by suffix.

    `merged` are the digests of the shards' outputs that it is put together from. Raises OutputError where a stranger's
    file is in the way, DataError for a rest.
    """
    for path in (paths.output, paths.summary, *map(paths.companion, companions)):
        if os.path.lexists(path):
            raise stranger(path)
    if paths.partial.exists() and paths.partial.stat().st_size > 0:
        raise damaged(paths.partial, "holds answers, and the journal that must lie beside it is missing")
    record = {"kind": "header", "version": VERSION, "id": new_id(), **Header.of(identity, merged).to_record()}
    with creating(paths.journal):
        place_journal(files, patience, paths, encode_line(record, 0))


def recover(
    files: Files, patience: Patience, paths: RunPaths, identity: Identity, *, may_grow: bool, retry: bool = False
) -> tuple[History, Journal, GrowingFile]:
    """Check all that there is, then cut off what was not committed; the history, and journal and partial to go on with.

    Nothing is changed before everything is checked. Can be killed anywhere and done again. Raises SpecError for a
    changed job, DataError for a changed input or damage, OutputError for a stranger's output, UsageError for a `retry`
    of what was never finished and for a merge that was interrupted, WriteError.
    """
    history, whole = replay(paths.journal)
    _refuse_misuse(paths, history, retry=retry)
    check_job(history.header, identity)
    grown = check_input(history.header, identity, may_grow=may_grow)
    _check_output(paths, history, whole)
    if history.committed_bytes:
        for _ in read_groups(paths.journal, paths.partial):
            pass

    with creating(paths.journal):
        journal = Journal(GrowingFile(files, paths.journal, patience))
    if journal.file.size > whole:
        journal.file.cut(whole)
    # Always: what a killed process had written is in the kernel's memory, and from here on we answer for it. And before
    # anything else changes: a line that was cut must not come back behind one that takes its place.
    journal.sync()
    with creating(paths.partial):
        partial = GrowingFile(files, paths.partial, patience)
        if partial.size > history.committed_bytes:
            partial.cut(history.committed_bytes)
        news: list[Record] = []
        if grown is not None:
            news.append({"kind": "input", "input": input_to_record(grown)})
        elif retry and history.is_published and history.tally.failed:
            news.append({"kind": "retry"})
        if history.published and (news or not history.is_published):
            files.unlink(paths.summary)  # the run is done no more
        files.sync_directory(paths.output.parent)
    for record in news:
        journal.append(record)
        history.apply(record)
    return history, journal, partial


def _refuse_misuse(paths: RunPaths, history: History, *, retry: bool) -> None:
    """What another command has to finish first."""
    if history.is_half_merged:
        message = "was begun by `overnight merge`, which was interrupted; merge again"
        raise UsageError(Problem(message, file=str(paths.output)))
    if retry and not (history.is_published or history.is_retry):
        raise UsageError(Problem("is not finished yet; `overnight run` goes on with it", file=str(paths.output)))


def move_aside(files: Files, paths: RunPaths, companions: Collection[str] = ()) -> None:
    """Rename all files of an earlier run but the lock to NAME.old-N, and those that `companions` would replace.

    The caller holds the lock. Raises OutputError.
    """
    found = read_published(paths.journal)
    beside = {*companions, *(() if found is None else found[1].companions)}
    # The journal first, so that a run that is half moved away is refused, not resumed; then the sign that it is done.
    ours = [paths.journal, paths.summary, paths.output, paths.partial, paths.log, *map(paths.companion, sorted(beside))]
    number = 1
    while any(os.path.lexists(_old(path, number)) for path in ours):
        number += 1
    for path in ours:
        if os.path.lexists(path):
            with creating(_old(path, number)):
                files.rename(path, _old(path, number))
    with creating(paths.output):
        files.sync_directory(paths.output.parent)


def no_run(paths: RunPaths) -> NotFoundError:
    """The refusal of what only makes sense for a run that was begun."""
    return NotFoundError(Problem("there is no run yet; `overnight run` begins it", file=str(paths.journal)))


def refuse_existing(paths: RunPaths) -> NoReturn:
    message = "belongs to an earlier run, and run.resume is never; --fresh moves its files aside"
    raise OutputError(Problem(message, file=str(paths.journal)))


def _old(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.old-{number}")


def is_in_place(paths: RunPaths, published: Published) -> bool:
    """Whether all that was published is there; of all but the summary the size is taken for the content."""
    try:
        right_size = paths.output.stat().st_size == published.num_bytes
        is_there = right_size and companions_in_place(paths, published)
        return is_there and paths.summary.read_bytes() == summary_bytes(published.summary)
    except FileNotFoundError:
        return False


def _check_output(paths: RunPaths, history: History, whole: int) -> None:
    """An output that exists must be one that this run has published."""
    if not history.published:
        for path in filter(os.path.lexists, (paths.output, paths.summary)):
            if paths.journal.stat().st_size > whole:
                raise damaged(paths.journal, f"is damaged at byte {whole}, or {path} is not of this run")
            raise stranger(path)
    elif os.path.lexists(paths.output):
        if paths.output.stat().st_size in {published.num_bytes for published in history.published}:
            return
        if not paths.summary.exists():
            raise stranger(paths.output)
        message = "has changed since it was published; move it away to have it published again"
        raise DataError(Problem(message, file=str(paths.output)))
