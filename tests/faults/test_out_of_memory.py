"""Promise 17, out of memory: the batch shrinks, remembers what fits and grows again; no item is lost, each event told.

And before the kernel would kill the process, it stops by itself.
"""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

import pipeline.job
import pipeline.watch as watch_module
from pipeline import read_results
from pipeline.engines.echo import EchoEngine
from pipeline.engines.failures import item_error
from pipeline.engines.headroom import Headroom
from pipeline.engines.slots import SlotEngine
from pipeline.ledger.history import replay
from pipeline.ledger.ledger import Ledger
from pipeline.output.native import render
from pipeline.records import Completion, Prompt, Request, Settings
from pipeline.runner import Runner
from pipeline.stop import Stop
from pipeline.summary import summarize
from tests.command import REPOSITORY
from tests.faults.compare import problem_with
from tests.faults.memory_group import MIB, MemoryGroup, enter, memory_group
from tests.faults.processes import Preparation, make_job, run_to_end
from tests.faults.small_run import identity
from tests.faults.trials import Trials, chances
from tests.tiny_models import ENGINES, engine_of, prompts, request, tampered, tiny_model

NUM_ITEMS = 60
SLOTS = 8
EXCEPTIONS: list[Callable[[], Exception]] = [
    MemoryError,
    lambda: torch.OutOfMemoryError("CUDA out of memory"),
    lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
]


@pytest.fixture(autouse=True)
def nothing_to_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """These models have no memory to give back, and looking for it takes longer than all they do."""
    monkeypatch.setattr("pipeline.engines.slots.release_memory", lambda: None)
    monkeypatch.setattr("pipeline.engines.padded.release_memory", lambda: None)


@cache
def requests() -> tuple[Request, ...]:
    lines = prompts(NUM_ITEMS, seed=17, longest=20)
    return tuple(request(index, line, max_new_tokens=6, temperature=0.8) for index, line in enumerate(lines))


