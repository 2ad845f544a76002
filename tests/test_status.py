"""How far a run is, told from its files in every state, in words, in JSON and while one watches."""

import json
import signal

import pytest

from pipeline import load_job, run_job
from pipeline.ledger.history import replay, skim
from pipeline.tools.status import job_status, watch_job
from tests.command import is_generating, kill_after, overnight, start, wait_until, write_job
from tests.faults.small_run import UnsyncedFiles, answer, line, open_ledger

PROMPTS = [{"prompt": f"prompt {i}"} for i in range(60)]
SLOW = {"engine": "echo", "echo": {"delay": "100ms", "fail_every": 4}}


def states(job):
    status = job_status(load_job(job))
    return status.run.state, status.to_json()["status"]


def test_every_state_has_its_words(tmp_path):
    job = write_job(tmp_path, PROMPTS, model=SLOW)
    assert states(job) == ("absent", "validating")
    process = start("run", job)
    wait_until(lambda: is_generating(tmp_path))
    assert states(job) == ("running", "in_progress")
    assert f"process {process.pid}" in str(job_status(load_job(job)))
    assert str(job_status(load_job(job))).count("s, running") == 1
    kill_after(process, 0)
    assert states(job) == ("stopped", "cancelled")
    assert "s, killed" in str(job_status(load_job(job))) and "s, running" not in str(job_status(load_job(job)))
    run_job(load_job(job, overrides=["model.echo.delay=0ms"]), quiet=True)
    assert states(job) == ("finished", "completed")
    counts = job_status(load_job(job)).to_json()["request_counts"]
    assert counts == {"total": 60, "completed": 45, "failed": 15}
    (tmp_path / "out.jsonl.summary.json").unlink()
    assert states(job) == ("publishing", "finalizing")
    journal = tmp_path / "out.jsonl.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:2], b"x" + lines[2], *lines[3:]]))
    assert states(job) == ("damaged", "failed")
    assert "verify" in str(job_status(load_job(job)))


def test_a_run_that_has_only_publishing_left_is_finalizing(tmp_path):
    job = write_job(tmp_path, PROMPTS[:5])
    with open_ledger(tmp_path / "out.jsonl", UnsyncedFiles()) as ledger:
        for index in range(5):
            ledger.append(answer(index), line(index))
        ledger.commit()
        assert states(job) == ("running", "finalizing")


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL])
def test_skimming_counts_what_reading_all_counts(tmp_path, stop):
    job = write_job(tmp_path, [*PROMPTS, b"{bad"], model=SLOW, generation={"num_samples": 2})
    journal = tmp_path / "out.jsonl.journal"
    for least in (1, 2):
        process = start("run", job)
        wait_until(lambda least=least: journal.exists() and journal.read_bytes().count(b'"commit"') >= least)
        kill_after(process, 0, stop)
    run_job(load_job(job, overrides=["model.echo.delay=0ms"]), quiet=True)
    run_job(load_job(job, overrides=["model.echo.delay=0ms"]), quiet=True, retry=True)
    (skimmed, end), (whole, whole_end) = skim(journal), replay(journal)
    assert end == whole_end
    for name in ("header", "num_done", "sessions", "published", "is_published", "is_retry", "is_complete"):
        assert getattr(skimmed, name) == getattr(whole, name), name
    for name in ("completed", "failed", "input_tokens", "output_tokens"):
        assert getattr(skimmed.tally, name) == getattr(whole.tally, name), name


def test_watching_goes_on_until_nobody_works_on_the_run(tmp_path):
    job = write_job(tmp_path, PROMPTS)
    seen, pauses = [], []
    ledger = open_ledger(tmp_path / "out.jsonl", UnsyncedFiles())

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 2:
            ledger.close("stopped")

    for status in watch_job(load_job(job), sleep=sleep):
        seen.append(status.run.state)
    assert seen == ["running", "running", "stopped"] and min(pauses) >= 2


def test_the_command_watches_a_run_to_its_end(tmp_path):
    job = write_job(tmp_path, PROMPTS, model=SLOW)
    process = start("run", job)
    wait_until(lambda: is_generating(tmp_path))
    watched = overnight("status", job, "--watch", "--json")
    assert watched.returncode == 0
    told = [json.loads(each) for each in watched.stdout.splitlines()]
    assert told[0]["status"] == "in_progress" and told[-1]["status"] in ("completed", "finalizing")
    assert [each["request_counts"]["completed"] for each in told] == sorted(
        each["request_counts"]["completed"] for each in told
    )
    assert process.wait(60) == 3
    process.communicate()
