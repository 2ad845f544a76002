"""Promise 9, damage is refused, not eaten: a changed byte is cut as a torn tail with the same result, or exit 65."""

from __future__ import annotations

import json
import random
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

import pipeline.ledger.journal as journal_module
import pipeline.ledger.partial as partial_module
from tests.command import wait_until
from tests.faults.compare import problem_with, undisturbed
from tests.faults.processes import Preparation, Run, make_job, run_to_end
from tests.faults.trials import Trials, chances

KINDS = ("flip", "zero", "remove")


def no_checksums() -> None:
    """The broken variant: a journal and a partial file that are believed."""

    def split(line: bytes, _start: int) -> tuple[bytes, int] | None:
        try:
            synced, _, text = line[9:-1].partition(b" ")
            json.loads(text)
            return text, int(synced)
        except ValueError:
            return None

    journal_module._split = split
    original = partial_module.hashlib.sha256

    class Believed:
        def __init__(self, data: bytes) -> None:
            self.data = data

        def hexdigest(self) -> AnyDigest:
            return AnyDigest(original(self.data).hexdigest())

    class Hashes:
        sha256 = Believed

    partial_module.hashlib = Hashes


class AnyDigest(str):
    """Equal to every digest."""

    __slots__ = ()

    def __ne__(self, _other: object) -> bool:
        return False

    __hash__ = str.__hash__


_kept = TemporaryDirectory()


@cache
def half_done() -> Path:
    """The files of a run that was killed halfway."""
    directory = Path(_kept.name)
    job = make_job(directory, delay="5ms")
    journal = job.with_name("out.jsonl.journal")
    for num_commits in (1, 3, 5):  # of three sessions
        run = Run(job)
        wait_until(lambda num=num_commits: journal.exists() and journal.read_bytes().count(b'"commit"') >= num)
        run.kill_after(0)
    assert not job.with_name("out.jsonl").exists()
    return directory


def damaged(directory: Path, chance: random.Random, *prepare: Preparation) -> str | None:
    """One byte of journal or partial is changed; what came of it."""
    shutil.copytree(half_done(), directory)
    job = directory / "job.yaml"
    text = job.read_text().replace(str(half_done() / "out.jsonl"), str(directory / "out.jsonl"))
    job.write_text(text.replace('"5ms"', '"0ms"'))
    (directory / "witness").unlink()
    path = directory / chance.choice(["out.jsonl.journal", "out.jsonl.partial"])
    data = bytearray(path.read_bytes())
    place, kind = chance.randrange(len(data)), chance.choice(KINDS)
    if kind == "flip":
        data[place] ^= 1 << chance.randrange(8)
    elif kind == "zero":
        data[place] = 0
    else:
        del data[place]
    path.write_bytes(data)
    before = path.read_bytes(), (directory / "out.jsonl.journal").read_bytes()
    run = run_to_end(job, prepare=prepare)
    what = f"{kind} byte {place} of {path.suffix}"
    if run.process.exitcode == 65:
        if (path.read_bytes(), (directory / "out.jsonl.journal").read_bytes()) != before:
            return f"written to: refused after {what}, and changed"
        return None if path.name in run.talk else f"refused without a name: {run.talk}"
    problem = problem_with(job, run.process.exitcode, run.talk)
    return problem and f"{problem}; {what}"


@pytest.mark.parametrize("part", range(2))
def test_one_byte_anywhere(tmp_path: Path, trials: Trials, part: int) -> None:
    assert undisturbed()
    for number, chance in enumerate(trials.seeds(9, 1000, 2)):
        assert damaged(tmp_path / str(number), chance) is None


def test_without_checksums_damage_is_eaten(tmp_path: Path, trials: Trials) -> None:
    found = (damaged(tmp_path / str(number), chance, no_checksums) for number, chance in enumerate(chances(60)))
    assert trials.is_caught(9, "no checksums", found, "corrupt", "lost", "not resumed")
