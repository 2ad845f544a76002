"""Promises 10 and 11: a changed input is refused, and so is a changed key by its name, unless it is free to change."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

import pipeline.ledger.recovery as recovery_module
from pipeline.spec.fingerprint import KEY_CLASSES
from tests.command import write_job
from tests.faults.compare import problem_with
from tests.faults.processes import Preparation, Run, duration, make_job, run_to_end
from tests.faults.test_again import snapshot
from tests.faults.trials import Trials, chances

# Promise 10


def stopped_halfway(directory: Path) -> Path:
    """A run that was killed after some of its answers, with a first input line of its own."""
    job = make_job(directory)
    Run(job).kill_after(0.7 * duration())
    if not job.with_name("out.jsonl.journal").exists():  # it was killed before it began
        run_to_end(job)
    return job


def by_size(_header: Any, identity: Any, **_: Any) -> None:
    """What a program without a digest compares."""
    before = sum(size for _, size, _ in [(f.path, f.size, f.mtime_ns) for f in _header.input.files])
    if before != sum(file.size for file in identity.files):
        raise recovery_module.DataError("the size of the input has changed")


def compare_sizes() -> None:
    """The broken variant."""
    recovery_module.check_input = by_size


def with_changed_input(directory: Path, chance: random.Random, *prepare: Preparation) -> str | None:
    job = stopped_halfway(directory)
    path = job.with_name("in.jsonl")
    data = bytearray(path.read_bytes())
    place = chance.randrange(len(data))
    match chance.randrange(4):
        case 0:
            data[place] ^= 1 << chance.randrange(8)
        case 1:
            del data[place : place + chance.randrange(1, 50)]
        case 2:
            data[place:place] = b"x" * chance.randrange(1, 50)
        case _:
            data += b'{"prompt": "one more"}\n'
    path.write_bytes(data)
    before = snapshot(directory)
    run = run_to_end(job, prepare=prepare)
    if run.process.exitcode != 65:
        return f"accepted: exit code {run.process.exitcode}"
    return None if snapshot(directory) == before else "written to: something was changed"


def test_a_changed_input_is_refused(tmp_path: Path, trials: Trials) -> None:
    for number, chance in enumerate(trials.seeds(10, 300)):
        assert with_changed_input(tmp_path / str(number), chance) is None


def test_a_comparison_of_sizes_is_not_enough(tmp_path: Path, trials: Trials) -> None:
    found = (
        with_changed_input(tmp_path / str(number), chance, compare_sizes) for number, chance in enumerate(chances(60))
    )
    assert trials.is_caught(10, "sizes only", found, "accepted")


def test_recompressed_input_is_accepted(tmp_path: Path, trials: Trials) -> None:
    lines = b"".join(b'{"prompt": "line %d"}\n' % number for number in range(40))
    job = write_job(tmp_path, [], input={"path": str(tmp_path / "in.jsonl.gz")}, model={"echo": {"delay": "20ms"}})
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(lines, 1))
    Run(job).kill_after(0.4)
    for level in range(2, 10):
        path.write_bytes(gzip.compress(lines, level))
        Run(job).kill_after(0.05)
    assert run_to_end(job).process.exitcode == 0
    trials.tried_all(10, 8)


# Promise 11

# For each key another value than that of the job; keys whose features come later, and such as need a model, are left
# to tests/test_fingerprint.py, which knows all of them.
OTHER_VALUES = {
    "name": "another",
    "model.load_strategy": "no-gpu",
    "model.cpu_memory": "20 GiB",
    "model.echo.delay": "0ms",
    "model.echo.fail_every": 5,
    "model.echo.crash_at": 1000,
    "model.echo.oom_at": 1000,
    "model.echo.hang_at": 1000,
    "input.format": "prompt",
    "input.prompt_field": "text",
    "input.messages_field": "turns",
    "input.id_field": "key",
    "input.template": "{prompt}!",
    "input.system": "Be brief",
    "input.over_length": "truncate-end",
    "input.max_line": "1 MiB",
    "input.max_bytes": "1 GiB",
    "input.allow_control_tokens": True,
    "generation.max_new_tokens": 7,
    "generation.temperature": 0.5,
    "generation.top_p": 0.5,
    "generation.top_k": 5,
    "generation.min_p": 0.5,
    "generation.repetition_penalty": 1.5,
    "generation.stop": ["w3"],
    "generation.seed": 7,
    "generation.ignore_eos": True,
    "generation.num_samples": 3,
    "batch.slots": 3,
    "batch.cache_tokens": 100_000,
    "output.local_directory": "elsewhere",
    "output.format": "openai-batch",
    "output.keep_fields": "none",
    "output.summary_line": False,
    "run.time_limit": "1h",
    "run.resume": "always",
}


def forget_the_job() -> None:
    """The broken variant: whatever the job says now is gone on with."""
    recovery_module.check_job = lambda *_: None


def with_changed_key(directory: Path, key: str, *prepare: Preparation) -> str | None:
    job = stopped_halfway(directory)
    before = snapshot(directory)
    run = run_to_end(job, "--set", f"{key}={json.dumps(OTHER_VALUES[key])}", prepare=prepare)
    if KEY_CLASSES[key] == "operational":
        return problem_with(job, run.process.exitcode, run.talk)
    if run.process.exitcode != 78 or key not in run.talk:
        return f"accepted: {key}, exit code {run.process.exitcode}: {run.talk}"
    return None if snapshot(directory) == before else "written to: something was changed"


@pytest.mark.parametrize("key", OTHER_VALUES)
def test_a_changed_key_is_refused_by_name_or_free(tmp_path: Path, trials: Trials, key: str) -> None:
    trials.tried_all(11, 1)
    assert with_changed_key(tmp_path / "run", key) is None


def test_a_run_without_identity_is_caught(tmp_path: Path, trials: Trials) -> None:
    keys = ["generation.seed", "input.system", "output.keep_fields"]
    found = (with_changed_key(tmp_path / key, key, forget_the_job) for key in keys)
    assert trials.is_caught(11, "no comparison", found, "accepted")
