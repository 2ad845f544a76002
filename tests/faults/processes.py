"""Real processes that run `overnight`, cheap enough for thousands, and a witness of what each of them acknowledged.

A process is forked from a server that has the program loaded and has run it once, so that it starts in milliseconds.
Before it runs the command it may be prepared: a limit set, an operation made to fail, a part of the program replaced by
a broken one. The witness is a file outside of the run's directory, so that what happens to the run's disk does not
happen to it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pipeline.cli
import pipeline.engines.echo
import pipeline.job
import pipeline.plan.plan
import pipeline.probe
import pipeline.spec.job_file
from pipeline.ledger import ledger as ledger_module
from pipeline.ledger.files import Files
from tests.command import write_job

_context = get_context("forkserver")
_context.set_forkserver_preload(["tests.faults.rehearsal"])

Preparation = Callable[[], None]  # importable, or a partial of what is

TIMEOUT_S = 300  # far beyond any run, also beside ten other processes
_COMMIT_S = 0.01  # many groups in a run of milliseconds
PROMPTS = [{"id": f"p{i}", "prompt": " ".join(f"w{n}" for n in range((i * 7) % 23 + 1))} for i in range(36)]
BAD_LINES = [b"{not json", b'{"text": 1}']
LINES = [*PROMPTS[:20], *BAD_LINES, *PROMPTS[20:]]
GOOD_ITEMS = [index for index, line in enumerate(LINES) if line not in BAD_LINES]  # only these reach the engine
NUM_SAMPLES = 2
NUM_ANSWERS = NUM_SAMPLES * len(LINES)
NUM_SLOTS = 8


def make_job(directory: Path, *, delay: str = "1ms", output: Path | None = None, **sections: Any) -> Path:
    """A job of the echo engine whose answers depend on their random streams and finish in another order."""
    directory.mkdir(parents=True, exist_ok=True)
    return write_job(
        directory,
        LINES,
        model={"echo": {"delay": delay}},
        generation={"num_samples": NUM_SAMPLES, "temperature": 1.0},
        batch={"slots": NUM_SLOTS},
        output={"path": str(output or directory / "out.jsonl")},
        **sections,
    )


class Run:
    """One process of `overnight run JOB`."""

    def __init__(
        self, job: Path, *words: str, prepare: Sequence[Preparation] = (), witness: Path | None = None
    ) -> None:
        self.witness = witness or job.with_name("witness")
        self._talk = job.with_name("talk")
        arguments = (["run", str(job), *words], self.witness, self._talk, tuple(prepare))
        self.process = _context.Process(target=_main, args=arguments, daemon=True)
        self.process.start()

    def wait(self, seconds: float = TIMEOUT_S) -> int | None:
        """The exit code, negative for a signal; None where the process still runs after so many seconds."""
        self.process.join(seconds)
        return self.process.exitcode

    def kill_after(self, seconds: float) -> int:
        """SIGKILL after so many seconds unless it has ended before; its exit code."""
        if self.wait(seconds) is None:
            self.process.kill()
        return self.end()

    def end(self) -> int:
        """The exit code of a process that must come to its end."""
        code = self.wait()
        if code is None:
            self.process.kill()
            raise AssertionError(f"no end after {TIMEOUT_S} s; it said: {self.talk}")
        return code

    def seconds_to_end(self) -> float:
        """How long it takes from now to its end, without the time in which it waited for a processor that others had:
        a promise of seconds is none about a busy machine."""
        began, queued_before = time.monotonic(), queued_s(self.process.pid)
        queued = queued_before
        while self.process.exitcode is None:
            queued = max(queued, queued_s(self.process.pid))
            self.process.join(0.01)
            if time.monotonic() - began > TIMEOUT_S:
                break
        return time.monotonic() - began - (queued - queued_before)

    @property
    def talk(self) -> str:
        """What it has said so far."""
        return self._talk.read_text(errors="replace") if self._talk.exists() else ""


def queued_s(process: int | None) -> float:
    """Seconds that the thread of a process which has waited longest for a processor has; see proc(5), schedstat."""
    longest = 0
    with suppress(OSError, IndexError):  # one of them, or the process, ends just now
        for thread in Path(f"/proc/{process}/task").iterdir():
            longest = max(longest, int((thread / "schedstat").read_text().split()[1]))
    return longest / 1e9


def slow_disk() -> None:
    """Every operation on a file of the run takes a while, so that a random moment falls into or between two of them."""
    for name in ("open", "write", "sync", "link", "rename", "unlink", "sync_directory", "truncate"):
        setattr(Files, name, _slow(getattr(Files, name)))


def _slow(operation: Callable[..., Any]) -> Callable[..., Any]:
    def slowly(*arguments: Any) -> Any:
        time.sleep(0.001)
        done = operation(*arguments)
        time.sleep(0.001)
        return done

    return slowly


@cache
def duration(delay: str = "1ms", *prepare: Preparation) -> float:
    """Seconds that an undisturbed run of `make_job` takes, from start to exit, on this machine now."""
    with TemporaryDirectory() as directory:
        job = make_job(Path(directory), delay=delay)
        times: list[float] = []
        for _ in range(3):  # the first starts the server
            began = time.monotonic()
            run_to_end(job, "--fresh", prepare=prepare)
            times.append(time.monotonic() - began)
        return min(times[1:])


def slow_duration() -> float:
    """The same with a slow disk and no delay."""
    return duration("0ms", slow_disk)


def run_to_end(job: Path, *words: str, prepare: Sequence[Preparation] = ()) -> Run:
    run = Run(job, *words, prepare=prepare)
    run.end()
    return run


def done_again(witness: Path) -> set[str]:
    """Answers that were acknowledged by one session and generated again by a later one: each was lost."""
    acknowledged: set[str] = set()
    waiting: list[str] = []
    lost: set[str] = set()
    for told in witness.read_text().split("\n")[:-1]:
        if told == "begin":
            waiting = []
        elif told == "commit":
            acknowledged.update(waiting)
            waiting = []
        else:
            if told in acknowledged:
                lost.add(told)
            waiting.append(told)
    return lost


def num_generated(witness: Path) -> int:
    """How many answers all sessions together have generated."""
    return sum(told not in ("begin", "commit") for told in witness.read_text().split("\n")[:-1])


def _main(words: list[str], witness: Path, talk: Path, prepare: tuple[Preparation, ...]) -> None:
    descriptor = os.open(talk, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["overnight", *words]
    ledger_module._COMMIT_S = _COMMIT_S
    for step in prepare:
        step()
    pipeline.job.Ledger = _witnessed(pipeline.job.Ledger, witness)
    pipeline.cli.main()


def _witnessed(ledger: type[Any], path: Path) -> type[Any]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def tell(what: str) -> None:
        os.write(descriptor, what.encode() + b"\n")

    class Witnessed(ledger):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            tell("begin")

        def append(self, completion: Any, line: bytes) -> None:
            tell(f"{completion.item.index}/{completion.sample}")
            super().append(completion, line)

        def commit(self) -> None:
            super().commit()
            tell("commit")

    return Witnessed
