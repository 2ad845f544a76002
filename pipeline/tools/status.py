"""`overnight status`: how far a run is, from its files alone; takes no lock and changes nothing."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from pipeline.ledger.history import History
from pipeline.ledger.parts import begun_shards, count_shards
from pipeline.ledger.recovery import RunState, read_run
from pipeline.ledger.upload import Upload
from pipeline.remote import is_remote
from pipeline.source.shard import Shard, all_shards, run_output
from pipeline.spec.keys import JobSpec
from pipeline.summary import timestamp

# The words that OpenAI's batch API has for the states of a batch.
_BATCH_STATUS = {
    "absent": "validating",
    "running": "in_progress",
    "stopped": "cancelled",
    "publishing": "finalizing",
    "finished": "completed",
    "damaged": "failed",
}
_WATCH_S = 2.0
_WATCH_SHARE = 50  # the run needs the processor more than its watcher: 2 % of one
_ADVICE = {
    "absent": "no run yet; `overnight run` begins it",
    "stopped": "`overnight run` resumes it",
    "publishing": "all is answered and not yet published; `overnight run` publishes it",
    "damaged": "`overnight verify` says what is wrong; `overnight run --fresh` moves it aside and begins anew",
}


@dataclass(frozen=True, slots=True)
class Status:
    """The state of the run whose output is `output`, read at `read_at` (Unix time).

    `missing_at` is where a finished output is still to be copied to.
    """

    output: Path
    run: RunState
    read_at: float
    missing_at: str | None = None

    @property
    def is_running(self) -> bool:
        return self.run.state == "running"

    @property
    def batch_status(self) -> str:
        """The word that OpenAI's batch API has for the state."""
        history = self.run.history
        is_answered = history is not None and history.is_complete
        is_finalizing = self.missing_at is not None or (self.run.state == "running" and is_answered)
        return "finalizing" if is_finalizing else _BATCH_STATUS[self.run.state]

    @property
    def left_s(self) -> float | None:
        """Seconds of generation to go at the pace of the last session; None where nothing tells."""
        history = self.run.history
        if history is None or not history.sessions:
            return None
        session = history.sessions[-1]
        num_left = history.header.num_answers - history.num_done
        return num_left * session.duration / session.completed if session.completed else None

    def __str__(self) -> str:
        lines = [f"{self.output}: {self.run.state}"]
        if self.run.process is not None:
            lines[0] += f" (process {self.run.process})"
        if self.run.problem is not None:
            lines.append(str(self.run.problem))
        history = self.run.history
        if history is not None:
            total = history.header.num_answers
            share = 100 * history.num_done / total if total else 100.0
            lines.append(f"{history.num_done} of {total} answers ({share:.1f} %), {history.tally.failed} failed")
            for session in history.sessions:
                lines.append(
                    f"session of {timestamp(session.started_at)}: {session.completed} answers "
                    f"in {session.duration:.1f} s, {session.ended}"
                )
        if self.run.state == "running" and self.left_s is not None:
            lines.append(f"about {self.left_s:.0f} s left")
        if self.missing_at is not None:
            lines.append(f"not copied to {self.missing_at} yet; `overnight run` does it")
        if history is not None and history.is_half_merged:
            lines.append("`overnight merge`, which was interrupted, does it again")
        elif advice := _ADVICE.get(self.run.state):
            lines.append(advice)
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        history = self.run.history
        tally = history and history.tally
        return {
            "object": "status",
            "output": str(self.output),
            "state": self.run.state,
            "status": self.batch_status,
            "process": self.run.process,
            "problem": None if self.run.problem is None else str(self.run.problem),
            "request_counts": {
                "total": history.header.num_answers if history else 0,
                "completed": tally.completed if tally else 0,
                "failed": tally.failed if tally else 0,
            },
            "output_tokens": tally.output_tokens if tally else 0,
            "missing_at": self.missing_at,
            "left_s": None if self.left_s is None else round(self.left_s, 1),
            "sessions": [session.to_json() for session in history.sessions] if history else [],
            "read_at": timestamp(self.read_at),
        }