def answered(output: Path, engine: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Answers and summary of a run of the whole program behind the engine."""
    by_index = {one.item.index: one for one in requests()}
    with Ledger.open(output, identity(NUM_ITEMS)) as ledger:
        runner = Runner(
            encode=lambda prompt: by_index[prompt.item.index],
            engine=engine,
            ledger=ledger,
            render=render,
            num_samples=1,
            stop=Stop(),
            beat=lambda: None,
            observe=lambda _tally, _num_in_flight: None,
            max_attempts=3,
            save_unfinished_s=0.0,
        )
        runner.run(Prompt(one.item, "", None, Settings()) for one in requests())
        summary = ledger.publish(
            lambda tally, sessions, digest: summarize(tally, sessions, {"job": "x", "output_sha256": digest}),
            summary_line=False,
        )
    return [_told(record) for record in read_results(output)], dict(summary)


def _told(record: dict[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in ("index", "completion", "finish_reason", "usage", "error")}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return answered(tmp_path_factory.mktemp("whole") / "x", engine_of(tiny_model("llama"), slots=SLOTS))[0]


class Shortage:
    """A model's memory that does not suffice at random calls, or for more than so many rows."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._share = chance.choice([0.0, 0.02, 0.1])
        self._rows = chance.randint(1, SLOTS - 1) if not self._share else SLOTS
        self.num_events = 0
        self.rows: list[int] = []  # of each call

    def __call__(self, input_ids: torch.Tensor) -> None:
        rows = self.num_rows(input_ids)
        self.rows.append(rows)
        if rows > self._rows or (rows > 1 and self._chance.random() < self._share):
            self.num_events += 1
            raise self._chance.choice(EXCEPTIONS)()

    @property
    def is_lasting(self) -> bool:
        return not self._share

    def num_rows(self, input_ids: torch.Tensor) -> int:
        return len(input_ids)


class PackedShortage(Shortage):
    """Of a model that gets the tokens of all rows in one: as many as there are places of the cache they may see."""

    def num_rows(self, input_ids: torch.Tensor) -> int:
        return self.live()

    live: Callable[[], int]


def ran_out(
    directory: Path, kind: str, chance: random.Random, expected: list[dict[str, Any]]
) -> tuple[str | None, int]:
    """What is wrong with a run whose memory runs out now and then, and how often it did."""
    directory.mkdir()
    shortage = (PackedShortage if kind == "slots" else Shortage)(chance)
    shortage.live = lambda: 1  # while the engine is made
    engine = engine_of(tampered(shortage), engine=kind, slots=SLOTS, window=SLOTS, report=lambda _told: None)
    shortage.live = lambda: len(engine._schedule.live)
    answers, summary = answered(directory / "x", engine)
    found = wrong(answers, summary, shortage, expected)
    return found, shortage.num_events


def wrong(
    answers: list[dict[str, Any]], summary: dict[str, Any], shortage: Shortage, expected: list[dict[str, Any]]
) -> str | None:
    if len(answers) != NUM_ITEMS:
        return f"lost: {NUM_ITEMS - len(answers)} items have no answer"
    if failed := [answer["index"] for answer in answers if answer["error"]]:
        return f"failed: items {failed}"
    if answers != expected:
        return "another answer: the text of an item is not that of an undisturbed run"
    if summary["out_of_memory_events"] != shortage.num_events:
        return f"untold: {summary['out_of_memory_events']} events in the summary, and there were {shortage.num_events}"
    if shortage.is_lasting and shortage.num_events > 2 * SLOTS.bit_length() + 4:
        return f"not remembered: memory ran out {shortage.num_events} times in {NUM_ITEMS} answers"
    return None


@pytest.mark.parametrize("kind", ENGINES)
def test_running_out_of_memory_loses_no_item_and_is_told(
    tmp_path: Path, trials: Trials, kind: str, expected: list[dict[str, Any]]
) -> None:
    wanted = trials.begin(17, 200, len(ENGINES))
    for number in itertools.count():
        problem, num_events = ran_out(tmp_path / str(number), kind, random.Random(number), expected)
        assert problem is None, number
        trials.num_trials += num_events
        if trials.num_trials >= wanted:
            return


def test_a_shortage_that_passes_is_forgotten(tmp_path: Path) -> None:
    rows: list[int] = []

    def run_out_at_first(input_ids: torch.Tensor) -> None:
        rows.append(len(input_ids))
        if len(rows) == 1:
            raise MemoryError

    engine = engine_of(tampered(run_out_at_first), slots=SLOTS, report=lambda _told: None)
    _, summary = answered(tmp_path / "x", engine)
    assert summary["out_of_memory_events"] == 1
    assert rows[:2] == [8, 4] and max(rows[2:]) == 8


def fail_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken variant: the whole batch is answered with the error."""

    def _begin_anew(self: SlotEngine, parts: Any, exception: Exception) -> Iterator[Completion]:
        self.out_of_memory_events += 1
        for part in parts:
            self._release(part.seat)
            yield self._fail(part.seat.row, item_error(exception, 1, 1))

    monkeypatch.setattr(SlotEngine, "_begin_anew", _begin_anew)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken variant: each answer makes the batch as large as it was."""
    monkeypatch.setattr(Headroom, "grow", lambda self, _num_answers=1: setattr(self, "most", self._full))


def tell_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken variant: what is borne in silence."""
    monkeypatch.setattr(Runner, "_count_out_of_memory", lambda _self: None)


CONTROLS = {
    "all fail": (fail_all, "slots", "failed"),
    "no memory of it": (forget, "slots", "not remembered"),
    "untold": (tell_nobody, "padded", "untold"),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_less_care_with_memory_is_caught(
    tmp_path: Path, trials: Trials, expected: list[dict[str, Any]], control: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, kind, reason = CONTROLS[control]
    spoil(monkeypatch)
    found = (ran_out(tmp_path / str(n), kind, chance, expected)[0] for n, chance in enumerate(chances(40)))
    assert trials.is_caught(17, control, found, reason)


# The kernel's killer

LIMIT = 96 * MIB  # beyond what a process has from the server that it is forked from
_kept: list[bytes] = []


def grow_with_each_answer(num_bytes: int) -> None:
    """Memory that never comes back, and a look at it after each answer, for this is a small group."""
    begin = EchoEngine._begin

    def _begin(self: EchoEngine, request: Any) -> Any:
        _kept.append(b"x" * num_bytes)
        return begin(self, request)

    EchoEngine._begin = _begin
    watch_module._LOOK_S = 0.0
    watch_module._RESERVE_SHARE = 8


def look_at_nothing() -> None:
    """The broken variant: nobody asks how much memory is left."""
    pipeline.job.memory_left = lambda: None


def shrinking(directory: Path, group: MemoryGroup, chance: random.Random, *prepare: Preparation) -> str | None:
    """A run that eats its memory up, and what is wrong with how it ends and goes on."""
    group.limit(LIMIT)
    job = make_job(directory)
    eat = partial(grow_with_each_answer, chance.randint(3, 8) * MIB)
    run = run_to_end(job, prepare=[partial(enter, group.path), eat, *prepare])
    if run.process.exitcode != 75 or "MiB of memory are left" not in run.talk:
        return f"badly ended: exit code {run.process.exitcode}: {run.talk}"
    history, _ = replay(job.with_name("out.jsonl.journal"))
    if history.sessions[-1].ended != "low_memory":
        return f"misjudged: the session ended {history.sessions[-1].ended}"
    last = run_to_end(job)
    return problem_with(job, last.process.exitcode, last.talk)


def test_a_run_stops_by_itself_before_the_killer_comes(tmp_path: Path, trials: Trials) -> None:
    with memory_group() as group:
        for number, chance in enumerate(trials.seeds(17, 40)):
            assert shrinking(tmp_path / str(number), group, chance) is None
        found = (
            shrinking(tmp_path / f"c{number}", group, chance, look_at_nothing)
            for number, chance in enumerate(chances(40))
        )
        assert trials.is_caught(17, "no look at memory", found, "badly ended: exit code -9")


PROBE = """
import sys
from pathlib import Path
from tests.faults.memory_group import enter
enter(Path(sys.argv[1]))
from pipeline.probe import probe_machine
machine = probe_machine()
print(machine.cgroup.memory_limit_bytes, machine.usable_memory_bytes)
"""


def test_the_plan_sees_the_limit_of_its_group() -> None:
    with memory_group() as group:
        group.limit(512 * MIB)
        command = [sys.executable, "-c", PROBE, group.path]
        probed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    limit, usable = map(int, probed.stdout.split())
    assert limit == 512 * MIB
    assert usable <= limit
