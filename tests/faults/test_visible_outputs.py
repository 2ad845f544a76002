"""Promise 6, only complete outputs are visible: the output is whole whenever it is there, and a stranger's stays."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

import pipeline.ledger.ledger as ledger_module
from pipeline.ledger.files import RunPaths
from tests.command import is_generating, wait_until
from tests.faults.compare import incomplete, problem_with
from tests.faults.processes import Preparation, Run, make_job, run_to_end, slow_disk, slow_duration
from tests.faults.trials import FIRST_SEED, Trials, chances

PARTS = 4
KILLS = 3  # of each run
STRANGER = b"precious\n"


def write_in_place() -> None:
    """The broken variant: the output is written where it will stand, bit by bit."""

    def place_output(files, paths: RunPaths, _ours) -> None:
        descriptor = files.open(paths.output, os.O_WRONLY | os.O_CREAT)
        data = paths.unpublished.read_bytes()
        for start in range(0, len(data), 100):
            files.write(descriptor, data[start : start + 100])
            time.sleep(0.02)  # a watcher on a busy machine looks rarely
        files.close(descriptor)

    ledger_module.place_output = place_output


def rename_over() -> None:
    """The broken variant: a rename, which replaces whatever has the name."""
    ledger_module.place_output = lambda files, paths, _ours: files.rename(paths.unpublished, paths.output)


def watched(directory: Path, chance: random.Random, *prepare: Preparation) -> str | None:
    """Kill runs that have only to be published, and look at the output all the while; what was seen that is wrong."""
    job = make_job(directory, delay="0ms")
    output = job.with_name("out.jsonl")
    for _ in range(KILLS):
        run = Run(job, prepare=[slow_disk, *prepare])
        until = time.monotonic() + chance.uniform(
            0, 3 * slow_duration()
        )  # on a busy machine the next run may take longer
        while time.monotonic() < until:
            if output.exists() and (problem := incomplete(output)):
                run.kill_after(0)
                return problem
            time.sleep(0.002)
        run.kill_after(0)
    last = run_to_end(job, prepare=prepare)
    return problem_with(job, last.process.exitcode, last.talk)


@pytest.mark.parametrize("part", range(PARTS))
def test_an_output_that_is_there_is_whole(tmp_path: Path, trials: Trials, part: int) -> None:
    wanted = trials.begin(6, 1000, PARTS)
    for number in range(-(-wanted // KILLS)):
        seed = FIRST_SEED + 1_000_000 * part + number
        assert watched(tmp_path / str(number), random.Random(seed)) is None, seed
        trials.num_trials += KILLS


def test_an_output_written_in_place_is_seen_half_done(tmp_path: Path, trials: Trials) -> None:
    found = (watched(tmp_path / str(number), chance, write_in_place) for number, chance in enumerate(chances(200)))
    assert trials.is_caught(6, "write in place", found, "the output is there, and is not what it says")


def invaded(directory: Path, chance: random.Random, *prepare: Preparation, at_work: bool = False) -> str | None:
    """A stranger's file comes at a random moment into the output's place; what became of it.

    `at_work`: as soon as answers are committed, when it is too late for a look at the start and early enough for all.
    """
    job = make_job(directory, delay="0ms")
    output, theirs = job.with_name("out.jsonl"), job.with_name("theirs")
    theirs.write_bytes(STRANGER)
    run = Run(job, prepare=[slow_disk, *prepare])
    if at_work:
        wait_until(lambda: is_generating(directory), seconds=300)
    else:
        run.wait(chance.uniform(0, slow_duration()))
    try:
        output.hardlink_to(theirs)
    except FileExistsError:  # the run was quicker, and the file is its own
        return None if run.end() == 3 else f"refused: {run.talk}"
    code = run.end()
    if output.read_bytes() != STRANGER:
        return "overwritten: the stranger's file is gone"
    if code != 73:
        return f"accepted: exit code {code} beside a stranger's file"
    output.unlink()
    last = run_to_end(job, prepare=prepare)
    return problem_with(job, last.process.exitcode, last.talk)


def test_a_strangers_file_stays(tmp_path: Path, trials: Trials) -> None:
    for number, chance in enumerate(trials.seeds(6, 400)):
        assert invaded(tmp_path / str(number), chance) is None


def test_a_rename_would_overwrite_it(tmp_path: Path, trials: Trials) -> None:
    tries = enumerate(chances(200))
    found = (invaded(tmp_path / str(number), chance, rename_over, at_work=True) for number, chance in tries)
    assert trials.is_caught(6, "rename over", found, "overwritten")
