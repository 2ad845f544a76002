"""Input that lies elsewhere and output that is to go there: copied once, guarded, and safe here if that fails."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import load_job, read_results, remote, run_job
from pipeline.errors import DataError, NotFoundError, OutputError, SpecError, WriteError
from pipeline.ledger import upload
from pipeline.source.inputs import expand_inputs
from pipeline.source.lines import digest_inputs, read_lines
from pipeline.tools.status import job_status
from tests.command import finish, kill_after, start, wait_until, write_job

LINES = b"".join(json.dumps({"id": n, "prompt": f"say {n}"}).encode() + b"\n" for n in range(30))


@pytest.fixture(autouse=True)
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty place elsewhere, and an own cache here."""
    monkeypatch.setenv("OVERNIGHT_CACHE", str(tmp_path / "cache"))
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()


def job(directory: Path, *, output: str | None = None, **sections: Any) -> Path:
    sections = {"input": {"path": "memory://in/*.jsonl.gz"}, **sections}
    if output is not None:
        local = {"path": output, "local_directory": str(directory / "local")}
        sections["output"] = {**local, **sections.get("output", {})}
    return write_job(directory, [], **sections)


def put(there: Any, name: str, data: bytes) -> None:
    there.pipe_file(name, data)


def copies(directory: Path) -> list[str]:
    return sorted(path.name.partition("-")[2] for path in (directory / "cache/remote").glob("*"))


def test_input_elsewhere_is_copied_once_for_each_version(tmp_path: Path, there: Any) -> None:
    put(there, "/in/b.jsonl.gz", gzip.compress(LINES))
    put(there, "/in/a.jsonl.gz", gzip.compress(b'{"prompt": "first"}\n{bad\n'))
    put(there, "/in/notes.txt", b"no input")
    file = job(tmp_path)
    assert finish(file) == 3
    answers = list(read_results(tmp_path / "out.jsonl"))
    assert [answer["completion"] for answer in answers] == ["first", None, *(f"say {n}" for n in range(30))]
    assert (answers[1]["error"]["file"], answers[1]["error"]["line"]) == ("memory:///in/a.jsonl.gz", 2)
    assert copies(tmp_path) == ["a.jsonl.gz", "b.jsonl.gz"]


def test_a_finished_run_fetches_nothing(tmp_path: Path, there: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put(there, "/in/a.jsonl.gz", gzip.compress(LINES))
    file = job(tmp_path)
    assert run_job(load_job(file), quiet=True).exit_code == 0
    for copy in (tmp_path / "cache/remote").iterdir():
        copy.unlink()
    monkeypatch.setattr("pipeline.source.inputs.fetch", lambda _file: pytest.fail("it was fetched"))
    assert run_job(load_job(file), quiet=True).exit_code == 0


def test_a_new_version_is_read_anew_and_known_by_its_content(tmp_path: Path, there: Any) -> None:
    put(there, "/in/a.jsonl.gz", gzip.compress(LINES))
    file = job(tmp_path)
    assert run_job(load_job(file), quiet=True).exit_code == 0
    put(there, "/in/a.jsonl.gz", gzip.compress(LINES, compresslevel=1))
    assert run_job(load_job(file), quiet=True).exit_code == 0
    put(there, "/in/a.jsonl.gz", gzip.compress(LINES.replace(b"say 7", b"say 8")))
    with pytest.raises(DataError, match=r"memory:///in/a\.jsonl\.gz: the input has changed"):
        run_job(load_job(file), quiet=True)


def test_a_table_elsewhere_is_read_too(tmp_path: Path, there: Any) -> None:
    pq.write_table(pa.table({"prompt": ["a", "b"]}), tmp_path / "x.parquet")
    put(there, "/t/x.parquet", (tmp_path / "x.parquet").read_bytes())
    lines = read_lines(expand_inputs(["memory://t/x.parquet"]), max_line_bytes=1000)
    assert [raw.data for raw in lines] == [b'{"prompt":"a"}', b'{"prompt":"b"}']


def test_a_file_that_changes_while_it_is_copied_is_refused(tmp_path: Path, there: Any) -> None:
    put(there, "/in/a.jsonl", LINES)
    files = expand_inputs(["memory://in/a.jsonl"])
    put(there, "/in/a.jsonl", LINES.replace(b"say 7", b"say 8"))
    with pytest.raises(NotFoundError, match="was changed while it was copied"):
        digest_inputs(files)
    assert copies(tmp_path) == []


def test_a_broken_copy_leaves_nothing(tmp_path: Path, there: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put(there, "/in/a.jsonl.gz", gzip.compress(LINES))

    def cut(_self: Any, _path: str, target: str, **_: Any) -> None:
        Path(target).write_bytes(b"half")
        raise ConnectionResetError("the peer went away")

    monkeypatch.setattr(type(there), "get_file", cut)
    with pytest.raises(NotFoundError, match=r"memory://in/a\.jsonl\.gz: ConnectionResetError: the peer went away"):
        digest_inputs(expand_inputs(["memory://in/a.jsonl.gz"]))
    assert copies(tmp_path) == []


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("memory://in/none.jsonl", "no such file"),
        ("memory://in/*.nothing", "no file matches"),
        ("memory://in", "directory"),
    ],
)
def test_what_is_not_there_is_told(there: Any, path: str, message: str) -> None:
    put(there, "/in/a.jsonl", LINES)
    with pytest.raises(NotFoundError, match=message):
        expand_inputs([path])


