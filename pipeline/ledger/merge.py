"""Joins the finished runs of all shards into the run of the whole job, as if it had never been divided.

A merged run is like any other: its partial file holds the shards' answers one shard after the other, and its journal
their records, as far as they tell of sessions and of answers that still stand. So its tally and its sessions are by
construction the sum of theirs, and publishing, status, verify and retry need not know that there were shards. Only the
header says so, with the digests of the outputs that were merged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.errors import BusyError, DataError, OutputError, Problem
from pipeline.ledger.files import DISK, Files, GrowingFile, Patience, RunPaths, creating
from pipeline.ledger.history import read_published, replay
from pipeline.ledger.identity import Identity
from pipeline.ledger.journal import Journal, Record, read_journal, write_runs
from pipeline.ledger.lock import RunLock
from pipeline.ledger.partial import Group, open_to_read, read_group
from pipeline.ledger.parts import Part, check_parts
from pipeline.ledger.recovery import begin, find_finished, move_aside
from pipeline.records import Json
from pipeline.source.shard import all_shards
from pipeline.summary import Tally


def find_merged(output: Path, identify: Callable[[int | None], Identity]) -> Mapping[str, Json] | None:
    """The summary of an output that is finished and of this job; None where there is still something to do.

    `identify` gives what the job is now, for a trial's --limit. Raises DataError where a shard was published anew
    since it was merged; SpecError and DataError as `find_finished` does.
    """
    found = read_published(RunPaths(output).journal)
    if found is None:
        return None
    header, _ = found
    summary = find_finished(output, identify(header.limit))
    if summary is None:
        return None
    problems: list[Problem] = []
    for shard, sha256 in zip(all_shards(len(header.merged)), header.merged, strict=True):
        now = read_published(RunPaths(shard.output(output)).journal)
        if now is not None and now[1].sha256 != sha256:
            message = "was published anew since it was merged; `overnight merge --fresh` merges again"
            problems.append(Problem(message, file=str(shard.output(output))))
    if problems:
        raise DataError(problems)
    return summary


def merge_parts(
    output: Path,
    parts: Sequence[Part],
    identity: Identity,
    *,
    fresh: bool = False,
    companions: Collection[str] = (),
    files: Files = DISK,
    patience: Patience | None = None,
) -> None:
    """Make the files of a run whose output is `output`, with all answers and not yet published; it will publish
    `companions` beside its output, by suffix.

    Can be killed anywhere and done again. Holds one group of answers in memory. Raises SpecError where a shard is of
    another job or model, DataError where it is of another input or damaged; OutputError where `output` or a run of its
    own is there (`fresh` moves it aside); BusyError where somebody works on the run or on a shard; WriteError.
    """
    patience = patience or Patience()
    paths = RunPaths(output)
    check_parts(parts, identity)
    lock = RunLock(paths.lock, files)
    try:
        if fresh:
            move_aside(files, paths, companions)
        merged = tuple(part.published.sha256 for part in parts)
        if not paths.journal.exists():
            whole = replace(identity, model=parts[0].header.model)
            begin(files, patience, paths, whole, companions, merged=merged)
        history, _ = replay(paths.journal)
        if history.header.merged != merged:
            kind = "of other shards' answers" if history.header.merged else "that was not merged"
            message = f"belongs to a run {kind}; `overnight merge --fresh` moves its files aside"
            raise OutputError(Problem(message, file=str(paths.journal)))
        if history.is_half_merged:
            _copy_all(files, patience, paths, parts)
    finally:
        lock.release()


def _copy_all(files: Files, patience: Patience, paths: RunPaths, parts: Sequence[Part]) -> None:
    """From the beginning: what an earlier merge left behind its header is dropped, for the shards hold it all.

    Only the last record makes the others count, and it is written when all answers are on the disk.
    """
    with creating(paths.journal):
        journal = Journal(GrowingFile(files, paths.journal, patience))
        partial = GrowingFile(files, paths.partial, patience)
        _, header_end = next(iter(read_journal(paths.journal)))
    try:
        journal.file.cut(header_end)
        partial.cut(0)
        with creating(paths.partial):
            files.sync_directory(paths.output.parent)
        for part in parts:
            for record, data in _kept(files, part):
                if record["kind"] == "commit":
                    start = partial.size
                    partial.append(data)
                    record.update(start=start, end=partial.size, sha256=hashlib.sha256(data).hexdigest())
                journal.append(record)
        partial.sync()
        journal.append({"kind": "merged"})
    finally:
        partial.close()
        journal.file.close()


def _kept(files: Files, part: Part) -> Iterator[tuple[Record, bytes]]:
    """The records of the shard that the merged journal repeats; each commit with the lines that still stand.

    A retry asks for all errors so far again, so of the groups before the last one only the answers stand.
    """
    lock = RunLock(part.paths.lock, files)
    try:
        if (now := read_published(part.paths.journal)) is None or now[1] != part.published:
            raise BusyError(Problem("was taken up again while it was to be merged", file=str(part.paths.output)))
        num_retries = sum(record["kind"] == "retry" for record, _ in read_journal(part.paths.journal))
        dropped = Tally()  # of groups of which no line stands
        with open_to_read(part.paths.partial) as descriptor:
            for record, _ in read_journal(part.paths.journal):
                match record["kind"]:
                    case "session" | "loaded" | "end":
                        yield record, b""
                    case "publish":
                        yield {"kind": "end", "ended": "finished", "elapsed_s": record["elapsed_s"]}, b""
                    case "retry":
                        num_retries -= 1
                    case "commit":
                        group = read_group(descriptor, part.paths.journal, part.paths.partial, record)
                        tally = Tally.from_json(record["tally"])
                        tally.merge(dropped)
                        dropped = Tally()
                        if num_retries:
                            group, tally = _without_errors(group), _without_failed(tally)
                        if group.numbers:
                            yield _commit(record, group, tally), group.data
                        else:
                            dropped = tally
                    case _:
                        pass
    finally:
        lock.release()


def _commit(record: Record, group: Group, tally: Tally) -> Record:
    """The commit of the group as it stands; where it lies in the partial file is for the caller to say."""
    numbers, failed = write_runs(group.numbers), write_runs(group.failed)
    return {**record, "numbers": numbers, "failed": failed, "tally": tally.to_json()}


def _without_errors(group: Group) -> Group:
    failed = set(group.failed)
    if not failed:
        return group
    lines = zip(group.numbers, group.data.splitlines(keepends=True), strict=True)
    stand = [(number, line) for number, line in lines if number not in failed]
    return Group(group.start, b"".join(line for _, line in stand), [number for number, _ in stand], [])


def _without_failed(tally: Tally) -> Tally:
    return replace(tally, failed=0, errors={})
