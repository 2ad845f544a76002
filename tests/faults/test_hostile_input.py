"""Promises 8 and 14: every line has its answer, a bad one costs itself alone, and all counts agree."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pipeline.job
import pipeline.source.line_parser as parser_module
from pipeline import load_job, run_job
from pipeline.ledger.files import Files
from pipeline.source.lines import RawLine, read_lines
from tests.command import write_job
from tests.faults.hostile import good_line, mutated
from tests.faults.trials import Trials, chances

LINES_A_RUN = 10_000
_BLANK = b" \t\r\v\f"


@pytest.fixture(autouse=True)
def no_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody cuts the power here."""
    monkeypatch.setattr(Files, "sync", lambda *_: None)
    monkeypatch.setattr(Files, "sync_directory", lambda *_: None)


def run(directory: Path, data: bytes, num_samples: int = 1) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Answers and summary of a job over these bytes."""
    directory.mkdir()
    job = write_job(directory, [], generation={"num_samples": num_samples}, input={"max_line": "150 KiB"})
    (directory / "in.jsonl").write_bytes(data)
    outcome = run_job(load_job(job), quiet=True)
    # On \n alone: a prompt may hold what str.splitlines takes for a line end.
    records = [json.loads(line) for line in outcome.output.read_bytes().split(b"\n")[:-1]]
    assert outcome.exit_code == (3 if records[-1]["failed"] else 0)
    return records[:-1], records[-1]


def expected_places(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Line number, offset and bytes of each item, by another way than the program's."""
    offset = 0
    for number, line in enumerate(data.split(b"\n"), 1):
        content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if content.strip(_BLANK):
            yield number, offset + len(line) - len(content), content
        offset += len(line) + 1


def wrong(data: bytes, answers: list[dict[str, Any]], summary: dict[str, Any], num_samples: int = 1) -> str | None:
    """What does not agree between the input, its answers and the summary."""
    places = list(expected_places(data))
    if len(answers) != len(places) * num_samples:
        return f"count: {len(places)} lines and {len(answers)} answers"
    failed = 0
    for number, answer in enumerate(answers):
        line, offset, content = places[number // num_samples]
        if (answer["index"], answer["sample"]) != divmod(number, num_samples):
            return f"order: answer {number} is that of {answer['index']}, {answer['sample']}"
        if (error := answer["error"]) is not None:
            failed += 1
            if (error["line"], error["offset"]) != (line, offset):
                return f"place: line {line} at {offset} is said to be line {error['line']} at {error['offset']}"
        elif answer["input"] != json.loads(content):
            return f"content: line {line} came back as another"
    counts = summary["completed"], summary["failed"], sum(summary["errors"].values())
    if counts != (len(answers) - failed, failed, failed):
        return f"count: {len(answers)} answers, {failed} failed, and the summary says {counts}"
    return None


# Promise 14


def good_lines_spoilt(lines: list[bytes], answers: list[dict[str, Any]]) -> str | None:
    for line, answer in zip(lines, answers, strict=True):
        if line == good_line(answer["index"]) and answer["completion"] != json.loads(line)["prompt"]:
            return f"spoilt: good line {answer['index']}"
    return None


def survived(directory: Path, chance: random.Random, count: int) -> str | None:
    """Half of the lines are mutated and half are good."""
    lines = [mutated(chance) if chance.random() < 0.5 else good_line(index) for index in range(2 * count)]
    data = b"\n".join(lines) + b"\n"
    answers, summary = run(directory, data)
    problem = wrong(data, answers, summary) or good_lines_spoilt(lines, answers)
    (directory / "out.jsonl").unlink()
    return problem


@pytest.mark.parametrize("part", range(2))
def test_a_million_hostile_lines(tmp_path: Path, trials: Trials, part: int) -> None:
    left = trials.begin(14, 1_000_000, 2)
    number = 0
    while left > 0:
        count = min(left, LINES_A_RUN)
        seed = 1_000_000 * part + number
        assert survived(tmp_path / str(number), random.Random(seed), count) is None, seed
        trials.num_trials += count
        left -= count
        number += 1


def skip_bad_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken variant: what cannot be read is passed over, as many readers do."""
    original = pipeline.job.read_lines

    def readable(*arguments: Any, **options: Any) -> Iterator[RawLine]:
        for raw in original(*arguments, **options):
            try:
                json.loads(raw.data or b"")
            except ValueError:
                continue
            yield raw

    monkeypatch.setattr(pipeline.job, "read_lines", readable)


def mend_bad_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken variant: bytes that are no UTF-8 are replaced."""
    original = parser_module.read_object
    mended = lambda data: original(data.decode(errors="replace").encode())  # noqa: E731
    monkeypatch.setattr(parser_module, "read_object", mended)


def by_universal_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken variant: a carriage return, a vertical tab and others end a line."""

    def split(files: Any, **options: Any) -> Iterator[RawLine]:
        for raw in read_lines(files, **options):
            for part in (raw.data or b"").splitlines() or [b""]:
                yield RawLine(raw.index, raw.file, raw.line, raw.offset, part)

    monkeypatch.setattr(pipeline.job, "read_lines", split)


@pytest.mark.parametrize("broken", [skip_bad_lines, mend_bad_lines, by_universal_lines])
def test_other_readers_are_caught(
    tmp_path: Path, trials: Trials, monkeypatch: pytest.MonkeyPatch, broken: Callable[[pytest.MonkeyPatch], None]
) -> None:
    broken(monkeypatch)

    def attempt(number: int, chance: random.Random) -> str | None:
        try:
            return survived(tmp_path / str(number), chance, 500)
        except Exception as error:  # noqa: BLE001  the loop itself refuses what these readers give it
            return f"count: {type(error).__name__}: {error}"

    found = (attempt(number, chance) for number, chance in enumerate(chances(4)))
    assert trials.is_caught(14, broken.__name__, found, "count", "spoilt", "content", "place")


# Promise 8


def dirty_input(chance: random.Random) -> bytes:
    """A few lines of any kind, blank ones between them, with any line ends and any beginning."""
    kinds = (
        lambda: mutated(chance)[:500],
        lambda: good_line(chance.randrange(100)),
        lambda: b" \t"[: chance.randrange(3)],
    )
    lines = [chance.choice(kinds)() for _ in range(chance.randrange(12))]
    data = b"".join(line + chance.choice([b"\n", b"\n", b"\r\n", b"\n\n"]) for line in lines)
    if chance.random() < 0.3:
        data = b"\xef\xbb\xbf" + data
    return data if chance.random() < 0.5 else data.removesuffix(b"\n")


def reconciled(directory: Path, chance: random.Random) -> str | None:
    data, num_samples = dirty_input(chance), chance.choice([1, 1, 2, 3])
    answers, summary = run(directory, data, num_samples)
    return wrong(data, answers, summary, num_samples)


@pytest.mark.parametrize("part", range(2))
def test_lines_in_are_lines_out(tmp_path: Path, trials: Trials, part: int) -> None:
    for number, chance in enumerate(trials.seeds(8, 10_000, 2)):
        assert reconciled(tmp_path / str(number), chance) is None


def test_a_line_too_few_is_counted(tmp_path: Path, trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_bad_lines(monkeypatch)

    def attempt(number: int, chance: random.Random) -> str | None:
        try:
            return reconciled(tmp_path / str(number), chance)
        except (OSError, TypeError) as error:  # nothing is published while answers are missing
            return f"count: {error}"

    found = (attempt(number, chance) for number, chance in enumerate(chances(60)))
    assert trials.is_caught(8, "bad lines skipped", found, "count")
