"""`overnight plan`: the input is counted, what will be refused is named, and the time and the cost are foretold."""

import json

import pytest

from pipeline import load_job, run_job
from pipeline.ledger.journal import read_journal
from pipeline.tools.plan import plan_job
from tests.command import overnight, write_job

ECHO = {"engine": "echo", "echo": {"delay": "20ms"}}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OVERNIGHT_CACHE", str(tmp_path / "cache"))


def prompts(count):
    return [{"prompt": "word " * (1 + number % 7)} for number in range(count)]


def test_all_lines_are_counted_where_they_are_few(tmp_path):
    report = plan_job(load_job(write_job(tmp_path, prompts(70))))
    lengths = [len("word " * (1 + number % 7)) for number in range(70)]
    told = report.to_json()["input"]
    assert told["stats"] == {"num_items": 70, "num_tokens_mean": sum(lengths) / 70, "num_tokens_max": 35}
    assert told["num_tokens"] == sum(lengths) and told["num_sampled"] == told["num_lines"] == 70
    for each in told["histogram"]:
        assert each["count"] == sum(each["from"] <= length <= each["to"] for length in lengths)
    assert report.first_prompt == "word " and "| word" in str(report)


@pytest.mark.parametrize("sample", [1, 7, 99, 700])
def test_a_sample_is_spread_evenly_and_says_that_it_is_one(tmp_path, sample):
    report = plan_job(load_job(write_job(tmp_path, prompts(700))), sample=sample)
    told = report.to_json()["input"]
    assert told["num_sampled"] == report.census.num_encoded == sample and told["stats"]["num_items"] == 700
    assert ("evenly spread" in str(report)) == (sample < 700)
    if sample >= 99:  # every length as often as in the whole
        assert told["stats"]["num_tokens_mean"] == pytest.approx(20, rel=0.05)


def test_what_will_be_refused_is_found_in_every_line_whatever_the_sample(tmp_path):
    lines = [*prompts(50), b"{bad", {"prompt": "x" * (1 << 20)}, {"text": "no prompt"}, *prompts(50)]
    report = plan_job(load_job(write_job(tmp_path, lines)), sample=1)  # the first
    told = report.to_json()["input"]
    assert told["rejected"] == {"invalid_json": 1, "prompt_too_long": 1, "missing_field": 1}
    assert [each["line"] for kind in sorted(told["refused"]) for each in told["refused"][kind]] == [51, 53, 52]
    assert told["stats"]["num_items"] == 100
    assert "in.jsonl, line 51" in str(report) and "3 lines will be answered with an error" in str(report)


def test_without_a_speed_the_time_is_unknown_and_the_way_to_it_is_named(tmp_path):
    job = write_job(tmp_path, prompts(10))
    report = plan_job(load_job(job), price_per_hour=2.0)
    assert report.forecast is None and report.cost is None
    assert "--measure" in str(report) and "cost: unknown" in str(report)


def test_a_run_teaches_the_next_plan_and_the_next_run(tmp_path):
    job = write_job(tmp_path, prompts(120), model=ECHO)
    first = run_job(load_job(job), quiet=True)
    duration = first.summary["duration"]
    report = plan_job(load_job(job), price_per_hour=3600.0)
    assert report.forecast.generation_s.expected == pytest.approx(duration, rel=0.05)
    assert report.cost.expected == pytest.approx(report.forecast.total_s.expected)
    slower = {"engine": "echo", "echo": {"delay": "30ms"}}
    assert plan_job(load_job(write_job(tmp_path, prompts(120), model=slower))).forecast is None
    twice = write_job(tmp_path, prompts(240), model=ECHO)
    assert plan_job(load_job(twice)).forecast.generation_s.expected == pytest.approx(2 * duration, rel=0.05)
    run = overnight("run", job, "--set", f"output.path={tmp_path / 'again.jsonl'}", "--limit", "60")
    assert run.returncode == 0 and "time: about" in run.stderr
    records = [record for record, _ in read_journal(tmp_path / "again.jsonl.journal")]
    (loaded,) = [record for record in records if record["kind"] == "loaded"]
    expected = loaded["conditions"]["forecast"]["generation_s"]
    assert expected["low"] < json.loads((tmp_path / "again.jsonl.summary.json").read_text())["duration"]
    assert all(record["memory_bytes"] > 1 << 20 for record in records if record["kind"] == "commit")


def test_a_measurement_tells_the_time(tmp_path):
    job = write_job(tmp_path, prompts(64), model=ECHO, generation={"max_new_tokens": 16, "ignore_eos": True})
    plan = overnight("plan", job, "--measure", "--json", "--price-per-hour", "1.2")
    assert plan.returncode == 0, plan.stderr
    told = json.loads(plan.stdout)
    foretold = told["forecast"]["generation_s"]
    assert foretold["low"] < foretold["expected"] < foretold["high"]
    assert foretold["high"] > 64 * 0.02  # a busy machine may have been slower, none is faster
    assert told["cost"]["expected"] > 0 and "measuring" in plan.stderr


def test_an_input_without_a_good_line_has_no_time(tmp_path):
    report = plan_job(load_job(write_job(tmp_path, [b"{bad"])), measure=True)
    assert report.forecast is None and "no line that can be answered" in str(report)
    empty = plan_job(load_job(write_job(tmp_path, [])))
    assert empty.to_json()["input"]["stats"] is None


def test_validate_plan_and_run_tell_of_a_setting_beside_the_prompt(tmp_path):
    job = write_job(tmp_path, [{"prompt": "fine", "system": "Be brief."}] * 3)
    for command in ("validate", "plan", "run"):
        found = overnight(command, job)
        assert found.returncode == 0
        assert found.stderr.count('line 1: "system" beside the prompt') == found.stderr.count("beside") == 1, command