@dataclass(frozen=True, slots=True)
class ShardsStatus:
    """The states of all shards of a job that has no run of its own, such as those of an array of a scheduler."""

    output: Path
    shards: tuple[tuple[Shard, Status], ...]

    @property
    def state(self) -> str:
        """What holds for the whole: damaged or running if one shard is, finished if all are."""
        states = {status.run.state for _, status in self.shards}
        if states == {"finished"}:
            return "finished"
        return next((state for state in ("damaged", "running") if state in states), "stopped")

    @property
    def is_running(self) -> bool:
        return any(status.is_running for _, status in self.shards)

    @property
    def counts(self) -> dict[str, int]:
        """Of all answers, those of shards that have not begun too: these are known from the others."""
        headers = [history.header for history in self._histories]
        return {
            "total": max((header.input.num_items * header.num_samples for header in headers), default=0),
            "completed": sum(history.tally.completed for history in self._histories),
            "failed": sum(history.tally.failed for history in self._histories),
        }

    @property
    def _histories(self) -> list[History]:
        return [status.run.history for _, status in self.shards if status.run.history is not None]

    def __str__(self) -> str:
        kinds = Counter(status.run.state for _, status in self.shards)
        states = ", ".join(f"{count} {state}" for state, count in kinds.items())
        counts = self.counts
        done, total = counts["completed"] + counts["failed"], counts["total"]
        share = 100 * done / total if total else 100.0
        lines = [
            f"{self.output}: {len(self.shards)} shards, {states}",
            f"{done} of {total} answers ({share:.1f} %), {counts['failed']} failed",
        ]
        for shard, status in self.shards:
            history, process = status.run.history, status.run.process
            told = "" if history is None else f", {history.num_done} of {history.header.num_answers} answers"
            lines.append(f"shard {shard}: {status.run.state}{f' (process {process})' if process else ''}{told}")
        if self.state == "finished":
            lines.append("`overnight merge` joins them")
        elif not self.is_running:
            lines.append("`overnight run --shard I/N` begins or resumes a shard; `status --shard I/N` says more of it")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {
            "object": "status",
            "output": str(self.output),
            "state": self.state,
            "status": _BATCH_STATUS[self.state],
            "request_counts": self.counts,
            "output_tokens": sum(history.tally.output_tokens for history in self._histories),
            "shards": [{"shard": str(shard), **status.to_json()} for shard, status in self.shards],
        }


def job_status(spec: JobSpec, shard: Shard | None = None) -> Status | ShardsStatus:
    """The state of the job's run or of one shard; of all shards, where the job has no run of its own but they have.

    Raises UsageError where there are shards of several divisions; OSError only where a file of the run cannot be read.
    """
    output = run_output(spec.output.file, shard)
    run = read_run(output)
    if run.state == "absent" and shard is None and (begun := begun_shards(output)):
        shards = all_shards(count_shards(output, begun))
        return ShardsStatus(output, tuple((each, _status(each.output(output))) for each in shards))
    url = spec.output.path
    is_missing = shard is None and run.state == "finished" and is_remote(url) and not Upload(output, url).is_noted
    return Status(output, run, time.time(), url if is_missing else None)


def _status(output: Path) -> Status:
    return Status(output, read_run(output), time.time())


def watch_job(
    spec: JobSpec, shard: Shard | None = None, sleep: Callable[[float], None] = time.sleep
) -> Iterator[Status | ShardsStatus]:
    """The state of the job every two seconds, or less often where reading it takes long, until nobody works on it any
    more. Raises as `job_status` does."""
    while True:
        began = time.perf_counter()
        status = job_status(spec, shard)
        took_s = time.perf_counter() - began
        yield status
        if not status.is_running:
            return
        sleep(max(_WATCH_S, _WATCH_SHARE * took_s))


def show_until_end(spec: JobSpec, shard: Shard | None, stream: TextIO, *, as_json: bool) -> None:
    """Write each state of the run until it ends: an object a line, or text that takes the last one's place."""
    shown = 0  # lines on the terminal that the next state takes the place of
    for report in watch_job(spec, shard):
        text = json.dumps(report.to_json(), ensure_ascii=False) if as_json else str(report)
        back = f"\x1b[{shown}F\x1b[J" if shown and not as_json and stream.isatty() else ""
        stream.write(f"{back}{text}\n")
        stream.flush()
        shown = text.count("\n") + 1
