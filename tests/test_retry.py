"""A retry answers the lines that failed, and only those; whatever interrupts it, the merged output comes out whole."""

import errno
import json
import os
import signal

import pytest

from pipeline import load_job, run_job
from pipeline.errors import NotFoundError, SpecError, UsageError, WriteError
from pipeline.ledger.history import replay
from pipeline.tools.verify import verify_job
from tests.command import kill_after, overnight, read_output, start, wait_until, without_times, write_job
from tests.faults.crash_states import Killed, Recorder
from tests.faults.small_run import UnsyncedFiles, answer, finish, open_ledger, published, summarize
from tests.faults.small_run import line as small_line

PROMPTS = [{"id": f"p{i}", "prompt": f"prompt {i}"} for i in range(30)]
FAILING = {"engine": "echo", "echo": {"fail_every": 4}}


def failing_once(directory):
    """The output of a finished run with a failed answer, whose line tells it from the one that a retry gives."""
    output = directory / "out.jsonl"
    with open_ledger(output, UnsyncedFiles()) as ledger:
        for index in range(5):
            ledger.append(answer(index), b'{"failed": 1}\n' if index == 3 else small_line(index))
        ledger.publish(summarize, summary_line=True)
    return output


def retry(output, files=None):
    """Take the run up for its failed answers and publish; the items that it asked for."""
    with open_ledger(output, files or UnsyncedFiles(), retry=True) as ledger:
        asked = [index for index in range(5) if not ledger.is_done(index, 0)]
        for index in asked:
            ledger.append(answer(index), small_line(index))
            ledger.commit()
        ledger.publish(summarize, summary_line=True)
    return asked


def test_the_failed_answers_are_given_again_and_the_rest_is_kept(tmp_path):
    output = failing_once(tmp_path)
    before = output.stat().st_ino
    assert retry(output) == [3]
    assert output.read_bytes() == published()[0]
    assert output.stat().st_ino != before  # a new file in the old one's place, never the old one rewritten
    assert output.with_name("out.jsonl.summary.json").read_bytes() == published()[1]
    assert output.with_name("out.jsonl.partial").read_bytes().count(b"\n") == 6
    history, _ = replay(output.with_name("out.jsonl.journal"))
    assert [session.ended for session in history.sessions] == ["finished", "finished"]


def test_killed_anywhere_it_is_resumed_by_itself_or_by_run(tmp_path):
    (tmp_path / "count").mkdir()
    output = failing_once(tmp_path / "count")
    recorder = Recorder(tmp_path / "count")
    retry(output, recorder)
    assert recorder.num_steps > 15
    for kill_at in range(recorder.num_steps):
        root = tmp_path / str(kill_at)
        root.mkdir()
        output = failing_once(root)
        whole = output.read_bytes(), published()[0]
        dying = Recorder(root, kill_at=kill_at)
        with pytest.raises(Killed):
            retry(output, dying)
        dying.die()
        assert output.read_bytes() in whole, kill_at
        if kill_at % 2:  # what was begun is resumed by `run` too, and what was not yet noted is not begun
            finish(output, UnsyncedFiles())
            assert output.read_bytes() in whole, kill_at
            assert output.with_name("out.jsonl.summary.json").exists()
        retry(output)
        assert output.read_bytes() == published()[0], kill_at


def test_a_disk_that_refuses_leaves_the_old_output(tmp_path):
    output = failing_once(tmp_path)
    old = output.read_bytes()

    def fail(operation, path):
        if operation == "rename":
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    recorder = Recorder(tmp_path, fail=fail)
    with pytest.raises(WriteError):
        retry(output, recorder)
    recorder.die()
    assert output.read_bytes() == old
    retry(output)
    assert output.read_bytes() == published()[0]


def test_what_was_never_finished_is_no_matter_for_a_retry(tmp_path):
    output = tmp_path / "out.jsonl"
    with pytest.raises(NotFoundError, match="no run yet"):
        open_ledger(output, UnsyncedFiles(), retry=True)
    assert list(tmp_path.iterdir()) == []
    with open_ledger(output, UnsyncedFiles()) as ledger:
        ledger.append(answer(0), small_line(0))
    with pytest.raises(UsageError, match="not finished yet"):
        open_ledger(output, UnsyncedFiles(), retry=True)


def test_the_command_retries_says_so_and_the_result_verifies(tmp_path):
    job = write_job(tmp_path, [*PROMPTS, b"{not json"], model=FAILING)
    assert overnight("run", job).returncode == 3
    before, summary = read_output(tmp_path / "out.jsonl")
    again = overnight("retry", job, "--json")
    assert again.returncode == 3, again.stderr
    after, summary_after = read_output(tmp_path / "out.jsonl")
    assert without_times(after) == without_times(before)  # this engine fails on the same lines again
    assert json.loads(again.stdout) == summary_after
    for name in ("completed", "failed", "errors", "total_output_tokens"):
        assert summary_after[name] == summary[name]
    assert [session["completed"] for session in summary_after["sessions"]] == [23, 0]
    assert (tmp_path / "out.jsonl.partial").read_bytes().count(b"\n") == 31 + 8
    assert overnight("verify", job).returncode == 0
    assert overnight("run", job).returncode == 3


def test_nothing_to_retry_touches_nothing(tmp_path):
    job = write_job(tmp_path, PROMPTS)
    assert overnight("run", job).returncode == 0
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    again = overnight("retry", job)
    assert again.returncode == 0 and "nothing to retry" in again.stderr
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()} == before


def test_an_interrupted_retry_is_resumed_and_the_status_tells_it(tmp_path):
    job = write_job(tmp_path, PROMPTS, model=FAILING)
    run_job(load_job(job), quiet=True)
    expected, _ = read_output(tmp_path / "out.jsonl")
    slow = ["--set", "model.echo.delay=300ms"]
    process = start("retry", job, *slow)
    journal = tmp_path / "out.jsonl.journal"
    wait_until(lambda: b'"commit"' in journal.read_bytes().partition(b'"retry"')[2])
    assert kill_after(process, 0) == -signal.SIGKILL
    status = json.loads(overnight("status", job, "--json").stdout)
    assert status["state"] == "stopped" and 23 <= sum(list(status["request_counts"].values())[1:]) < 30
    problems = []
    assert verify_job(load_job(job), problems.append).state == "stopped" and problems == []
    assert overnight("retry", job).returncode == 3
    answers, summary = read_output(tmp_path / "out.jsonl")
    assert without_times(answers) == without_times(expected)
    assert [session["ended"] for session in summary["sessions"]] == ["finished", "killed", "finished"]


def test_another_job_is_refused_as_by_run(tmp_path):
    job = write_job(tmp_path, PROMPTS, model=FAILING)
    run_job(load_job(job), quiet=True)
    with pytest.raises(SpecError, match=r"generation\.seed"):
        run_job(load_job(job, overrides=["generation.seed=7"]), retry=True, quiet=True)
    assert run_job(load_job(job, overrides=["run.resume=never"]), retry=True, quiet=True).exit_code == 3
