"""Promise 19, too long a prompt: that line's error, or cut as the job asks, at every length around the boundary."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import pipeline.engines
from pipeline import load_job, read_results, run_job
from pipeline.ledger.files import Files
from pipeline.prompting.length_limit import LengthLimit
from tests.command import write_job
from tests.faults.trials import Trials, chances

LINES_A_RUN = 25
MODES = ("error", "truncate-start", "truncate-end")


@pytest.fixture(autouse=True)
def no_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody cuts the power here."""
    monkeypatch.setattr(Files, "sync", lambda *_: None)
    monkeypatch.setattr(Files, "sync_directory", lambda *_: None)


def cut_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken variant: whatever is too long loses its beginning, asked or not."""
    original = LengthLimit._cut

    def _cut(self: LengthLimit, *arguments: Any) -> Any:
        return original(LengthLimit(self.context_length, "truncate-start"), *arguments)

    monkeypatch.setattr(LengthLimit, "_cut", _cut)


def around_the_boundary(
    directory: Path, chance: random.Random, monkeypatch: pytest.MonkeyPatch, mode: str | None = None
) -> str | None:
    """Prompts of all lengths around a context; what is wrong with their answers. A token of the echo is a byte."""
    directory.mkdir()
    context, most_new = chance.randint(2, 80), chance.randint(1, 40)
    mode = mode or chance.choice(MODES)
    monkeypatch.setattr(pipeline.engines, "_ECHO_CONTEXT_LENGTH", context)
    lengths = [max(1, context + chance.randint(-4, 4)) for _ in range(LINES_A_RUN)]
    lines = ["".join(chance.choices("abcdefgh", k=length)) for length in lengths]
    job = write_job(
        directory,
        [{"prompt": line} for line in lines],
        input={"over_length": mode},
        generation={"max_new_tokens": most_new},
    )
    run_job(load_job(job), quiet=True)
    for line, answer in zip(lines, read_results(directory / "out.jsonl"), strict=True):
        if problem := misfit(line, answer, context, most_new, mode):
            return f"{problem}: {len(line)} of {context}, {mode}: {answer}"
    return None


def misfit(line: str, answer: dict[str, Any], context: int, most_new: int, mode: str) -> str | None:
    is_over = len(line) >= context
    room = min(most_new, max(1, context // 2)) if is_over else min(most_new, context - len(line))
    num_kept = context - room if is_over else len(line)
    kept = line[len(line) - num_kept :] if mode == "truncate-start" else line[:num_kept]
    if is_over and (mode == "error" or not kept):
        is_refused = answer["error"] is not None and answer["error"]["type"] == "prompt_too_long"
        return None if is_refused else "not refused"
    if answer["error"] is not None:
        return "refused"
    if answer["usage"]["prompt_tokens"] != num_kept:
        return "cut too much or too little"
    return None if answer["completion"] == kept[:room] else "another content"


def test_prompts_around_the_length_of_the_context(
    tmp_path: Path, trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = trials.begin(19, 500)
    for number, chance in enumerate(chances(-(-wanted // LINES_A_RUN))):
        assert around_the_boundary(tmp_path / str(number), chance, monkeypatch) is None
        trials.num_trials += LINES_A_RUN


def test_a_silent_cut_is_caught(tmp_path: Path, trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_silently(monkeypatch)
    found = (
        around_the_boundary(tmp_path / str(number), chance, monkeypatch, "error")
        for number, chance in enumerate(chances(20))
    )
    assert trials.is_caught(19, "cut in silence", found, "not refused")
