"""What a run says as JSON: every line of standard error is one object, errors and progress with their fields."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import progress as module
from pipeline import talk
from pipeline.progress import Progress
from pipeline.summary import Tally
from tests.command import overnight, write_job

PROMPTS = [{"prompt": "a"}, {"prompt": "b"}]


def events(text: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in text.splitlines()]
    assert all(one["time"].endswith("Z") and one["level"] in {"info", "error"} for one in found)
    return found


@pytest.fixture
def as_json() -> Iterator[None]:
    talk.use_json()
    yield
    talk.use_json(False)


def test_a_run_talks_in_objects_alone(tmp_path: Path) -> None:
    job = write_job(tmp_path, PROMPTS)
    ended = overnight("run", job, "--log-json")
    assert ended.returncode == 0
    told = events(ended.stderr)
    assert {one["event"] for one in told} == {"message"}
    assert any(one["message"].startswith("answers: ") for one in told)
    again = events(overnight("retry", job, "--log-json").stderr)
    assert "nothing to retry" in again[-1]["message"]
    assert overnight("run", job, "--log-json", "--quiet").stderr == ""


def test_under_a_supervisor_the_talk_is_json_too(tmp_path: Path) -> None:
    job = write_job(tmp_path, PROMPTS)
    ended = overnight("run", job, "--log-json", "--supervise")
    assert ended.returncode == 0
    assert any(one["message"].startswith("answers: ") for one in events(ended.stderr))


def test_every_problem_of_a_job_is_an_object_with_its_place(tmp_path: Path) -> None:
    job = write_job(tmp_path, PROMPTS, generation={"seed": "x", "top_p": 7})
    ended = overnight("run", job, "--log-json")
    told = events(ended.stderr)
    assert ended.returncode == 78
    assert {one["field"] for one in told} == {"generation.seed", "generation.top_p"}
    assert all(one["exit_code"] == 78 and one["event"] == "error" and one["line"] for one in told)


def test_progress_is_an_event(
    as_json: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_FIRST_LINE_S", 0.0)
    Progress(8, Tally(), quiet=False, stream=io.StringIO()).show(Tally(completed=3, failed=1, output_tokens=50))
    (told,) = events(capsys.readouterr().err)
    assert (told["event"], told["done"], told["total"], told["failed"]) == ("progress", 4, 8, 1)
    assert told["output_tokens"] == 50


def test_a_fault_of_ours_has_its_traceback(as_json: None, capsys: pytest.CaptureFixture[str]) -> None:
    talk.confess("Traceback (most recent call last):\n  ...\nValueError: no\n")
    (told,) = events(capsys.readouterr().err)
    assert (told["level"], told["message"]) == ("error", "ValueError: no")
    assert "most recent" in told["traceback"]
