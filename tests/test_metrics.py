"""The Prometheus textfile of a run, read back with the client library's own parser."""

import signal
from pathlib import Path

import pytest

from pipeline import load_job, run_job
from pipeline.metrics import Metrics, metrics_path
from pipeline.source.shard import Shard
from pipeline.summary import Tally
from tests.command import is_generating, kill_after, overnight, start, wait_until, write_job

parser = pytest.importorskip("prometheus_client.parser")
PROMPTS = [{"prompt": f"prompt {i}"} for i in range(12)]
FAILING = {"engine": "echo", "echo": {"fail_every": 4}}


def read(path: Path) -> dict[str, float]:
    """Sample name and labels beyond the run's → value; every family is described and typed."""
    samples = {}
    for family in parser.text_string_to_metric_families(path.read_text()):
        assert family.documentation and family.type in ("counter", "gauge"), family
        for sample in family.samples:
            labels = {key: value for key, value in sample.labels.items() if key not in ("job_name", "shard")}
            assert set(sample.labels) >= {"job_name", "shard"}
            samples["".join([sample.name, *labels.values()])] = sample.value
    return samples


def test_what_a_run_comes_to_is_in_the_file(tmp_path):
    prom = tmp_path / "metrics" / "run.prom"
    job = load_job(write_job(tmp_path, PROMPTS, model=FAILING, run={"metrics": str(prom)}))
    summary = run_job(job, quiet=True).summary
    found = read(prom)
    assert found["overnight_answers_completed_total"] == summary["completed"] == 9
    assert found["overnight_answers_failed_total"] == found["overnight_errors_totalecho_failure"] == 3
    assert found["overnight_input_tokens_total"] == summary["total_input_tokens"]
    assert found["overnight_output_tokens_total"] == summary["total_output_tokens"]
    assert found["overnight_answers_wanted"] == 12 and found["overnight_slots"] > 0
    assert (found["overnight_running"], found["overnight_exit_code"], found["overnight_slots_in_use"]) == (0, 3, 0)
    assert found["overnight_last_commit_timestamp_seconds"] > 1.7e9
    assert not list(prom.parent.glob("*.prom.*")), "a file on its way is left"
    before = prom.read_bytes()
    run_job(job, quiet=True)
    assert prom.read_bytes() == before, "a finished run was done again"


def test_a_run_under_way_and_a_stopped_one_are_told_apart(tmp_path):
    prom = tmp_path / "run.prom"
    slow = {"engine": "echo", "echo": {"delay": "400ms"}}
    process = start("run", write_job(tmp_path, PROMPTS, model=slow, run={"metrics": str(prom)}))
    wait_until(lambda: is_generating(tmp_path) and read(prom)["overnight_answers_completed_total"] > 0)
    found = read(prom)
    assert found["overnight_running"] == 1 and "overnight_exit_code" not in found
    assert found["overnight_slots_in_use"] > 0
    assert kill_after(process, 0, signal.SIGTERM) == 75
    found = read(prom)
    assert (found["overnight_running"], found["overnight_exit_code"]) == (0, 75)


def test_each_shard_has_a_file_that_the_exporter_reads(tmp_path):
    assert metrics_path(Path("a/run.prom"), Shard(2, 4)) == Path("a/run.shard-2-of-4.prom")
    job = load_job(write_job(tmp_path, PROMPTS, run={"metrics": str(tmp_path / "run.prom")}))
    run_job(job, shard=Shard(1, 2), quiet=True)
    assert 'shard="1/2"' in (tmp_path / "run.shard-1-of-2.prom").read_text()


def test_metrics_that_cannot_be_written_are_told_once_and_cost_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    told = []
    metrics = Metrics(tmp_path / "file" / "run.prom", {"job_name": "j", "shard": ""}, told.append)
    metrics.begin(1, 1, Tally(), [])
    metrics.end(0)
    assert len(told) == 1 and "cannot be written" in told[0]
    job = write_job(tmp_path, PROMPTS, run={"metrics": str(tmp_path / "file" / "run.prom")})
    assert overnight("run", job).returncode == 0
