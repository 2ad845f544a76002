"""Promise 16, poison items: what ends the process again and again is answered with an error, its neighbours as ever."""

from __future__ import annotations

import ctypes
import random
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from pipeline.engines.echo import EchoEngine
from pipeline.ledger.history import Charge, History
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.witness import Witness
from tests.command import write_job
from tests.faults.compare import answers_of
from tests.faults.memory_group import MIB, enter, memory_group
from tests.faults.processes import PROMPTS, Preparation, done_again, run_to_end
from tests.faults.trials import Trials, chances

STALL_S = 1.0


def segfault() -> None:
    ctypes.string_at(0)


def exhaust_memory() -> None:
    """More than the group may have, as far as the kernel lets us."""
    kept = [b"x" * MIB for _ in range(1 << 10)]
    raise AssertionError(f"{len(kept)} MiB were to be had")


def raise_something() -> None:
    raise ZeroDivisionError("the device is gone")


def hang() -> None:
    time.sleep(3600)


# The deed, the exit code of a process that it ends, and the error that the line is answered with.
POISONS: dict[str, tuple[Callable[[], None], int, str]] = {
    "segfault": (segfault, -11, "crashed"),
    "killed for memory": (exhaust_memory, -9, "out_of_memory"),
    "exception": (raise_something, 70, "crashed"),
    "hang": (hang, 1, "stalled"),
}


def poison(name: str, indexes: frozenset[int]) -> None:
    """These items do to the process what the name says."""
    begin, deed = EchoEngine._begin, POISONS[name][0]

    def _begin(self: EchoEngine, request: Any) -> Any:
        if request.item.index in indexes:
            deed()
        return begin(self, request)

    EchoEngine._begin = _begin


def forget_the_evidence() -> None:
    """The broken variant: a process that died has just died."""
    Witness.cause = lambda *_: None
    History._ended = History._elapsed


def blame_everybody() -> None:
    """The broken variant: whatever was in flight is as guilty as what killed the process."""

    def _blame(self: History, cause: str) -> None:
        for number in self.admitted:
            self.suspects[number] = (*self.suspects.get(number, ()), Charge(cause, alone=True))

    History._blame = _blame
    Ledger.has_suspects = False


def make_job(directory: Path, **sections: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return write_job(directory, PROMPTS, generation={"temperature": 1.0}, **sections)


@cache
def expected() -> list[dict[str, Any]]:
    with TemporaryDirectory() as directory:
        job = make_job(Path(directory))
        assert run_to_end(job).process.exitcode == 0
        return answers_of(job.with_name("out.jsonl"))


def given_up(directory: Path, name: str, chance: random.Random, *prepare: Preparation) -> str | None:
    """The run is started again until it comes to its end; what is wrong with the end, or with the way there."""
    indexes = frozenset(chance.sample(range(len(PROMPTS)), chance.randint(1, 2)))
    max_attempts = chance.randint(2, 4)
    limits = {"max_attempts": max_attempts, "stall_timeout": f"{STALL_S}s"}
    job = make_job(directory, batch={"slots": chance.choice([1, 4, 8])}, run=limits)
    most = max_attempts * len(indexes)
    for _ in range(most + 1):
        run = run_to_end(job, prepare=[partial(poison, name, indexes), *prepare])
        if run.process.exitcode in (0, 3):
            break
        if run.process.exitcode != POISONS[name][1]:
            return f"badly ended: exit code {run.process.exitcode}: {run.talk}"
    else:
        return f"not given up: {most + 1} processes have died, and {most} may"
    if lost := done_again(job.with_name("witness")):
        return f"lost: {len(lost)} acknowledged answers were generated again"
    return wrong(answers_of(job.with_name("out.jsonl")), indexes, POISONS[name][2], max_attempts)


def wrong(answers: list[dict[str, Any]], indexes: frozenset[int], error: str, max_attempts: int) -> str | None:
    for answer, good in zip(answers, expected(), strict=True):
        if answer["index"] not in indexes:
            if answer != good:
                return f"a neighbour suffered: item {answer['index']}: {answer['error']}"
        elif answer["error"] is None or answer["error"]["type"] != error:
            return f"no error: item {answer['index']} is answered with {answer}"
        elif answer["error"]["attempts"] > max_attempts:
            return f"not given up: {answer['error']['attempts']} attempts"
    return None


@pytest.fixture
def limited(request: pytest.FixtureRequest) -> Iterator[list[Preparation]]:
    """For the poison that is killed for memory, a group whose limit it runs into."""
    is_needed = request.node.callspec.params["name"] == "killed for memory"
    with memory_group() if is_needed else nullcontext() as group:
        if group is not None:
            group.limit(64 * MIB)
        yield [] if group is None else [partial(enter, group.path)]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "hang" else []) for name in POISONS]
)
def test_a_poisoned_line_is_given_up_and_its_neighbours_are_answered(
    tmp_path: Path, trials: Trials, limited: list[Preparation], name: str
) -> None:
    full = 50 if name == "hang" else 100  # each takes seconds of waiting
    for number, chance in enumerate(trials.seeds(16, full)):
        assert given_up(tmp_path / str(number), name, chance, *limited) is None


CONTROLS = {"no evidence": (forget_the_evidence, "not given up"), "all to blame": (blame_everybody, "a neighbour")}


@pytest.mark.parametrize("control", CONTROLS)
def test_without_judgement_poison_is_caught(tmp_path: Path, trials: Trials, control: str) -> None:
    prepare, reason = CONTROLS[control]
    names = ["segfault", "exception"]
    found = (
        given_up(tmp_path / str(number), names[number % 2], chance, prepare)
        for number, chance in enumerate(chances(40))
    )
    assert trials.is_caught(16, control, found, reason)
