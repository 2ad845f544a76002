"""How a run ended, and its summary: what is counted, what computed it, and what a user is told of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import EXIT_OK, EXIT_SOME_FAILED
from pipeline.records import Json
from pipeline.spec.fingerprint import fingerprint
from pipeline.spec.keys import JobSpec
from pipeline.summary import Session, Tally, summarize

if TYPE_CHECKING:
    from pipeline.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: exit code 0, 3 (some lines are answered with an error) or 75 (stopped; the same resumes)."""

    exit_code: int
    output: Path
    summary: Mapping[str, Json] | None  # of a finished run
    is_news: bool = True  # False where it was finished before and nothing was done


def finished(output: Path, summary: Mapping[str, Json]) -> Outcome:
    """How a run ended whose output has this summary."""
    return Outcome(EXIT_SOME_FAILED if summary["failed"] else EXIT_OK, output, summary)


def plan_facts(plan: Plan, versions: Mapping[str, str]) -> dict[str, Json]:
    """What the plan says of how the answers were computed."""
    return {
        "engine": plan.engine,
        "load_strategy": plan.load_strategy,
        "versions": versions,
    }


def summary_facts(spec: JobSpec, input_sha256: str, done_with: Mapping[str, Json]) -> dict[str, Json]:
    """What the summary says beside the figures; `done_with` is what computed them."""
    return {
        "job": spec.name,
        "engine": done_with["engine"],
        "load_strategy": done_with["load_strategy"],
        "spec_fingerprint": fingerprint(spec),
        "input_sha256": input_sha256,
        "versions": done_with["versions"],
    }


def concluding(told: Mapping[str, Json]) -> Callable[[Tally, Sequence[Session], str], Mapping[str, Json]]:
    """Makes the summary of a run of which `told` is what is not counted."""

    def conclude(tally: Tally, sessions: Sequence[Session], output_sha256: str) -> Mapping[str, Json]:
        return summarize(tally, sessions, {**told, "output_sha256": output_sha256})

    return conclude


def tell_end(output: Path, summary: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """What a user wants to know at the end."""
    failed = f", {summary['failed']} failed" if summary["failed"] else ""
    say(
        f"{summary['completed']} answers{failed} in {summary['duration']:.1f} s of generation "
        f"(and {summary['load_s']:.1f} s of loading): {summary['output_throughput']:.1f} output tokens/s, "
        f"{summary['request_throughput']:.2f} answers/s"
    )
    if failed:
        say("a failed line has its reason under `error`; `overnight report` counts them by kind")
    say(f"answers: {output}")
