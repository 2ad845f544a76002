"""Promise 18, hangs end: at the stall timeout, the GIL held or not, with a traceback in the log; the run resumes."""

from __future__ import annotations

import ctypes
import os
import random
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pipeline.watch as watch_module
from pipeline.engines.echo import EchoEngine
from tests.faults.compare import problem_with
from tests.faults.processes import GOOD_ITEMS, Preparation, Run, make_job, queued_s, run_to_end
from tests.faults.trials import Trials, chances

STALL_S = 1.0
SLACK_S = 5.0  # of a busy machine, from the timer to the death


def hang_without_the_lock() -> None:
    time.sleep(3600)


def hang_with_the_lock() -> None:
    ctypes.PyDLL(None).sleep(3600)


HANGS: dict[str, Callable[[], None]] = {"GIL released": hang_without_the_lock, "GIL held": hang_with_the_lock}


def hang_at(name: str, index: int) -> None:
    begin = EchoEngine._begin

    def _begin(self: EchoEngine, request: Any) -> Any:
        if request.item.index == index:
            HANGS[name]()
        return begin(self, request)

    EchoEngine._begin = _begin


def watch_from_a_thread() -> None:
    """The broken variant: a thread of Python watches, which needs the GIL to do anything."""
    timers: list[threading.Timer] = []

    def cancel() -> None:
        while timers:
            timers.pop().cancel()

    def dump_traceback_later(timeout: float, **_: Any) -> None:
        cancel()
        timers.append(threading.Timer(timeout, os._exit, [1]))
        timers[0].daemon = True
        timers[0].start()

    watch_module.faulthandler = SimpleNamespace(
        dump_traceback_later=dump_traceback_later, cancel_dump_traceback_later=cancel
    )


def hung(directory: Path, name: str, chance: random.Random, *prepare: Preparation) -> str | None:
    """One item hangs; what is wrong with how that ends, and with the run that is taken up after it."""
    job = make_job(directory, run={"stall_timeout": f"{STALL_S}s"})
    journal, log = job.with_name("out.jsonl.journal"), job.with_name("out.jsonl.log")
    run = Run(job, prepare=[partial(hang_at, name, chance.choice(GOOD_ITEMS)), *prepare])
    last = 0.0  # of the process's own time when the journal grew: how long it waits for a processor is not its doing
    size = -1
    while run.wait(0.02) is None:
        now = time.monotonic() - queued_s(run.process.pid)
        now_size = journal.stat().st_size if journal.exists() else 0
        if now_size > size:
            size, last = now_size, now
        if now - last > STALL_S + SLACK_S:
            run.kill_after(0)
            return f"still there {STALL_S + SLACK_S} s after the last sign of life"
    if run.process.exitcode != 1:
        return f"badly ended: exit code {run.process.exitcode}: {run.talk}"
    if HANGS[name].__name__ not in log.read_text():
        return f"no traceback: {log.read_text()}"
    end = run_to_end(job)
    return problem_with(job, end.process.exitcode, end.talk)


@pytest.mark.parametrize("name", HANGS)
def test_a_hang_ends_with_a_traceback_and_the_run_goes_on(tmp_path: Path, trials: Trials, name: str) -> None:
    for number, chance in enumerate(trials.seeds(18, 100, len(HANGS))):
        assert hung(tmp_path / str(number), name, chance) is None


@pytest.mark.slow
def test_a_thread_that_watches_does_not_see_a_hang_that_holds_the_lock(tmp_path: Path, trials: Trials) -> None:
    found = (
        hung(tmp_path / str(number), "GIL held", chance, watch_from_a_thread)
        for number, chance in enumerate(chances(20))
    )
    assert trials.is_caught(18, "a thread watches", found, "still there")
