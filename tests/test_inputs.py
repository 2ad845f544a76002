"""Which files the input is: globs, order, what is refused."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from pipeline.errors import DataError, NotFoundError, SpecError
from pipeline.source.inputs import CHUNK_BYTES, expand_inputs, read_chunks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", "note.txt", "a[1].jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    return tmp_path


def names(folder: Path, *patterns: str) -> list[str]:
    return [str(file.path.relative_to(folder)) for file in expand_inputs([str(folder / each) for each in patterns])]


def test_a_list_keeps_its_order_and_a_glob_is_sorted(folder: Path) -> None:
    assert names(folder, "b.jsonl", "a.jsonl") == ["b.jsonl", "a.jsonl"]
    assert names(folder, "note.txt", "?.jsonl") == ["note.txt", "a.jsonl", "b.jsonl"]
    assert names(folder, "**/?.jsonl") == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]


def test_a_glob_takes_files_only_and_a_file_may_be_called_like_a_glob(folder: Path) -> None:
    assert names(folder, "*e*") == ["note.txt"]
    assert names(folder, "a[1].jsonl") == ["a[1].jsonl"]


def test_relative_paths_stay_as_the_job_writes_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert [str(file.path) for file in expand_inputs(["deep/*.jsonl", "a.jsonl"])] == ["deep/c.jsonl", "a.jsonl"]


def test_everything_missing_is_reported_at_once(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    patterns = ["absent.jsonl", "a.jsonl", "none-*.jsonl", "deep", "pipe", "nul\0.jsonl", "x" * 5000]
    with pytest.raises(NotFoundError) as caught:
        expand_inputs([str(folder / each) for each in patterns])
    problems = caught.value.problems
    assert [Path(str(problem.file)).name for problem in problems] == [*patterns[:1], *patterns[2:]]
    assert all(problem.field == "input.path" for problem in problems)
    messages = [problem.message for problem in problems]
    assert messages[:2] == ["no such file", "no file matches this pattern"]
    assert "directory" in messages[2]
    assert "no plain file" in messages[3]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_not_found(folder: Path) -> None:
    (folder / "a.jsonl").chmod(0)
    with pytest.raises(NotFoundError, match="Permission denied"):
        names(folder, "a.jsonl")


def test_a_file_named_twice_is_refused(folder: Path) -> None:
    with pytest.raises(SpecError, match="twice"):
        names(folder, "*.jsonl", "a.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "A.JSONL.GZ"])
def test_chunks_are_the_decompressed_bytes_and_progress_the_bytes_on_disk(tmp_path: Path, name: str) -> None:
    content = os.urandom(3 * CHUNK_BYTES + 5)
    path = tmp_path / name
    # Two members, as `cat a.gz b.gz` makes them.
    path.write_bytes(gzip.compress(content[:7]) + gzip.compress(content[7:]) if name.lower().endswith("z") else content)
    (file,) = expand_inputs([str(path)])
    read: list[int] = []
    assert b"".join(read_chunks(file, CHUNK_BYTES, read.append)) == content
    assert sum(read) == pytest.approx(path.stat().st_size, abs=3)  # the first three bytes come before any report
    assert len(read) > 2


def test_a_file_changed_since_it_was_first_seen_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"0123456789")
    (file,) = expand_inputs([str(path)])
    path.write_bytes(b"0123456789+")
    with pytest.raises(DataError, match="changed"):
        list(read_chunks(file, CHUNK_BYTES))
    (file,) = expand_inputs([str(path)])
    chunks = read_chunks(file, 2)
    next(chunks)
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match="changed"):
        list(chunks)
    path.unlink()
    with pytest.raises(NotFoundError, match=r"a\.jsonl"):
        list(read_chunks(file, CHUNK_BYTES))
