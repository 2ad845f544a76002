"""The power cut at every operation: what was acknowledged is there, the run goes on, and no sync could be left out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from pipeline.errors import OvernightError
from tests.faults.crash_states import Killed, Recorder, crash_states, write_state
from tests.faults.small_run import UnsyncedFiles, finish, identity, published, run_session

X = "runs/out.jsonl"

LeaveOut = Callable[[str], bool]


Notes = dict[str, object]  # what was acknowledged, as `small_run.known` tells it


def wrong(content: dict[str, bytes], note: Notes | None, root: Path, earlier: int = 0) -> Iterator[str]:
    """What a crash that leaves `content` has spoilt of what was acknowledged by `note`.

    `earlier` is how many items the input had when the run was published before.
    """
    note = note or {}
    rights = [published(), published(earlier)] if earlier else [published()]
    visible = content.get(X), content.get(X + ".summary.json")
    if visible[1] is not None and visible not in rights:
        yield "the summary is there, and the run is not done"
    if visible[0] is not None and visible[0] not in [output for output, _ in rights]:
        yield "the output is there, and it is not complete"
    if note.get("published") and visible != published():
        yield "the published output is gone"
    write_state(content, root)
    options = {"resume": "always", "identity": identity(before=earlier)} if earlier else {}
    try:
        found = finish(root / X, UnsyncedFiles(), **options)
    except OvernightError as error:
        yield f"cannot be resumed: {error}"
        return
    if lost := note.get("done", set()) - found["done"]:
        yield f"answers {lost} are lost"
    unfinished = {number: ids for number, ids in note.get("unfinished", {}).items() if number not in found["done"]}
    if not unfinished.items() <= found["unfinished"].items():
        yield "unfinished answers are lost"
    if note.get("ended") == "stopped" and "stopped" not in found["sessions"]:
        yield "it is forgotten that the session ended in good order"
    if (root / X).read_bytes() != published()[0]:
        yield "the resumed run gives another output"


def wrong_of_fresh(content: dict[str, bytes], note: Notes | None, root: Path) -> Iterator[str]:
    """The same for a run that began by moving an earlier one, of 3 items of another job, aside."""
    journals = [data for name, data in content.items() if ".journal" in name and b'"name":"another"' in data]
    if not set(published(3)) <= set(content.values()) or len(journals) != 1:
        yield "a file of the earlier run is gone"
    if note is not None:
        yield from wrong(content, note, root)
    else:  # whatever was moved by then, the same command goes on
        write_state(content, root)
        finish(root / X, UnsyncedFiles(), fresh=True)


Scenario = Callable[[Path, LeaveOut | None], tuple[Recorder, int]]  # the recording, and from where to cut the power


def undisturbed(root: Path, leave_out: LeaveOut | None = None) -> tuple[Recorder, int]:
    recorder = Recorder(root, leave_out=leave_out)
    run_session(root / X, recorder)
    recorder.die()
    return recorder, 0


def stopped(root: Path, leave_out: LeaveOut | None = None) -> tuple[Recorder, int]:
    recorder = Recorder(root, leave_out=leave_out)
    run_session(root / X, recorder, stop_after=1)
    start = len(recorder.log)
    run_session(root / X, recorder)
    recorder.die()
    return recorder, start - 2  # the last moment of the first session too


def killed(kill_at: int) -> Scenario:
    """The first process is killed at an operation, its writes unharmed in the kernel's memory; a second one goes on."""

    def run(root: Path, leave_out: LeaveOut | None = None) -> tuple[Recorder, int]:
        recorder = Recorder(root, leave_out=leave_out, kill_at=kill_at)
        with pytest.raises(Killed):
            run_session(root / X, recorder)
        recorder.die()
        start = len(recorder.log)
        run_session(root / X, recorder)
        recorder.die()
        return recorder, start

    return run


def cut_before(content: dict[str, bytes]) -> Scenario:
    """A first power loss has left `content`."""

    def run(root: Path, leave_out: LeaveOut | None = None) -> tuple[Recorder, int]:
        write_state(content, root)
        recorder = Recorder(root, leave_out=leave_out)
        run_session(root / X, recorder)
        recorder.die()
        return recorder, 0

    return run


def fresh(root: Path, leave_out: LeaveOut | None = None) -> tuple[Recorder, int]:
    """A finished run of another job is moved aside."""
    write_state({"runs/": b""}, root)
    finish(root / X, UnsyncedFiles(), identity=identity(3, name="another"))
    recorder = Recorder(root, leave_out=leave_out)
    run_session(root / X, recorder, fresh=True)
    recorder.die()
    return recorder, 0


