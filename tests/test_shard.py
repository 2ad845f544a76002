"""Which part of an input is a shard's, what its files are called, and that a run answers that part and no other."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import load_job, run_job
from pipeline.compression import compression_of
from pipeline.errors import DataError, UsageError
from pipeline.source.shard import Shard, all_shards, run_output
from pipeline.tools.plan import plan_job
from pipeline.tools.status import job_status
from pipeline.tools.verify import verify_job
from tests.command import overnight, read_output, write_job


@given(st.integers(0, 10_000), st.integers(1, 300))
def test_shards_are_all_items_once_in_order_and_of_nearly_one_size(num_items, count):
    parts = [shard.items(num_items) for shard in all_shards(count)]
    assert [index for part in parts for index in part] == list(range(num_items))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_a_shard_reads_what_it_writes(number, count):
    if number <= count:
        assert Shard.parse(str(Shard(number, count))) == Shard(number, count)
    else:
        with pytest.raises(UsageError, match="I-th of N"):
            Shard.parse(f"{number}/{count}")


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/", "/4", "1/0", "a/b", "-1/4", "1/4/2", "1.0/4", ""])
def test_what_is_no_shard_is_wrong_usage(text):
    with pytest.raises(UsageError, match="write I/N"):
        Shard.parse(text)


def test_the_files_of_a_shard_keep_the_name_of_the_output_and_are_plain(tmp_path):
    assert run_output(Path("runs/x.jsonl.zst"), Shard(2, 4)) == Path("runs/x.jsonl.zst.shard-2-of-4")
    assert run_output(Path("runs/x.jsonl"), None) == Path("runs/x.jsonl")
    assert compression_of("runs/x.jsonl.zst.shard-2-of-4") is None


def test_a_shard_answers_its_items_with_their_own_indexes(tmp_path):
    job = write_job(tmp_path, [{"prompt": f"p {i}"} for i in range(10)], generation={"num_samples": 2})
    run = overnight("run", job, "--shard", "2/3")
    assert run.returncode == 0, run.stderr
    answers, summary = read_output(tmp_path / "out.jsonl.shard-2-of-3")
    assert [(answer["index"], answer["sample"]) for answer in answers] == [(i, s) for i in (3, 4, 5) for s in (0, 1)]
    assert summary["completed"] == 6
    again = overnight("run", job, "--shard", "2/3")
    assert again.returncode == 0 and "finished already" in again.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_of_more_shards_than_items_some_are_empty_and_done_at_once(tmp_path):
    load = load_job(write_job(tmp_path, [{"prompt": "one"}, {"prompt": "two"}]))
    outcomes = [run_job(load, shard=shard, quiet=True) for shard in all_shards(5)]
    assert [outcome.exit_code for outcome in outcomes] == [0] * 5
    assert [outcome.summary["completed"] for outcome in outcomes] == [0, 0, 1, 0, 1]


def test_a_limit_is_divided_too(tmp_path):
    load = load_job(write_job(tmp_path, [{"prompt": f"p {i}"} for i in range(10)]))
    outcome = run_job(load, shard=Shard(2, 2), limit=4, quiet=True)
    assert [answer["index"] for answer in read_output(outcome.output)[0]] == [2, 3]
    assert plan_job(load, shard=Shard(2, 2), limit=4).census.num_lines == 2
    assert plan_job(load, shard=Shard(4, 4)).census.num_lines == 3


def test_an_input_that_grew_is_refused_whatever_resume_says_for_its_shards_move(tmp_path):
    job = write_job(tmp_path, [{"prompt": f"p {i}"} for i in range(4)], run={"resume": "always"})
    run_job(load_job(job), shard=Shard(1, 2), quiet=True)
    with (tmp_path / "in.jsonl").open("a") as file:
        file.write('{"prompt": "more"}\n')
    with pytest.raises(DataError, match="the input has changed"):
        run_job(load_job(job), shard=Shard(1, 2), quiet=True)


def test_a_shard_of_another_division_is_not_taken_for_this_one(tmp_path):
    job = load_job(write_job(tmp_path, [{"prompt": f"p {i}"} for i in range(4)]))
    run_job(job, shard=Shard(1, 2), quiet=True)
    for path in tmp_path.glob("out.jsonl.shard-1-of-2*"):
        path.rename(path.with_name(path.name.replace("1-of-2", "1-of-4")))
    refused = overnight("run", tmp_path / "job.yaml", "--shard", "1/4")
    assert refused.returncode == 78
    assert '--shard: was "1/2" when the run began and is "1/4" now' in refused.stderr


def test_verify_retry_and_status_know_shards(tmp_path):
    lines = [{"prompt": f"p {i}"} for i in range(9)]
    job = write_job(tmp_path, lines, model={"engine": "echo", "echo": {"fail_every": 4}})
    load = load_job(job)
    for shard in (Shard(1, 3), Shard(3, 3)):
        run_job(load, shard=shard, quiet=True)
    problems = []
    found = verify_job(load, problems.append, shard=Shard(3, 3))
    assert not problems and (found.completed, found.failed) == (2, 1)
    retry = overnight("retry", job, "--shard", "3/3")
    assert retry.returncode == 3 and "1 failed" in retry.stderr
    assert job_status(load, Shard(3, 3)).run.state == "finished"
    assert job_status(load, Shard(2, 3)).run.state == "absent"
    all_of_them = job_status(load)
    assert all_of_them.counts == {"total": 9, "completed": 5, "failed": 1}
    assert "shard 2/3: absent" in str(all_of_them) and "2 finished, 1 absent" in str(all_of_them)
    told = json.loads(overnight("status", job, "--json").stdout)
    assert told["state"] == "stopped" and [each["state"] for each in told["shards"]] == [
        "finished",
        "absent",
        "finished",
    ]
    run_job(load, shard=Shard(2, 3), quiet=True)
    assert job_status(load).state == "finished" and "overnight merge" in str(job_status(load))
