"""Promise 23, exit codes: each class of failure ends the process with its own, and says what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

import pipeline.errors
from tests.command import write_job
from tests.faults.processes import Preparation, Run, make_job, run_to_end
from tests.faults.test_io_errors import FOR_EVER, refuse, short_patience
from tests.faults.test_poison_items import poison
from tests.faults.trials import Trials

Ended = tuple[int | None, str]


def ended(job: Path, *words: str, prepare: Sequence[Preparation] = ()) -> Ended:
    run = run_to_end(job, *words, prepare=prepare)
    return run.process.exitcode, run.talk


def all_answered(directory: Path, *prepare: Preparation) -> Ended:
    return ended(write_job(directory, [{"prompt": "fine"}]), prepare=prepare)


def some_failed(directory: Path, *prepare: Preparation) -> Ended:
    return ended(write_job(directory, [{"prompt": "fine"}, b"{broken"]), prepare=prepare)


def wrong_usage(directory: Path, *prepare: Preparation) -> Ended:
    return ended(make_job(directory), "--limit", "none", prepare=prepare)


def changed_input(directory: Path, *prepare: Preparation) -> Ended:
    job = write_job(directory, [{"prompt": "fine"}])
    run_to_end(job)
    job.with_name("in.jsonl").write_bytes(b'{"prompt": "changed"}\n')
    return ended(job, prepare=prepare)


def damaged_file(directory: Path, *prepare: Preparation) -> Ended:
    job = write_job(directory, [{"prompt": "fine"}], model={"echo": {"fail_every": 1}})
    run_to_end(job)
    job.with_name("out.jsonl").unlink()
    journal = job.with_name("out.jsonl.journal")
    journal.write_bytes(journal.read_bytes().replace(b"header", b"reader"))
    return ended(job, prepare=prepare)


def no_input(directory: Path, *prepare: Preparation) -> Ended:
    job = make_job(directory)
    job.with_name("in.jsonl").unlink()
    return ended(job, prepare=prepare)


def too_little_memory(directory: Path, *prepare: Preparation) -> Ended:
    model = {"engine": "transformers", "path": "builtin:tiny-qwen3-next", "cpu_memory": "1 MiB"}
    return ended(write_job(directory, [{"prompt": "fine"}], model=model), prepare=prepare)


def fault_of_ours(directory: Path, *prepare: Preparation) -> Ended:
    return ended(make_job(directory), prepare=[partial(poison, "exception", frozenset([3])), *prepare])


def strangers_output(directory: Path, *prepare: Preparation) -> Ended:
    job = make_job(directory)
    job.with_name("out.jsonl").write_text("precious")
    return ended(job, prepare=prepare)


def refused_write(directory: Path, *prepare: Preparation) -> Ended:
    job = make_job(directory)
    refusal = partial(refuse, "write", "EIO", 5, FOR_EVER, job.with_name("out.jsonl"))
    return ended(job, prepare=[short_patience, refusal, *prepare])


def stopped(directory: Path, *prepare: Preparation) -> Ended:
    return ended(make_job(directory, delay="1s"), "--time-limit", "200ms", prepare=prepare)


def busy(directory: Path, *prepare: Preparation) -> Ended:
    job = make_job(directory, delay="10s")
    holder = Run(job)
    while "begin" not in (holder.witness.read_text() if holder.witness.exists() else ""):
        assert holder.wait(0.01) is None, holder.talk
    other = Run(job, witness=job.with_name("other"), prepare=prepare)
    code = other.end()
    holder.kill_after(0)
    return code, other.talk


def wrong_job(directory: Path, *prepare: Preparation) -> Ended:
    return ended(make_job(directory), "--set", "generation.temperature=-1", prepare=prepare)


def changed_job(directory: Path, *prepare: Preparation) -> Ended:
    job = write_job(directory, [{"prompt": "fine"}])
    run_to_end(job)
    return ended(job, "--set", "generation.seed=5", prepare=prepare)


# The code, and words of what the user reads.
CASES: dict[Callable[..., Ended], tuple[int, str]] = {
    all_answered: (0, "1 answers"),
    some_failed: (3, "1 failed"),
    wrong_usage: (64, "--limit"),
    changed_input: (65, "in.jsonl"),
    damaged_file: (65, "out.jsonl.journal"),
    no_input: (66, "in.jsonl"),
    too_little_memory: (69, "memory"),
    fault_of_ours: (70, "the device is gone"),
    strangers_output: (73, "out.jsonl"),
    refused_write: (74, "Nothing that was acknowledged is lost"),
    stopped: (75, "run the same command again"),
    busy: (75, "process"),
    wrong_job: (78, "generation.temperature"),
    changed_job: (78, "generation.seed"),
}


def one_for_all() -> None:
    """The broken variant: whatever goes wrong is 1, as Python has it."""
    for kind in vars(pipeline.errors).values():
        if isinstance(kind, type) and issubclass(kind, pipeline.errors.OvernightError):
            kind.exit_code = 1


def misjudged(case: Callable[..., Ended], directory: Path, *prepare: Preparation) -> str | None:
    directory.mkdir()
    code, words = CASES[case]
    found, talk = case(directory, *prepare)
    if found != code:
        return f"another code: {found} instead of {code}: {talk}"
    if words not in talk:
        return f"unexplained: {talk}"
    return "a traceback" if "Traceback" in talk and code != 70 else None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_each_failure_has_its_code_and_says_what_is_wrong(
    tmp_path: Path, trials: Trials, case: Callable[..., Ended]
) -> None:
    trials.tried_all(23, 1)
    assert misjudged(case, tmp_path / "run") is None


def test_one_code_for_all_is_caught(tmp_path: Path, trials: Trials) -> None:
    found = (misjudged(case, tmp_path / case.__name__, one_for_all) for case in (changed_input, no_input, wrong_job))
    assert trials.is_caught(23, "1 for all", found, "another code")
