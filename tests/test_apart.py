"""A model made in a child process: its progress and its errors arrive, its noise does not."""

from pathlib import Path

import pytest

from pipeline.errors import NotFoundError, OvernightError, Problem
from pipeline.loading.apart import apart


def make_noisily(directory: Path, progress) -> None:
    print("noise")
    progress("half", 0.5)
    (directory / "file").write_text("made")


def refuse(directory: Path, progress) -> None:
    raise NotFoundError(Problem("is not there", field="model.path"))


def crash(directory: Path, progress) -> None:
    raise ValueError("last words")


def test_progress_arrives_and_noise_does_not(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[str, float]] = []
    apart("tests.test_apart:make_noisily")(tmp_path, lambda stage, fraction: told.append((stage, fraction)))
    assert told == [("half", 0.5)]
    assert (tmp_path / "file").read_text() == "made"
    assert capfd.readouterr() == ("", "")


def test_an_error_for_the_user_is_raised_here_as_it_was_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        apart("tests.test_apart:refuse")(tmp_path, lambda *_: None)
    assert caught.value.problems == (Problem("is not there", field="model.path"),)


def test_a_crash_says_how_it_ended(tmp_path: Path) -> None:
    with pytest.raises(OvernightError, match="last words") as caught:
        apart("tests.test_apart:crash")(tmp_path, lambda *_: None)
    assert caught.value.exit_code == 70
