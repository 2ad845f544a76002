"""What the ledger costs: time inside its calls as a share of a run, and items a second where the engine costs nothing.

    python benchmarks/ledger_cost.py                        # 100,000 lines through echo, every sync on
    python benchmarks/ledger_cost.py jobs/quickstart.yaml   # a job as it is, its output in a temporary directory
    python benchmarks/ledger_cost.py --resume 10000000      # the files of a run with so many answers, then resumed

Everything runs in this process, so that each call can be timed; prints one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from pipeline import load_job, run_job
from pipeline.engines.echo import EchoEngine
from pipeline.job import job_identity
from pipeline.ledger.history import VERSION, skim
from pipeline.ledger.identity import Header
from pipeline.ledger.journal import encode_line, write_runs
from pipeline.ledger.ledger import Ledger
from pipeline.source.inputs import expand_inputs
from pipeline.summary import Tally

CALLS = ("open", "loaded", "admit", "append", "commit_if_due", "commit", "save_unfinished", "publish", "close")


class Clock:
    """Seconds inside each of the ledger's calls; a call within a call counts for the outer one."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(CALLS, 0.0)
        self._is_inside = False
        for name in CALLS:
            if name == "open":
                Ledger.open = classmethod(self._timed(name, Ledger.open.__func__))
            else:
                setattr(Ledger, name, self._timed(name, getattr(Ledger, name)))

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def timed(*args: Any, **options: Any) -> Any:
            if self._is_inside:
                return call(*args, **options)
            self._is_inside = True
            began = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                self.seconds[name] += time.perf_counter() - began
                self._is_inside = False

        return timed


def cost(job: Path, overrides: list[str]) -> dict[str, Any]:
    """Run the job once; the share is of its generation time, to which opening and publishing do not belong."""
    clock = Clock()
    began = time.perf_counter()
    outcome = run_job(load_job(job, overrides=overrides), fresh=True, quiet=True)
    wall_s = time.perf_counter() - began
    assert outcome.summary is not None
    during = sum(clock.seconds[name] for name in ("admit", "append", "commit_if_due", "commit", "save_unfinished"))
    answers = outcome.summary["completed"] + outcome.summary["failed"]
    return {
        "answers": answers,
        "wall_s": wall_s,
        "generation_s": outcome.summary["duration"],
        "answers_per_s_wall": answers / wall_s,
        "ledger_s": during,
        "ledger_share_of_generation": during / outcome.summary["duration"],
        "ledger_us_an_answer": 1e6 * during / answers,
        "calls_s": clock.seconds,
    }


def echo_job(directory: Path, num_items: int) -> Path:
    with (directory / "in.jsonl").open("w") as file:
        file.writelines(f'{{"prompt":"item {index}"}}\n' for index in range(num_items))
    job = directory / "job.yaml"
    paths = {"input": {"path": str(directory / "in.jsonl")}, "output": {"path": str(directory / "out.jsonl")}}
    job.write_text(json.dumps({"model": {"engine": "echo"}, **paths}))
    return job


def resume(directory: Path, num_done: int, per_commit: int = 10_000) -> dict[str, Any]:
    """Seconds until the engine is asked for its first answer, and the most memory up to then."""
    job = echo_job(directory, num_done + 100)
    write_run(directory, job, num_done, per_commit)
    began = time.perf_counter()
    skim(directory / "out.jsonl.journal")
    skim_s = time.perf_counter() - began
    before = peak_bytes()
    found: dict[str, Any] = {}
    generate = EchoEngine.generate

    def first(self: EchoEngine, requests: Any) -> Any:
        for completion in generate(self, requests):
            if not found:
                found.update(first_answer_s=time.perf_counter() - began, bytes_more=peak_bytes() - before)
            yield completion

    EchoEngine.generate = first
    began = time.perf_counter()
    run_job(load_job(job), quiet=True)
    return {
        "done": num_done,
        "status_s": skim_s,
        **found,
        "bytes_an_item": found["bytes_more"] / num_done,
        "published_s": time.perf_counter() - began,
        "bytes_an_item_to_the_end": (peak_bytes() - before) / num_done,
    }


def write_run(directory: Path, job: Path, num_done: int, per_commit: int) -> None:
    """Journal and partial file as a run leaves them whose answers finished out of order within 64 neighbours."""
    spec = load_job(job)
    identity = job_identity(spec, tuple(expand_inputs(spec.input.path)), None)
    shuffle = random.Random(0).shuffle
    size = position = 0
    with (
        (directory / "out.jsonl.journal").open("wb") as journal,
        (directory / "out.jsonl.partial").open("wb") as partial,
    ):

        def record(**fields: Any) -> None:
            nonlocal size
            line = encode_line(fields, size)
            journal.write(line)
            size += len(line)

        record(kind="header", version=VERSION, **Header.of(identity).to_record())
        record(kind="session", started_at=0.0)
        record(kind="loaded", load_s=0.0)
        for first in range(0, num_done, per_commit):
            numbers = list(range(first, min(num_done, first + per_commit)))
            for start in range(0, len(numbers), 64):
                neighbours = numbers[start : start + 64]
                record(kind="admit", numbers=write_runs(neighbours))
                shuffle(neighbours)
                numbers[start : start + 64] = neighbours
            data = b"".join(b'{"index":%d,"sample":0,"completion":"item %d"}\n' % (n, n) for n in numbers)
            record(
                kind="commit",
                start=position,
                end=position + len(data),
                sha256=hashlib.sha256(data).hexdigest(),
                numbers=write_runs(numbers),
                failed="",
                tally=Tally(completed=len(numbers)).to_json(),
                elapsed_s=float(first),
            )
            partial.write(data)
            position += len(data)


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", nargs="?", type=Path, help="a job; without one, echo")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--items", type=int, default=100_000, help="lines for echo")
    parser.add_argument("--resume", type=int, metavar="N", help="resume a run with N answers instead")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as name:
        directory = Path(name)
        if words.resume:
            result = resume(directory, words.resume)
        elif words.job:
            result = cost(words.job, [*words.overrides, f"output.path={directory / 'out.jsonl'}"])
        else:
            result = cost(echo_job(directory, words.items), words.overrides)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
