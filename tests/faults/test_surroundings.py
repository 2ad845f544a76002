"""Promises 24 and 25: hostile surroundings change no answer, and neither secrets nor prompts get into what is said."""

from __future__ import annotations

import os
import random
import resource
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import pipeline.engines.echo as echo_module
from tests.command import COMMAND, REPOSITORY, write_job
from tests.faults.compare import answers_of, problem_with, undisturbed
from tests.faults.processes import Preparation, Run, duration, make_job, run_to_end
from tests.faults.trials import Trials

# Promise 24

SURROUNDINGS: dict[str, dict[str, str | None]] = {
    "C": {"LANG": "C", "LC_ALL": "C"},
    "no UTF-8 mode": {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "latin": {"PYTHONIOENCODING": "latin-1"},
    "far away": {"TZ": "Pacific/Kiritimati"},
    "no such zone": {"TZ": "Nowhere/Atall"},
    "hash 1": {"PYTHONHASHSEED": "1"},
    "hash 2": {"PYTHONHASHSEED": "2"},
    "optimized": {"PYTHONOPTIMIZE": "2"},
    "homeless": {"HOME": None, "USER": None},
    "home is a file": {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null"},
    "no PATH": {"PATH": None},
    "dumb": {"TERM": None, "COLUMNS": "1"},
}


def surrounded(directory: Path, changes: dict[str, str | None], *, descriptors: int | None = None) -> str | None:
    job = make_job(directory, delay="0ms")
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **changes}
    env = {name: value for name, value in env.items() if value is not None}
    few = descriptors and partial(resource.setrlimit, resource.RLIMIT_NOFILE, (descriptors, descriptors))
    run = subprocess.run(
        [*COMMAND, "run", str(job)], cwd="/proc", env=env, preexec_fn=few, capture_output=True, check=False
    )
    job.with_name("witness").touch()
    return problem_with(job, run.returncode, run.stderr.decode(errors="replace"))


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_hostile_surroundings_change_nothing(tmp_path: Path, trials: Trials, name: str) -> None:
    trials.tried_all(24, 1)
    assert surrounded(tmp_path / "run", SURROUNDINGS[name]) is None


def test_sixty_four_descriptors_are_enough(tmp_path: Path, trials: Trials) -> None:
    trials.tried_all(24, 1)
    assert surrounded(tmp_path / "run", {}, descriptors=64) is None


def jumping_clock(seed: int) -> None:
    """The time of day leaps forwards and back by years."""
    chance = random.Random(seed)
    for module in (echo_module, __import__("pipeline.ledger.ledger", fromlist=["time"])):
        module.time = _Clock(chance)


class _Clock:
    def __init__(self, chance: random.Random) -> None:
        self.time = lambda: chance.uniform(0, 4e9)

    def __getattr__(self, name: str) -> object:
        import time

        return getattr(time, name)


def clock_in_the_answer() -> None:
    """The broken variant: what is random is seeded by the time."""

    class Random:
        Random = staticmethod(lambda _seed: random.Random(os.urandom(8)))

    echo_module.random = Random


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, trials: Trials) -> None:
    def run(number: int, *prepare: Preparation) -> str | None:
        job = make_job(tmp_path / f"{number}{len(prepare)}", delay="0ms")
        Run(job, prepare=[partial(jumping_clock, number), *prepare]).kill_after(0.7 * duration("0ms"))
        last = run_to_end(job, prepare=[partial(jumping_clock, number), *prepare])
        return problem_with(job, last.process.exitcode, last.talk)

    assert undisturbed()
    for number, _ in enumerate(trials.seeds(24, 200)):
        assert run(number) is None
    assert trials.is_caught(24, "seeded by the time", (run(n, clock_in_the_answer) for n in range(4)), "corrupt")


# Promise 25

SECRET, PROMPT = "canary-5f1d-secret", "canary-77ac-prompt"


def with_secrets() -> None:
    os.environ.update({"HF_TOKEN": SECRET, "AWS_SECRET_ACCESS_KEY": SECRET})


def leak() -> None:
    """The broken variant: a diagnosis that shows everything."""
    os.write(2, f"{dict(os.environ)} {[*Path().glob('*')]} {PROMPT}".encode())


def leaks(directory: Path, chance: random.Random, *prepare: Preparation) -> str | None:
    """Where a secret of the environment, or in talk and journal a prompt, can be read after runs that ended badly."""
    lines: list[Any] = [{"prompt": f"{PROMPT} {number}"} for number in range(10)]
    lines += [f'{{"prompt": "{PROMPT}", }}'.encode(), {"prompt": [PROMPT]}, {"text": PROMPT}, b"\xff" + PROMPT.encode()]
    directory.mkdir()
    job = write_job(directory, lines, model={"echo": {"fail_every": 3, "delay": "2ms"}})
    talks: list[str] = []
    for seconds in (chance.uniform(0, 0.1), 60.0):
        run = Run(job, prepare=[with_secrets, *prepare])
        run.kill_after(seconds)
        talks.append(run.talk)
    assert answers_of(directory / "out.jsonl")
    for number, talk in enumerate(talks):
        if SECRET in talk or PROMPT in talk:
            return f"leaked: in what session {number} says"
    for path in directory.glob("out.jsonl*"):
        data = path.read_bytes()
        if SECRET.encode() in data:
            return f"leaked: the secret, in {path.name}"
        if path.suffix in (".journal", ".lock", ".json") and PROMPT.encode() in data:
            return f"leaked: a prompt, in {path.name}"
    return None


def test_no_secret_and_no_prompt_is_written_where_it_does_not_belong(tmp_path: Path, trials: Trials) -> None:
    for number, chance in enumerate(trials.seeds(25, 100)):
        assert leaks(tmp_path / str(number), chance) is None
    assert trials.is_caught(
        25, "tells all", (leaks(tmp_path / f"c{n}", random.Random(n), leak) for n in range(3)), "leaked"
    )
