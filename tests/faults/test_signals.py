"""Promise 22, signals: whichever comes at whatever moment, what is finished is committed and the run leaves with 75."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import pipeline.stop as stop_module
from tests.command import REPOSITORY, wait_until
from tests.faults.compare import problem_with
from tests.faults.processes import NUM_ANSWERS, Preparation, Run, make_job, num_generated, run_to_end
from tests.faults.trials import Trials, chances

SIGNALS = ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGXCPU"]
PARTS = 2


def no_handlers() -> None:
    """The broken variant: signals do what they do by default."""
    stop_module.SIGNALS = ()


def deaf() -> None:
    """The broken variant: signals are ignored."""
    for name in SIGNALS:
        signal.signal(signal.Signals[name], signal.SIG_IGN)


def signalled(directory: Path, chance: random.Random, *prepare: Preparation) -> str | None:
    """One signal at a random moment after the run has begun, then to the end."""
    job = make_job(directory, delay="2ms")
    run = Run(job, prepare=prepare)
    wait_until(lambda: run.witness.exists() and "begin" in run.witness.read_text())
    run.wait(chance.uniform(0, 0.15))
    name = chance.choice(SIGNALS)
    if run.wait(0) is None:
        os.kill(run.process.pid, signal.Signals[name])
    # Looked at after the signal: what is admitted may still be answered, and that is what a tenth of a second brings
    # beside what is in flight; here up to 28 answers have been seen.
    is_early = num_generated(run.witness) < NUM_ANSWERS // 2
    seconds = run.seconds_to_end()
    code = run.end()
    if code not in (3, 75):
        return f"died: exit code {code} by {name}"
    if is_early and code != 75:
        return f"unheeded: {name}"
    if seconds > 2:
        return f"late: {seconds:.1f} s after {name}"
    last = run_to_end(job, prepare=prepare)
    if num_generated(run.witness) != NUM_ANSWERS:
        return f"wasted: {num_generated(run.witness) - NUM_ANSWERS} finished answers were generated again"
    return problem_with(job, last.process.exitcode, last.talk)


@pytest.mark.parametrize("part", range(PARTS))
def test_signals_at_random_moments(tmp_path: Path, trials: Trials, part: int) -> None:
    for number, chance in enumerate(trials.seeds(22, 500, PARTS)):
        assert signalled(tmp_path / str(number), chance) is None


def test_the_default_of_a_signal_is_death(tmp_path: Path, trials: Trials) -> None:
    found = (signalled(tmp_path / str(number), chance, no_handlers) for number, chance in enumerate(chances(30)))
    assert trials.is_caught(22, "no handlers", found, "died")


def test_a_signal_that_is_ignored_is_caught(tmp_path: Path, trials: Trials) -> None:
    found = (signalled(tmp_path / str(number), chance, deaf) for number, chance in enumerate(chances(30)))
    assert trials.is_caught(22, "deaf", found, "unheeded")


def test_a_second_signal_ends_at_once(tmp_path: Path, trials: Trials) -> None:
    for number, chance in enumerate(trials.seeds(22, 100)):
        job = make_job(tmp_path / str(number), delay="5s")
        run = Run(job)
        wait_until(lambda run=run: run.witness.exists() and "begin" in run.witness.read_text())
        # Two different ones: of the same kind the kernel may deliver one for both.
        for name in chance.sample(SIGNALS, 2):
            os.kill(run.process.pid, signal.Signals[name])
        assert run.seconds_to_end() < 2
        assert run.end() == 75


def test_a_suite_in_the_background_has_programs_that_heed_signals() -> None:
    """With nohup or from a script SIGHUP and SIGINT are ignored, and what is ignored stays so in a started program."""
    told = "import signal; print([signal.getsignal(number) != signal.SIG_IGN for number in (1, 2)])"
    suite = f"""
import signal, subprocess, sys
for number in (signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
import tests.conftest
subprocess.run([sys.executable, "-c", {told!r}])
"""
    done = subprocess.run([sys.executable, "-c", suite], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout == "[True, True]\n", done.stderr