def grown(root: Path, leave_out: LeaveOut | None = None) -> tuple[Recorder, int]:
    """A finished run goes on with an input that has more lines."""
    write_state({"runs/": b""}, root)
    finish(root / X, UnsyncedFiles(), identity=identity(3))
    recorder = Recorder(root, leave_out=leave_out)
    run_session(root / X, recorder, resume="always", identity=identity(before=3))
    recorder.die()
    return recorder, 0


def retried(root: Path, leave_out: LeaveOut | None = None) -> tuple[Recorder, int]:
    """A finished run is taken up for its failed answer, which fails again."""
    write_state({"runs/": b""}, root)
    finish(root / X, UnsyncedFiles())
    recorder = Recorder(root, leave_out=leave_out)
    run_session(root / X, recorder, retry=True)
    recorder.die()
    return recorder, 0


JUDGES: dict[Scenario, Callable[[dict[str, bytes], Notes | None, Path], Iterator[str]]] = {
    fresh: wrong_of_fresh,
    grown: partial(wrong, earlier=3),
}


def problems(scenario: Scenario, root: Path, leave_out: LeaveOut | None = None) -> Iterator[str | None]:
    """For every crash state of the scenario what is wrong with it, None where nothing is."""
    recorded = root / "recorded"
    write_state({}, recorded)
    recorder, start = scenario(recorded, leave_out)
    judge = JUDGES.get(scenario, wrong)
    for number, content, note in crash_states(recorder, start):
        problem = next(judge(content, note, root / "crashed"), None)
        yield f"{problem}, after operation {number}: {recorder.log[number]}" if problem else None


def assert_sound(scenario: Scenario, root: Path) -> int:
    """Nothing is wrong in any crash state; how many there were."""
    found = list(problems(scenario, root))
    assert not any(found), next(filter(None, found))
    return len(found)


def num_steps(root: Path) -> int:
    """Operations of an undisturbed run."""
    root.mkdir()
    return undisturbed(root)[0].num_steps


def test_power_loss_anywhere_in_a_run(tmp_path, trials):
    trials.tried_all(2, assert_sound(undisturbed, tmp_path))
    assert trials.num_trials > 80


@pytest.mark.parametrize("scenario", [stopped, fresh, grown, retried])
def test_power_loss_anywhere_in_a_later_session(tmp_path, trials, scenario):
    trials.tried_all(2, assert_sound(scenario, tmp_path))
    assert trials.num_trials > 50


@pytest.mark.parametrize("part", range(2))
def test_power_loss_anywhere_after_a_kill(tmp_path, part):
    moments = random.Random(part).sample(range(num_steps(tmp_path / "count")), 3)
    assert sum(assert_sound(killed(moment), tmp_path) for moment in moments) > 30


@pytest.mark.slow
def test_power_loss_anywhere_after_a_kill_anywhere(tmp_path, trials):
    moments = range(num_steps(tmp_path / "count"))
    trials.tried_all(2, sum(assert_sound(killed(moment), tmp_path) for moment in moments))


def all_crashes(root: Path) -> list[dict[str, bytes]]:
    root.mkdir()
    return [content for _, content, _ in crash_states(undisturbed(root)[0])]


def test_power_loss_anywhere_after_a_power_loss(tmp_path):
    for content in random.Random(0).sample(all_crashes(tmp_path / "first"), 3):
        assert_sound(cut_before(content), tmp_path)


@pytest.mark.slow
def test_power_loss_anywhere_after_a_power_loss_anywhere(tmp_path, trials):
    crashes = all_crashes(tmp_path / "first")
    trials.tried_all(2, sum(assert_sound(cut_before(content), tmp_path) for content in crashes))


def sites_of(scenario: Scenario, root: Path) -> set[str]:
    """The syncs that happen in the scenario."""
    write_state({}, root)
    return scenario(root)[0].sites


def test_every_sync_is_needed_and_its_absence_is_noticed(tmp_path, trials):
    count = num_steps(tmp_path / "count")
    # A third of the way through there are lines in the journal that nobody has synced.
    scenarios = [undisturbed, stopped, *map(killed, range(count // 3, count // 2)), fresh, grown, retried]
    sites = {scenario: sites_of(scenario, tmp_path / "sites") for scenario in scenarios}
    every_site = set().union(*sites.values())
    assert len(every_site) > 12
    for site in sorted(every_site):
        concerned = [scenario for scenario in scenarios if site in sites[scenario]]
        noticed = any(any(problems(scenario, tmp_path, site.__eq__)) for scenario in concerned)
        assert noticed, f"nothing is lost without the sync of {site}"
    trials.caught_all(2, "each sync in turn", len(every_site))