@pytest.mark.parametrize(
    ("key", "path", "message"),
    [
        ("input.path", "nowhere://x/y.jsonl", r"nowhere:// is no file system that is known here"),
        ("input.path", "s3://b/x.jsonl", r"s3:// needs `pip install 'overnight\[remote\]'`"),
        ("output.path", "gs://b/x.jsonl", r"gs:// needs `pip install 'overnight\[remote\]'`"),
        ("input.path", "abfs://b/x.jsonl", r"abfs:// needs `pip install adlfs`"),
        ("input.path", "ftp://me:secret@host/x.jsonl", "a password in a path"),
        ("output.path", "https://host/x.jsonl", "cannot be written to"),
        ("output.path", "memory://b/../../x.jsonl", r"must not hold `\.\.`"),
        ("output.path", "memory://b/", "is a directory"),
        ("output.path", "memory://in/a.jsonl.gz", "is among the files of input.path"),
    ],
)
def test_paths_that_cannot_be_had_are_refused_at_once(
    tmp_path: Path, key: str, path: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = remote.importlib.util.find_spec
    absent = {"s3fs", "gcsfs", "adlfs"}
    monkeypatch.setattr(remote.importlib.util, "find_spec", lambda name: None if name in absent else spec(name))
    with pytest.raises(SpecError, match=rf"{key}: .*{message}") as error:
        load_job(job(tmp_path), overrides=[f"{key}={path}"])
    assert "remote" not in str(error.value) or path.startswith(("s3", "gs"))


# Output.


@pytest.fixture
def sending(tmp_path: Path, there: Any) -> Path:
    put(there, "/in/a.jsonl.gz", gzip.compress(LINES))
    return job(tmp_path, output="memory://out/deep/x.jsonl")


def test_the_output_is_put_there_with_its_summary_and_once(tmp_path: Path, there: Any, sending: Path) -> None:
    outcome = run_job(load_job(sending), quiet=True)
    assert outcome.output == tmp_path / "local/out/deep/x.jsonl"
    for suffix in ("", ".summary.json"):
        here = outcome.output.with_name(f"x.jsonl{suffix}")
        assert there.cat_file(f"/out/deep/x.jsonl{suffix}") == here.read_bytes()
    assert len(there.find("/out")) == 2
    before = there.info("/out/deep/x.jsonl")
    assert job_status(load_job(sending)).batch_status == "completed"
    assert run_job(load_job(sending), quiet=True).exit_code == 0
    assert there.info("/out/deep/x.jsonl") == before


def test_a_copy_has_the_suffix_of_its_file() -> None:
    for url in ("https://host/a/x.jsonl.gz?signature=b/c.d", "s3://bucket/a/x.jsonl.gz"):
        assert remote.RemoteFile(url, 1, "v").copy.name.endswith("-x.jsonl.gz")


def test_what_belongs_to_the_output_goes_with_it(tmp_path: Path, there: Any, sending: Path) -> None:
    run_job(load_job(sending, overrides=["output.format=openai-batch"]), quiet=True)
    names = ["x.jsonl", "x.jsonl.summary.json", "x.jsonl.timing.jsonl"]
    assert [name.rpartition("/")[2] for name in sorted(there.find("/out"))] == names


def test_a_strangers_file_is_refused_before_anything_is_done(tmp_path: Path, there: Any, sending: Path) -> None:
    put(there, "/out/deep/x.jsonl", b"somebody's")
    with pytest.raises(OutputError, match=r"memory://out/deep/x\.jsonl: exists and is not of this run"):
        run_job(load_job(sending), quiet=True)
    assert there.cat_file("/out/deep/x.jsonl") == b"somebody's"
    assert not (tmp_path / "local").exists()


def test_a_strangers_file_that_came_meanwhile_is_refused_too(
    there: Any, sending: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(upload.Upload, "finish", lambda _self: False)
        assert run_job(load_job(sending), quiet=True).exit_code == 0
    put(there, "/out/deep/x.jsonl", b"somebody's")
    with pytest.raises(OutputError, match="exists and is not of this run"):
        run_job(load_job(sending), quiet=True)
    assert there.cat_file("/out/deep/x.jsonl") == b"somebody's"


@pytest.mark.parametrize("number", [0, 1])
def test_a_copy_that_fails_is_made_by_the_same_command(
    tmp_path: Path, there: Any, sending: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = type(there).put_file
    puts: list[str] = []

    def fail(self: Any, source: str, path: str, **options: Any) -> None:
        puts.append(path)
        if len(puts) == number + 1:
            there.pipe_file(path, b"half")
            raise TimeoutError("no answer")
        original(self, source, path, **options)

    monkeypatch.setattr(type(there), "put_file", fail)
    with pytest.raises(
        WriteError, match=r"TimeoutError: no answer\. The answers are safe at .*local/out/deep/x\.jsonl"
    ):
        run_job(load_job(sending), quiet=True)
    assert len(list(read_results(tmp_path / "local/out/deep/x.jsonl"))) == 30
    status = job_status(load_job(sending))
    assert "not copied to memory://out/deep/x.jsonl yet" in str(status) and status.batch_status == "finalizing"
    assert run_job(load_job(sending), quiet=True).exit_code == 0
    for suffix in ("", ".summary.json"):
        here = tmp_path / f"local/out/deep/x.jsonl{suffix}"
        assert there.cat_file(f"/out/deep/x.jsonl{suffix}") == here.read_bytes()
    assert puts[-1].endswith(".summary.json")


class Killed(BaseException):
    """What a killed process does next: nothing."""


@pytest.mark.parametrize("step", range(6))
def test_killed_at_any_step_the_same_command_ends_it(
    tmp_path: Path, there: Any, sending: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each copy, and after each note of the two that are made about them."""
    left = iter(range(step + 1))

    def dying(work: Any) -> Any:
        def do(*words: Any, **options: Any) -> Any:
            result = work(*words, **options)
            if next(left, None) == step:
                raise Killed
            return result

        return do

    spec = load_job(sending, overrides=["output.format=openai-batch"])
    with monkeypatch.context() as patch:
        patch.setattr(upload.remote, "put", dying(remote.put))
        patch.setattr(upload, "replace_file", dying(upload.replace_file))
        if step < 5:
            with pytest.raises(Killed):
                run_job(spec, quiet=True)
        else:
            run_job(spec, quiet=True)  # nothing was left to be killed at
    assert run_job(spec, quiet=True).exit_code == 0
    for suffix in ("", ".timing.jsonl", ".summary.json"):
        here = tmp_path / f"local/out/deep/x.jsonl{suffix}"
        assert there.cat_file(f"/out/deep/x.jsonl{suffix}") == here.read_bytes()


def test_what_vanishes_there_is_put_again_and_what_changes_is_told(there: Any, sending: Path) -> None:
    run_job(load_job(sending), quiet=True)
    there.rm_file("/out/deep/x.jsonl")
    assert run_job(load_job(sending), quiet=True).exit_code == 0
    assert there.exists("/out/deep/x.jsonl")
    put(there, "/out/deep/x.jsonl", b"another's now")
    with pytest.raises(DataError, match="has changed since it was put there"):
        run_job(load_job(sending), quiet=True)
    assert there.cat_file("/out/deep/x.jsonl") == b"another's now"


def test_a_new_publication_replaces_the_old_one(there: Any, sending: Path) -> None:
    failing = ["model.echo.fail_every=7", "generation.seed=1"]
    assert run_job(load_job(sending, overrides=failing), quiet=True).exit_code == 3
    first = there.cat_file("/out/deep/x.jsonl")
    assert run_job(load_job(sending, overrides=failing), retry=True, quiet=True).exit_code == 3
    assert there.cat_file("/out/deep/x.jsonl") != first
    assert run_job(load_job(sending), fresh=True, quiet=True).exit_code == 0
    assert b'"failed": 0' in there.cat_file("/out/deep/x.jsonl.summary.json")


def test_a_place_that_does_not_answer_is_told_before_the_night(
    there: Any, sending: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_self: Any, _path: str) -> bool:
        raise PermissionError("access denied")

    monkeypatch.setattr(type(there), "exists", refuse)
    with pytest.raises(OutputError, match="cannot be reached: PermissionError: access denied"):
        run_job(load_job(sending), quiet=True)


def test_a_killed_run_from_there_to_there_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    """Between processes, over fsspec's own view of a disk."""
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(LINES * 4))
    results: list[list[dict[str, Any]]] = []
    for name in ("whole", "killed"):
        directory = tmp_path / name
        directory.mkdir()
        local = directory / "local" / str(directory)[1:] / "there/out.jsonl"
        file = write_job(
            directory,
            [],
            model={"engine": "echo", "echo": {"delay": "10ms"}},
            input={"path": f"file://{tmp_path}/in.jsonl.gz"},
            output={"path": f"file://{directory}/there/out.jsonl", "local_directory": str(directory / "local")},
            batch={"slots": 2},
        )
        if name == "killed":
            process = start("run", file, "--quiet")
            journal = local.with_name("out.jsonl.journal")
            wait_until(lambda path=journal: path.exists() and b'"commit"' in path.read_bytes())  # type: ignore[misc]
            assert kill_after(process, 0) == -9
        assert finish(file) == 0
        assert (directory / "there/out.jsonl").read_bytes() == local.read_bytes()
        results.append([{**row, "timing": None} for row in read_results(directory / "there/out.jsonl")])
    assert results[0] == results[1]
