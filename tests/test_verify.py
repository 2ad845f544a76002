"""A run that is whole is found right in every state; whatever is changed in it is told, with its place."""

import hashlib
import json
import re
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import load_job, run_job
from pipeline.errors import DataError, NotFoundError, SpecError
from pipeline.ledger.journal import decode_line, encode_line, start_of_crcs
from pipeline.tools.verify import verify_job
from tests.command import is_generating, kill_after, overnight, start, wait_until, write_job

PROMPTS = [{"id": f"p{i}", "prompt": "word " * (i % 7 + 1) + str(i)} for i in range(20)]
FILES = ["in.jsonl", "out.jsonl", "out.jsonl.journal", "out.jsonl.partial", "out.jsonl.summary.json"]
SLOW = {"engine": "echo", "echo": {"delay": "100ms"}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a run that ended well in three sessions, some answers failed."""
    directory = tmp_path_factory.mktemp("finished")
    job = write_job(
        directory, [*PROMPTS, b"{not json"], model={"engine": "echo", "echo": {"delay": "100ms", "fail_every": 6}}
    )
    overnight("run", job, "--time-limit", "1s")
    overnight("run", job, "--time-limit", "1s")
    assert run_job(load_job(job, overrides=["model.echo.delay=0ms"]), quiet=True).exit_code == 3
    return directory


def verify(job, **options):
    """What `verify` finds, and the problems it tells."""
    problems = []
    return verify_job(load_job(job, **options), problems.append), problems


def told(job):
    """All problems as text, also those that end the check."""
    problems = []
    try:
        verify_job(load_job(job), problems.append)
    except DataError as error:
        problems += error.problems
    return [str(problem) for problem in problems]


def test_a_finished_run_is_right(finished):
    found, problems = verify(finished / "job.yaml")
    assert problems == []
    assert (found.state, found.completed, found.failed, found.num_answers) == ("finished", 17, 4, 21)
    said = overnight("verify", finished / "job.yaml", "--json")
    assert said.returncode == 0 and json.loads(said.stdout)["valid"] is True and said.stderr == ""


def test_it_changes_nothing(finished):
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in finished.iterdir()}
    verify(finished / "job.yaml")
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in finished.iterdir()} == before


@pytest.mark.parametrize("name", FILES)
@given(data=st.data())
@settings(max_examples=60)
def test_no_changed_byte_goes_untold(finished, name, data):
    path = finished / name
    before, times = path.read_bytes(), path.stat()
    at = data.draw(st.integers(0, len(before) - 1))
    how = data.draw(st.sampled_from(["flip", "zero", "remove", "insert", "cut"]))
    bit = data.draw(st.integers(0, 7))
    change = {
        "flip": bytes([before[at] ^ 1 << bit]) + before[at + 1 :],
        "zero": b"\0" + before[at + 1 :],
        "remove": before[at + 1 :],
        "insert": b"x" + before[at:],
        "cut": b"",
    }[how]
    try:
        path.write_bytes(before[:at] + change)
        problems = told(finished / "job.yaml")
    finally:
        path.write_bytes(before)
    assert problems, (how, at)
    assert any(name in problem for problem in problems) or how == "cut" or name.endswith("journal")
    assert times.st_ino == path.stat().st_ino


@pytest.mark.parametrize("name", FILES[1:])
def test_a_missing_file_is_told(finished, tmp_path, name):
    path = finished / name
    path.rename(tmp_path / name)
    try:
        if name.endswith("journal"):
            with pytest.raises(NotFoundError, match="no run"):
                verify(finished / "job.yaml")
        else:
            assert any(name in problem for problem in told(finished / "job.yaml"))
    finally:
        (tmp_path / name).rename(path)


def test_all_problems_come_at_once_with_their_places(tmp_path):
    job = write_job(tmp_path, PROMPTS * 5, model=SLOW)
    process = start("run", job)
    journal, partial = tmp_path / "out.jsonl.journal", tmp_path / "out.jsonl.partial"
    wait_until(lambda: journal.exists() and journal.read_bytes().count(b'"commit"') >= 2)
    assert kill_after(process, 0) == -signal.SIGKILL
    lines = journal.read_bytes().splitlines(keepends=True)
    loaded = next(place for place, line in enumerate(lines) if b'"loaded"' in line)
    lines[loaded] = lines[loaded].replace(b"loaded", b"l0aded")
    journal.write_bytes(b"".join(lines))
    answers = partial.read_bytes()
    partial.write_bytes(answers.replace(b"stop", b"STOP"))
    with (tmp_path / "in.jsonl").open("ab") as file:
        file.write(b"{}\n")
    (tmp_path / "out.jsonl").write_text("a stranger's\n")
    said = overnight("verify", job)
    assert said.returncode == 65
    assert f"out.jsonl.journal:{loaded + 1}: bytes" in said.stderr
    groups = re.findall(r"out.jsonl.partial:(\d+): bytes (\d+) to (\d+)", said.stderr)
    assert len(groups) >= 2 and groups[0][:2] == ("1", "0") and groups[1][1] == groups[0][2]
    assert "in.jsonl: the input has changed" in said.stderr
    assert "this run has not published it" in said.stderr
    as_json = json.loads(overnight("verify", job, "--json").stdout)
    assert as_json["num_problems"] == len(as_json["problems"]) == len(groups) + 3


def test_a_running_and_a_killed_run_are_right(tmp_path):
    job = write_job(tmp_path, PROMPTS * 5, model=SLOW)
    process = start("run", job)
    wait_until(lambda: is_generating(tmp_path))
    found, problems = verify(job)
    assert problems == []
    assert (found.state, found.process) == ("running", process.pid) and found.completed > 0
    assert kill_after(process, 0) == -signal.SIGKILL
    with (tmp_path / "out.jsonl.partial").open("ab") as file:
        file.write(b'{"half an ans')  # what a crash leaves is no fault
    with (tmp_path / "out.jsonl.journal").open("ab") as file:
        file.write(b"\0" * 100)
    found, problems = verify(job)
    assert problems == [] and (found.state, found.process) == ("stopped", None)


def test_a_run_that_grew_and_was_published_again_is_right(tmp_path):
    job = write_job(tmp_path, PROMPTS)
    run_job(load_job(job), quiet=True)
    with (tmp_path / "in.jsonl").open("ab") as file:
        file.write(b'{"prompt": "one more"}\n')
    assert any("the input has changed" in problem for problem in told(job))
    run_job(load_job(job, overrides=["run.resume=always"]), quiet=True)
    assert told(job) == []


@pytest.mark.parametrize("options", [{"output": {"summary_line": False}}, {"generation": {"num_samples": 3}}])
def test_whatever_the_shape_of_the_output_it_is_right(tmp_path, options):
    job = write_job(tmp_path, PROMPTS, **options)
    assert overnight("run", job, "--limit", "7").returncode == 0
    found, problems = verify(job)
    assert problems == [] and found.completed == 7 * (3 if "generation" in options else 1)


def test_an_empty_input_is_right(tmp_path):
    job = write_job(tmp_path, [])
    run_job(load_job(job), quiet=True)
    assert told(job) == []


def test_another_job_is_refused_by_name(finished):
    with pytest.raises(SpecError, match=r"generation\.seed"):
        verify(finished / "job.yaml", overrides=["generation.seed=7"])


def test_answers_that_another_program_made_up_are_told(tmp_path):
    """A journal with right checksums over wrong answers: what only a recount can find."""
    job = write_job(tmp_path, PROMPTS[:2])
    run_job(load_job(job), quiet=True)
    good = (tmp_path / "out.jsonl.partial").read_bytes()
    doubled = good.replace(b'"index":1', b'"index":0')
    header, *rest = (tmp_path / "out.jsonl.journal").read_bytes().splitlines(keepends=True)
    lines = [header]
    for line in rest:
        record, synced = decode_line(line, start_of_crcs(header))
        if record["kind"] == "commit":
            record["sha256"] = hashlib.sha256(doubled).hexdigest()
        lines.append(encode_line(record, synced, start_of_crcs(header)))
    (tmp_path / "out.jsonl.partial").write_bytes(doubled)
    (tmp_path / "out.jsonl.journal").write_bytes(b"".join(lines))
    problems = told(job)
    assert any("item 1, sample 0: it says item 0" in problem for problem in problems)
    assert any("out.jsonl:2: differs from the run's answers" in problem for problem in problems)
