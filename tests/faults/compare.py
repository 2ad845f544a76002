"""What an interrupted run must have in common with an undisturbed one."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.command import without_times
from tests.faults.processes import done_again, make_job, run_to_end


def answers_of(output: Path) -> list[dict[str, Any]]:
    """The answers of a published file without what depends on the clock or on where the input lies."""
    records = [json.loads(line) for line in output.read_bytes().split(b"\n")[:-1]]
    assert records[-1]["object"] == "summary", "the last line is not the summary"
    for record in records[:-1]:
        if record["error"] is not None:
            record["error"].pop("file", None)
            record["error"]["message"] = record["error"]["message"].replace(str(output.parent), "")
    return without_times(records[:-1])


@cache
def undisturbed() -> list[dict[str, Any]]:
    """The answers of `make_job` when nothing goes wrong."""
    with TemporaryDirectory() as directory:
        job = make_job(Path(directory), delay="0ms")
        run = run_to_end(job)
        assert run.process.exitcode == 3, run.talk
        return answers_of(job.with_name("out.jsonl"))


def incomplete(output: Path) -> str | None:
    """What is wrong with a file that has the output's name: it is to be whole whenever it is there."""
    data = output.read_bytes()
    try:
        last = data.rstrip(b"\n").rpartition(b"\n")[2]
        summary = json.loads(last)
        if summary["output_sha256"] == hashlib.sha256(data[: -len(last) - 1]).hexdigest():
            return None
    except (ValueError, KeyError, TypeError):
        pass
    return f"the output is there, and is not what it says of itself ({len(data)} bytes)"


def problem_with(job: Path, exit_code: int, talk: str, output: Path | None = None) -> str | None:
    """What is wrong with an interrupted run of `make_job` that has come to its end; None where nothing is."""
    output = output or job.with_name("out.jsonl")
    if lost := done_again(job.with_name("witness")):
        return f"lost: {len(lost)} acknowledged answers were generated again"
    if exit_code != 3:
        return f"not resumed: exit code {exit_code}: {talk}"
    try:
        answers = answers_of(output)
    except (ValueError, KeyError) as error:
        return f"corrupt: the output cannot be read: {error}"
    if answers != undisturbed():
        return "corrupt: the output is another one"
    return incomplete(output)
