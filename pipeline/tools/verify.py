"""`overnight verify`: whether the files of a run are whole, agree with each other, the job and the input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, NotFoundError, Problem
from pipeline.job import job_identity
from pipeline.ledger.audit import Audit
from pipeline.ledger.files import RunPaths
from pipeline.ledger.history import History
from pipeline.ledger.identity import Header, check_input, check_job
from pipeline.ledger.lock import lock_holder
from pipeline.ledger.partial import Group, LineIndex
from pipeline.ledger.recovery import no_run
from pipeline.output import choose_form
from pipeline.source.inputs import expand_inputs
from pipeline.source.json_object import BadJsonError, read_object
from pipeline.source.shard import Shard, run_output
from pipeline.spec.keys import JobSpec
from pipeline.summary import Tally

_SUMMED = {  # the summary's names, and ours
    "completed": "completed",
    "failed": "failed",
    "total_input_tokens": "input_tokens",
    "total_output_tokens": "output_tokens",
    "total_reasoning_tokens": "reasoning_tokens",
    "errors": "errors",
}


@dataclass(frozen=True, slots=True)
class Verification:
    """What was looked at. `state` is that of the run: running, stopped, publishing (all answered) or finished."""

    output: str
    state: str
    process: int | None  # that works on the run
    num_problems: int
    num_answers: int  # that the run has to give
    completed: int
    failed: int
    num_groups: int
    num_bytes: int  # of answers

    def __str__(self) -> str:
        verdict = "1 problem" if self.num_problems == 1 else f"{self.num_problems} problems"
        done = self.completed + self.failed
        counted = f"{done} of {self.num_answers} answers ({self.failed} errors) in {self.num_groups} groups"
        lines = [f"{self.output}: {self.state}; {counted}: {verdict if self.num_problems else 'all is right'}"]
        if self.process is not None:
            lines.append(f"process {self.process} is working on it; what came after this began was not looked at")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {"object": "verification", "valid": not self.num_problems, **asdict(self)}


class _Counter:
    """Checks each answer's line against what the journal says of it, and counts anew what the journal counted."""

    def __init__(self, path: Path, num_samples: int, tell: Callable[[Problem], None]) -> None:
        self._path = str(path)
        self._num_samples = num_samples
        self._tell = tell
        self.num_groups = 0
        self.num_bytes = 0
        self.tally = Tally()

    def retry(self) -> None:
        """All errors so far are to be answered again."""
        self.tally.failed = 0
        self.tally.errors.clear()

    def check(self, groups: Iterator[Group]) -> Iterator[Group]:
        """The groups as they come, told where a line is not the answer that the journal says it is."""
        for group in groups:
            failed = set(group.failed)
            offset = group.start
            for number, line in zip(group.numbers, group.data.split(b"\n"), strict=False):
                try:
                    self._count(read_object(line), number, is_failed=number in failed)
                except (BadJsonError, KeyError, TypeError, ValueError) as error:
                    index, sample = divmod(number, self._num_samples)
                    message = f"byte {offset} does not begin the answer to item {index}, sample {sample}: {error}"
                    self._tell(Problem(message, file=self._path))
                offset += len(line) + 1
            self.num_groups += 1
            self.num_bytes += len(group.data)
            yield group

    def _count(self, record: dict[str, Any], number: int, *, is_failed: bool) -> None:
        found = record["index"], record["sample"]
        if found != divmod(number, self._num_samples):
            raise ValueError(f"it says item {found[0]}, sample {found[1]}")
        error, usage = record["error"], record["usage"]
        if (error is not None) != is_failed:
            raise ValueError("the journal counts it otherwise as answered or as failed")
        if is_failed:
            self.tally.failed += 1
            self.tally.errors[error["type"]] = self.tally.errors.get(error["type"], 0) + 1
            return
        self.tally.completed += 1
        self.tally.input_tokens += usage["prompt_tokens"]
        self.tally.output_tokens += usage["completion_tokens"]
        self.tally.reasoning_tokens += usage["reasoning_tokens"]


def verify_job(spec: JobSpec, tell: Callable[[Problem], None], *, shard: Shard | None = None) -> Verification:
    """Check the run of the job or of its shard, finished or not, and `tell` each problem as it is found.

    Journal (checksums, order, every answer once), answers (digests of all groups, every line the answer that the
    journal says), a recount, the input's digest, and of a published run output and summary byte by byte. Reads without
    the lock and changes nothing. Raises NotFoundError where there is no run, DataError where the journal does not tell
    what the run is, SpecError where the job is another one than the run's.
    """
    paths = RunPaths(run_output(spec.output.file, shard))
    num_problems = 0

    def count(problem: Problem) -> None:
        nonlocal num_problems
        num_problems += 1
        tell(problem)

    if not paths.journal.exists():
        raise no_run(paths)
    process = lock_holder(paths.lock)
    audit = Audit(paths.output, count)
    history = audit.history
    _check_identity(spec, shard, history.header, count)
    counter = _Counter(paths.partial, history.header.num_samples, count)
    lines: LineIndex | None = None
    try:
        lines = LineIndex(paths.partial, history.header.numbers, counter.check(audit.groups(counter.retry)))
    except DataError as error:
        for problem in error.problems:
            count(problem)
    if audit.journal_is_sound and audit.answers_are_sound:
        _check_counts(paths, history, counter.tally, count)
    else:
        lines = None
    if process is None:
        audit.check_output(lines, summary_line=spec.output.summary_line, form=choose_form(spec, paths.output))
    return Verification(
        output=str(paths.output),
        state=_state(paths, history, process),
        process=process,
        num_problems=num_problems,
        num_answers=history.header.num_answers,
        completed=counter.tally.completed,
        failed=counter.tally.failed,
        num_groups=counter.num_groups,
        num_bytes=counter.num_bytes,
    )


def _check_identity(spec: JobSpec, shard: Shard | None, header: Header, tell: Callable[[Problem], None]) -> None:
    """SpecError for another job; tells of another input. A trial's --limit is the run's own."""
    limit = header.limit
    try:
        files = tuple(expand_inputs(spec.input.path))
    except NotFoundError as error:
        check_job(header, job_identity(spec, (), limit, shard))
        problems = error.problems
    else:
        identity = job_identity(spec, files, limit, shard)
        check_job(header, identity)
        try:
            check_input(header, identity, may_grow=False)
            return
        except (DataError, NotFoundError) as error:
            problems = error.problems
    for problem in problems:
        tell(problem)


def _check_counts(paths: RunPaths, history: History, recount: Tally, tell: Callable[[Problem], None]) -> None:
    """Tell where journal or summary count otherwise than the answers' lines."""
    places: list[tuple[Path, Mapping[str, Any]]] = [(paths.journal, history.tally.to_json())]
    if history.is_published:
        published = history.published[-1].summary
        places.append((paths.summary, {ours: published.get(theirs) for theirs, ours in _SUMMED.items()}))
        if published.get("input_sha256") != history.header.input.sha256:
            tell(Problem("input_sha256 is not that of the run's input", file=str(paths.summary)))
    counted = recount.to_json()
    for path, said in places:
        for name in _SUMMED.values():
            if said[name] != counted[name]:
                tell(Problem(f"{name}: says {said[name]}, and the answers come to {counted[name]}", file=str(path)))


def _state(paths: RunPaths, history: History, process: int | None) -> str:
    if process is not None:
        return "running"
    if history.is_published and paths.output.exists() and paths.summary.exists():
        return "finished"
    return "publishing" if history.is_complete else "stopped"
