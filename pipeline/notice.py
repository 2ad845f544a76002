"""Runs the command of `run.on_finish` when a run has ended; whatever it does changes nothing about the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from pipeline.outcome import Outcome
from pipeline.source.shard import Shard
from pipeline.spec.keys import JobSpec

TIMEOUT_S = 30.0


def notify(
    command: Sequence[str], facts: Mapping[str, str], say: Callable[[str], None], *, timeout_s: float = TIMEOUT_S
) -> None:
    """Run the command, without a shell, with the facts as environment variables beside our own; wait for its end.

    It reads nothing, and what it prints goes to standard error, for standard output is data. After `timeout_s` seconds
    it is killed, with all that it has started. A failure is told.
    """
    try:
        process = subprocess.Popen(
            command, env=os.environ | facts, stdin=subprocess.DEVNULL, stdout=_standard_error(), start_new_session=True
        )
    except OSError as error:
        say(f"run.on_finish: {command[0]} cannot be started: {error.strerror}")
        return
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        say(f"run.on_finish: {command[0]} was killed after {timeout_s:.0f} s")
    else:
        if code != 0:
            say(f"run.on_finish: {command[0]} ended with {code}")


def facts_of_end(spec: JobSpec, shard: Shard | None, outcome: Outcome, message: str) -> dict[str, str]:
    """What the command is told, by variable; `message` says why a run ended that has no summary."""
    summary = outcome.summary or {}
    output = outcome.output.absolute()
    return {
        "OVERNIGHT_EXIT_CODE": str(outcome.exit_code),
        "OVERNIGHT_JOB": spec.name,
        "OVERNIGHT_SHARD": "" if shard is None else str(shard),
        "OVERNIGHT_OUTPUT": str(output),
        "OVERNIGHT_SUMMARY": f"{output}.summary.json" if summary else "",
        "OVERNIGHT_COMPLETED": str(summary.get("completed", "")),
        "OVERNIGHT_FAILED": str(summary.get("failed", "")),
        "OVERNIGHT_MESSAGE": message.replace("\0", ""),
    }


def _standard_error() -> int:
    """The descriptor, or nothing where a program that embeds us has put something else in its place."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return subprocess.DEVNULL
