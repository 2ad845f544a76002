"""Promises 3 and 5: what was half written is cut off, at once or by recovery, and no cut could be left out."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from pipeline.errors import OvernightError
from pipeline.ledger.files import Patience, RunPaths
from tests.faults.crash_states import Killed, Recorder
from tests.faults.small_run import finish, published, run_session
from tests.faults.trials import Trials

Outcome = tuple[str | None, list[bytes | None], frozenset[int], str | None]

FAULTS = ("ENOSPC", "EIO", "torn by a kill")


def outcome(root: Path, moment: int, fault: str, left_out: str | None = None) -> tuple[Outcome, set[str]]:
    """How a session ends whose operation number `moment` fails once, what it leaves visible, what it has saved, and
    what is wrong with the end of the run; and the functions that have truncated."""
    root.mkdir()
    output = root / "out.jsonl"
    recorder = Recorder(root, leave_uncut=lambda site: _function(site) == left_out)

    def fail(operation: str, _path: Path) -> None:
        if recorder.num_steps == moment + 1:
            if fault != "torn by a kill":
                raise OSError(getattr(errno, fault), os.strerror(getattr(errno, fault)))
            if operation == "write":
                recorder.kill_at = recorder.num_steps  # whatever comes next does not
                raise OSError(errno.EIO, "half of it got through")

    recorder.fail = fail
    ended = None
    try:
        run_session(output, recorder, patience=Patience(10.0, lambda _seconds: None))
    except (OvernightError, Killed) as error:
        ended = type(error).__name__
    recorder.die()
    names = (output, RunPaths(output).summary)
    visible = [path.read_bytes() if path.exists() else None for path in names]
    later = Recorder(root, leave_uncut=lambda site: _function(site) == left_out)
    saved: frozenset[int] = frozenset()
    problem = None
    try:
        saved = frozenset(finish(output, later)["done"])
        if tuple(path.read_bytes() for path in names) != published():
            problem = "another output or summary"
    except OvernightError as error:
        problem = f"not resumed: {error}"
    with suppress(OSError):  # a ledger that refused has closed what it opened
        later.die()
    return (ended, visible, saved, problem), _functions(recorder.cuts | later.cuts)


def _functions(sites: set[str]) -> set[str]:
    return set(map(_function, sites))


def _function(site: str) -> str:
    """The innermost: whoever called it, it is the same truncate."""
    return site.rpartition(" > ")[2]


def test_every_cut_is_needed_and_its_absence_is_noticed(tmp_path: Path, trials: Trials) -> None:
    (tmp_path / "count").mkdir()
    count = Recorder(tmp_path / "count")
    run_session(tmp_path / "count" / "out.jsonl", count)
    count.die()
    cases = [(moment, fault) for moment in range(count.num_steps) for fault in FAULTS]
    found = {case: outcome(tmp_path / f"{case}", *case, None) for case in cases}
    for case, ((*_, problem), _) in found.items():
        assert problem is None, (case, problem)
    sites = sorted(set().union(*(cuts for _, cuts in found.values())))
    assert len(sites) >= 5
    for number, site in enumerate(sites):
        concerned = [case for case in cases if site in found[case][1]]
        assert any(outcome(tmp_path / f"{number}{case}", *case, site)[0] != found[case][0] for case in concerned), (
            f"nothing changes without the truncate of {site}"
        )
    trials.tried_all(5, len(cases))
    trials.caught_all(5, "each truncate in turn", len(sites))
