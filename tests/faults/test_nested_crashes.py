"""Promise 5, crashes inside recovery and publishing, up to five deep, and any order of all faults together."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pipeline.errors import DataError, OvernightError, SpecError
from pipeline.ledger.files import RunPaths
from tests.faults.crash_states import Killed, Note, Recorder, crash_states, write_state
from tests.faults.small_run import (
    UnsyncedFiles,
    finish,
    identity,
    open_ledger,
    published,
    run_session,
)
from tests.faults.trials import SCALE, Trials, chances

MOST_STEPS = 70  # operations of one session


class Uncut(Recorder):
    """The broken variant: recovery leaves what was never committed."""

    def truncate(self, descriptor: int, size: int) -> None:
        self._step("truncate", self._open[descriptor][1])


def crashed(root: Path, chance: random.Random, layer: Callable[..., Recorder] = Recorder) -> str | None:
    """Up to five sessions, each killed at an operation of its recovery, run or publishing; what is lost after that."""
    root.mkdir()
    output = root / "out.jsonl"
    known: set[int] = set()
    for _ in range(chance.randint(1, 5)):
        # Most operations of a session that has little left to do are those of recovery and publishing.
        recorder = layer(root, kill_at=chance.randrange(MOST_STEPS))
        torn = chance.random() < 0.5
        if torn:
            recorder.fail = _tear(recorder)
        try:
            run_session(output, recorder)
        except Killed:
            pass
        except OvernightError as error:
            return f"not resumed: {error}"
        finally:
            recorder.die()
        notes = [operation.value for operation in recorder.log if isinstance(operation, Note)]
        if notes:
            known |= notes[-1]["done"]
        if output.exists() and output.read_bytes() != published()[0]:
            return "the output is there, and is not whole"
    try:
        before = finish(output, layer(root))
    except OvernightError as error:
        return f"not resumed: {error}"
    if lost := known - before["done"]:
        return f"lost: {lost}"
    return None if output.read_bytes() == published()[0] else "corrupt: another output"


def _tear(recorder: Recorder) -> Callable[[str, Path], None]:
    """Just before the kill comes a write of which half gets through."""

    def fail(operation: str, _path: Path) -> None:
        if operation == "write" and recorder.kill_at is not None and recorder.num_steps >= recorder.kill_at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    return fail


@pytest.mark.parametrize("part", range(2))
def test_up_to_five_crashes_in_a_row(tmp_path: Path, trials: Trials, part: int) -> None:
    for number, chance in enumerate(trials.seeds(5, 20_000, 2)):
        assert crashed(tmp_path / str(number), chance) is None


def test_what_is_not_cut_is_noticed(tmp_path: Path, trials: Trials) -> None:
    found = (crashed(tmp_path / str(number), chance, Uncut) for number, chance in enumerate(chances(300)))
    assert trials.is_caught(5, "no truncation", found, "not resumed", "lost", "corrupt")


class AnyOrder(RuleBasedStateMachine):
    """A run to which everything happens, in any order; what it has acknowledged is there after each step."""

    def __init__(self) -> None:
        super().__init__()
        self._directory = TemporaryDirectory()
        self.root = Path(self._directory.name) / "run"
        self.known: set[int] = set()
        self.is_published = False

    def teardown(self) -> None:
        finish(self.output, UnsyncedFiles())
        assert self.output.read_bytes() == published()[0]
        self._directory.cleanup()

    @property
    def output(self) -> Path:
        return self.root / "out.jsonl"

    @initialize()
    def begin(self) -> None:
        self.root.mkdir()

    def session(self, **options: object) -> Recorder:
        recorder = Recorder(self.root, **options)
        try:
            run_session(self.output, recorder)
        except Killed:
            pass
        except OvernightError as error:
            assert error.exit_code in (73, 74)
        recorder.die()
        self.remember(recorder)
        return recorder

    def remember(self, recorder: Recorder) -> None:
        notes = [operation.value for operation in recorder.log if isinstance(operation, Note)]
        if notes:
            self.known |= notes[-1]["done"]
            self.is_published = self.is_published or notes[-1]["published"]

    @rule(step=st.integers(0, MOST_STEPS))
    def kill(self, step: int) -> None:
        self.session(kill_at=step)

    @rule(step=st.integers(0, MOST_STEPS), chance=st.randoms(use_true_random=False))
    def cut_the_power(self, step: int, chance: random.Random) -> None:
        known, was_published = set(self.known), self.is_published
        recorder = Recorder(self.root, kill_at=step)
        with suppress(Killed):
            run_session(self.output, recorder)
        recorder.die()
        states = list(crash_states(recorder, max(0, len(recorder.log) - 3)))
        if not states:
            return
        _, content, note = chance.choice(states)
        write_state(content, self.root)
        self.known, self.is_published = known, was_published
        if note is not None:
            self.known = known | note["done"]
            self.is_published = was_published or note["published"]

    @rule(step=st.integers(0, MOST_STEPS), count=st.sampled_from([1, 1000]))
    def fill_the_disk(self, step: int, count: int) -> None:
        recorder = Recorder(self.root)

        def fail(_operation: str, _path: Path) -> None:
            if step < recorder.num_steps <= step + count:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        recorder.fail = fail
        try:
            run_session(self.output, recorder)
        except OvernightError as error:
            assert error.exit_code in (73, 74)
        recorder.die()
        self.remember(recorder)

    @rule(step=st.integers(0, MOST_STEPS))
    def edit_the_input(self, step: int) -> None:
        self.refuse(DataError, identity=identity(4))

    @rule()
    def edit_the_job(self) -> None:
        self.refuse(SpecError, identity=identity(another="value"))

    @rule()
    def run_undisturbed(self) -> None:
        self.session()

    def refuse(self, kind: type[OvernightError], **options: object) -> None:
        if not RunPaths(self.output).journal.exists():
            return
        before = self.files()
        with pytest.raises(kind):
            open_ledger(self.output, UnsyncedFiles(), **options)
        assert self.files() == before

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.root.iterdir() if path.suffix != ".lock"}

    @invariant()
    def nothing_is_lost(self) -> None:
        if not self.known:
            return
        if self.is_published:
            assert self.output.read_bytes() == published()[0]
        ledger = open_ledger(self.output, UnsyncedFiles())
        try:
            assert all(ledger.is_done(number, 0) for number in self.known)
        finally:
            ledger.close("stopped")


def test_anything_in_any_order(trials: Trials) -> None:
    trials.num_trials = trials.begin(5, 1000)
    machine = settings(max_examples=trials.num_trials, stateful_step_count=12, database=None)
    AnyOrder.TestCase.settings = machine if SCALE < 1 else settings(machine, stateful_step_count=20)
    AnyOrder.TestCase("runTest").runTest()
