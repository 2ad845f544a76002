"""Promise 13, same answers: interruptions, neighbours and appended lines change nobody's random stream."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import pipeline.engines.echo as echo_module
from tests.command import is_generating, kill_after, overnight, start, wait_until, write_job
from tests.faults.compare import answers_of, problem_with
from tests.faults.processes import PROMPTS, Preparation, Run, duration, make_job, run_to_end
from tests.faults.trials import Trials, chances

PARTS = 4


def one_generator() -> None:
    """The broken variant: one generator for all items, seeded when the process starts."""
    whole = random.Random(0)

    class Random:
        Random = staticmethod(lambda _seed: whole)

    echo_module.random = Random


def killed_often(directory: Path, chance: random.Random, *prepare: Preparation) -> str | None:
    job = make_job(directory)
    for _ in range(chance.randint(1, 20)):
        if Run(job, prepare=prepare).kill_after(chance.uniform(0.2, 0.9) * duration()) == 3:
            break
    last = run_to_end(job, prepare=prepare)
    return problem_with(job, last.process.exitcode, last.talk)


@pytest.mark.parametrize("part", range(PARTS))
def test_after_up_to_twenty_kills(tmp_path: Path, trials: Trials, part: int) -> None:
    for number, chance in enumerate(trials.seeds(13, 200, PARTS)):
        assert killed_often(tmp_path / str(number), chance) is None


def test_one_generator_for_all_gives_other_answers(tmp_path: Path, trials: Trials) -> None:
    found = (killed_often(tmp_path / str(number), chance, one_generator) for number, chance in enumerate(chances(20)))
    assert trials.is_caught(13, "one generator", found, "corrupt: the output is another one")


def answered(directory: Path, lines: list[Any], *prepare: Preparation) -> list[dict[str, Any]]:
    directory.mkdir()
    generation = {"num_samples": 2, "temperature": 1.0}
    job = write_job(directory, lines, generation=generation, batch={"slots": 8})
    run = run_to_end(job, prepare=prepare)
    assert run.process.exitcode in (0, 3), run.talk
    return answers_of(job.with_name("out.jsonl"))


def among_others(directory: Path, chance: random.Random, *prepare: Preparation) -> str | None:
    """Some lines have other content and some are appended; whether the answers to all others are as they were."""
    lines: list[Any] = list(PROMPTS)
    touched = set(chance.sample(range(len(lines)), chance.randint(1, 30)))
    for index in touched:
        lines[index] = chance.choice([b"{broken", {"prompt": "x " * chance.randint(1, 99)}])
    lines += [{"prompt": "more"}] * chance.randint(0, 9)
    before = answered(directory / "before", PROMPTS, *prepare)
    after = answered(directory / "after", lines, *prepare)[: len(before)]
    for old, new in zip(before, after, strict=True):
        if old["index"] not in touched and old != new:
            return f"another answer to item {old['index']}"
    return None


def test_whatever_the_other_lines_say(tmp_path: Path, trials: Trials) -> None:
    for number, chance in enumerate(trials.seeds(13, 200)):
        (tmp_path / str(number)).mkdir()
        assert among_others(tmp_path / str(number), chance) is None


def test_with_one_generator_the_other_lines_matter(tmp_path: Path, trials: Trials) -> None:
    def attempt(number: int, chance: random.Random) -> str | None:
        (tmp_path / str(number)).mkdir()
        return among_others(tmp_path / str(number), chance, one_generator)

    found = (attempt(number, chance) for number, chance in enumerate(chances(20)))
    assert trials.is_caught(13, "one generator, other lines", found, "another answer")


def real_job(directory: Path, temperature: float, *, path: str = "builtin:smollm2-135m", **more: Any) -> Path:
    directory.mkdir()
    prompts = [{"prompt": f"Tell me {'more ' * (index % 4)}about the number {index}."} for index in range(24)]
    generation = {"max_new_tokens": 12, "temperature": temperature, "ignore_eos": True} | more
    model = {"engine": "transformers", "path": path}
    return write_job(directory, prompts, model=model, generation=generation, batch={"slots": 4})


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_of_a_real_model_too(tmp_path: Path, trials: Trials, temperature: float) -> None:
    whole = real_job(tmp_path / "whole", temperature)
    assert overnight("run", whole).returncode == 0
    expected = answers_of(whole.with_name("out.jsonl"))
    for number, chance in enumerate(trials.seeds(13, 50, 2)):
        job = real_job(tmp_path / str(number), temperature)
        process = start("run", job)
        wait_until(lambda directory=job.parent: is_generating(directory), seconds=300)
        kill_after(process, chance.uniform(0, 3))
        assert overnight("run", job).returncode == 0
        found = answers_of(job.with_name("out.jsonl"))
        for old, new in zip(expected, found, strict=True):
            assert json.dumps(old["completion"]) == json.dumps(new["completion"]), (number, old["index"])


@pytest.mark.slow
@pytest.mark.parametrize("path", ["builtin:smollm2-135m", "builtin:tiny-qwen3-next"])
def test_deterministic_answers_of_a_real_model_are_the_same_with_other_slots_too(
    tmp_path: Path, trials: Trials, path: str
) -> None:
    """Every session has another number of slots, and takes up the tokens that the one before left."""
    whole = real_job(tmp_path / "whole", 0.7, path=path, deterministic=True, max_new_tokens=48)
    assert overnight("run", whole, "--set", "batch.slots=24").returncode == 0
    expected = answers_of(whole.with_name("out.jsonl"))
    for number, chance in enumerate(trials.seeds(13, 40, 2)):
        job = real_job(tmp_path / str(number), 0.7, path=path, deterministic=True, max_new_tokens=48)
        operational = ("--set", "run.save_unfinished=1s", "--set", f"batch.slots={chance.randint(1, 12)}")
        process = start("run", job, *operational)
        wait_until(lambda directory=job.parent: is_generating(directory), seconds=300)
        kill_after(process, chance.uniform(0, 6))
        assert overnight("run", job).returncode == 0
        assert answers_of(job.with_name("out.jsonl")) == expected, number
