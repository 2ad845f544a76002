"""The runs of a job's shards: which there are, and whether they are finished and belong together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import (
    BusyError,
    DataError,
    NotFoundError,
    OvernightError,
    Problem,
    SpecError,
    StoppedError,
    UsageError,
)
from pipeline.ledger.files import RunPaths
from pipeline.ledger.history import Published, read_published
from pipeline.ledger.identity import SHARD, Header, Identity, check_input, check_job
from pipeline.ledger.recovery import is_in_place, read_run
from pipeline.source.lines import InputDigest
from pipeline.source.shard import Shard, all_shards

_JOURNAL_NAME = re.compile(r"\.shard-(\d{1,9})-of-(\d{1,9})\.journal")


@dataclass(frozen=True, slots=True)
class Part:
    """The finished run of one shard."""

    shard: Shard
    paths: RunPaths
    header: Header
    published: Published


def begun_shards(output: Path) -> list[Shard]:
    """The shards of `output` that have a run, by count and number."""
    if not output.parent.is_dir():
        return []
    siblings = (path.name for path in output.parent.iterdir())
    matches = (_JOURNAL_NAME.fullmatch(name.removeprefix(output.name)) for name in siblings)
    return sorted(
        (Shard(int(match[1]), int(match[2])) for match in matches if match),
        key=lambda shard: (shard.count, shard.number),
    )


def count_shards(output: Path, shards: Sequence[Shard]) -> int:
    """Into how many parts these shards divide the job. Raises UsageError where they do not agree,
    NotFoundError where there are none.
    """
    counts = sorted({shard.count for shard in shards})
    if not counts:
        message = "no shard has a run yet; `overnight run --shard 1/N` begins the first of N"
        raise NotFoundError(Problem(message, file=str(output)))
    if len(counts) > 1:
        kinds = " and ".join(map(str, counts))
        message = f"there are runs of {kinds} shards; name one division, or move the files of the other away"
        raise UsageError(Problem(message, file=str(output)))
    return counts[0]


def finished_parts(output: Path, count: int) -> list[Part]:
    """All `count` shards of `output`.

    Where some are not finished, raises an error that says of each what it lacks: NotFoundError if one has no run,
    DataError if one is damaged, StoppedError if only time is missing.
    """
    parts: list[Part] = []
    lacking: list[tuple[type[OvernightError], Problem]] = []
    for shard in all_shards(count):
        paths = RunPaths(shard.output(output))
        found = read_published(paths.journal)
        if found is not None and is_in_place(paths, found[1]):
            parts.append(Part(shard, paths, *found))
        else:
            lacking.append(_lacking(shard, paths))
    _refuse(lacking)
    return parts


def check_parts(parts: Sequence[Part], identity: Identity) -> None:
    """Every shard is of this job, of this input, and of the same model as the first; SpecError, DataError if not."""
    now = identity.measure(None)

    def measured(_prefix_bytes: int | None) -> InputDigest:
        return now

    as_measured = replace(identity, measure=measured)
    lacking: list[tuple[type[OvernightError], Problem]] = []
    for part in parts:
        fields = {**identity.fields, SHARD: str(part.shard)}
        try:
            check_job(part.header, replace(identity, fields=fields, model=parts[0].header.model))
            check_input(part.header, as_measured, may_grow=False)
        except (SpecError, DataError) as error:
            place = f"shard {part.shard}"
            lacking += [
                (type(error), replace(problem, message=f"{place}: {problem.message}")) for problem in error.problems
            ]
    _refuse(lacking)


def joined_facts(parts: Sequence[Part]) -> dict[str, Any]:
    """What the shards' summaries say beside the figures: engine, load strategy, versions; all values where they differ,
    as on machines of two kinds."""
    summaries: list[Mapping[str, Any]] = [part.published.summary for part in parts]
    versions: dict[str, list[str]] = {}
    for summary in summaries:
        for library, version in summary["versions"].items():
            versions.setdefault(library, []).append(version)
    return {
        "engine": _all_of(summary["engine"] for summary in summaries),
        "load_strategy": _all_of(summary["load_strategy"] for summary in summaries),
        "versions": {library: _all_of(found) for library, found in versions.items()},
    }


def _all_of(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))


def _lacking(shard: Shard, paths: RunPaths) -> tuple[type[OvernightError], Problem]:
    run = read_run(paths.output)
    command = f"`overnight run --shard {shard}`"
    if run.history is None or run.state == "damaged":
        if run.problem is None:
            return NotFoundError, Problem(f"shard {shard} has no run; {command} begins it", file=str(paths.output))
        return DataError, run.problem.problems[0]
    if run.process is not None:
        message = f"shard {shard} is still being answered by process {run.process}"
        return BusyError, Problem(message, file=str(paths.output))
    done, total = run.history.num_done, run.history.header.num_answers
    message = f"shard {shard} is not finished: {done} of {total} answers; {command} goes on with it"
    return StoppedError, Problem(message, file=str(paths.output))


def _refuse(lacking: Sequence[tuple[type[OvernightError], Problem]]) -> None:
    """Raise the first of these kinds that there is, with all problems: what waiting will not mend comes first."""
    problems = [problem for _, problem in lacking]
    for kind in (SpecError, NotFoundError, DataError, StoppedError):
        if any(issubclass(each, kind) for each, _ in lacking):
            raise kind(problems)
