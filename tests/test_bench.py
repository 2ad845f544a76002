"""The throughput of a job, what makes its figures count, and two results side by side."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import DataError, NotFoundError
from pipeline.records import Completion, Item, Timing, Usage
from pipeline.tools.bench import Benchmark, Result, compare
from pipeline.tools.contestant import Introduction, Pass, occupancy
from tests.command import overnight, write_job

INTRODUCTION = Introduction(
    engine="transformers",
    load_strategy="no-gpu",
    dtype="float32",
    weights="packed",
    slots=32,
    num_threads=2,
    load_s=1.0,
    num_requests=64,
    num_rejected=0,
    speed_key=(("model", "m"),),
)
WHOLE = Pass(
    duration_s=20.0,
    prompt_tokens=1000,
    output_tokens=2064,
    num_failed=0,
    slots=32,
    occupancy=0.97,
    answers_sha256="a",
    answer_digests=("x", "y"),
    peak_host_bytes=10**9,
)
PREFILL = replace(WHOLE, duration_s=4.0, output_tokens=64)


def result(wholes: list[Pass] | None = None, **changes: Any) -> Result:
    wholes = wholes or [WHOLE, replace(WHOLE, duration_s=20.1), replace(WHOLE, duration_s=19.9)]
    return Result(replace(INTRODUCTION, **changes), [PREFILL] * len(wholes), wholes)


def broken(found: Result) -> list[str]:
    return [rule.name for rule in found.rules() if not rule.holds]


def test_rates_are_those_of_the_median_pass_and_decoding_is_what_prefill_does_not_explain() -> None:
    found = result()
    assert found.output_throughput == pytest.approx(2064 / 20)
    assert found.prefill_throughput == pytest.approx(1000 / 4)
    assert found.decode_throughput == pytest.approx(2000 / 16)
    assert broken(found) == []


def test_a_benchmark_leaves_its_speed_for_the_next_plan() -> None:
    speed = result().speed("lengths")
    assert (speed.generation_s, speed.prefill_s) == (20.0, 4.0)
    assert (speed.prompt_tokens, speed.output_tokens, speed.concurrency) == (1000, 2064, 32)
    assert "speed_key" not in result().to_json()


def test_decoding_within_the_noise_has_no_rate() -> None:
    assert result([replace(WHOLE, duration_s=4.01)] * 3).decode_throughput is None


@pytest.mark.parametrize(
    ("found", "rule"),
    [
        (result([WHOLE, WHOLE]), "passes"),
        (result(num_requests=63), "requests"),
        (result([replace(WHOLE, slots=33)] * 3), "requests"),
        (result([replace(WHOLE, duration_s=9.0)] * 3), "duration"),
        (result([WHOLE, WHOLE, replace(WHOLE, duration_s=22.0)]), "spread"),
        (result([WHOLE, WHOLE, replace(WHOLE, num_failed=1)]), "failures"),
        (result(num_rejected=1), "failures"),
        (result([WHOLE, WHOLE, replace(WHOLE, answers_sha256="b")]), "answers"),
    ],
)
def test_each_rule_alone_makes_the_figures_invalid(found: Result, rule: str) -> None:
    assert broken(found) == [rule]
    benchmark = Benchmark({"job": "x"}, found, None)
    assert not benchmark.valid
    assert f"INVALID: {rule}: " in str(benchmark)


def test_a_baseline_gives_the_ratio_and_the_part_of_equal_answers() -> None:
    slower = [replace(WHOLE, duration_s=40.0, answer_digests=("x", "other"))] * 3
    benchmark = Benchmark({"job": "x"}, result(), result(slower, engine="stock"))
    value = benchmark.to_json()
    assert (value["ratio"], value["same_as_baseline"]) == (2.0, 0.5)
    assert value["baseline"]["engine"] == "stock"
    assert "2.00" in str(benchmark)


def answer(begin: float, seconds: float, queue_s: float = 0.0) -> Completion:
    timing = Timing(begin - queue_s, queue_s, seconds / 2, seconds / 2)
    return Completion(Item(0, "f", 1, 0), 0, "stop", "text", None, Usage(1, 1), timing)


def test_occupancy_leaves_out_waiting_and_the_tail() -> None:
    # Two slots: one busy all the time, the other from 5 to 10; the last request begins at 10 and runs to 1000.
    answers = [answer(0, 10), answer(5, 5, queue_s=5.0), answer(10, 990)]
    assert occupancy(answers, 2) == pytest.approx(0.75)
    assert occupancy([answer(0, 10)], 2) is None
    assert occupancy([], 2) is None


@given(
    st.integers(1, 5),
    st.lists(st.floats(0.5, 10), min_size=12, max_size=40),
)
def test_slots_that_are_refilled_at_once_are_all_occupied(slots: int, lengths: list[float]) -> None:
    free_at = [0.0] * slots
    answers: list[Completion] = []
    for seconds in lengths:
        slot = free_at.index(min(free_at))
        answers.append(answer(free_at[slot], seconds))
        free_at[slot] += seconds
    assert occupancy(answers, slots) == pytest.approx(1.0)


# --- the command


def test_the_command_measures_a_job_and_says_why_it_does_not_count(tmp_path: Path) -> None:
    job = write_job(tmp_path, [{"prompt": f"line {number}"} for number in range(40)], model={"echo": {"delay": "1ms"}})
    done = overnight("bench", job)
    value = json.loads(done.stdout)
    assert done.returncode == 3, done.stderr
    assert "INVALID: requests: 40, wanted at least 64; duration" in done.stderr
    assert (value["num_requests"], len(value["durations_s"]), value["valid"]) == (40, 3, False)
    assert value["output_throughput"] == pytest.approx(value["output_tokens"] / value["duration_s"], rel=0.01)
    assert value["duration_s"] > 0.04
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "job.yaml"]

    first, second = tmp_path / "first.json", tmp_path / "second.json"
    first.write_text(done.stdout)
    second.write_text(overnight("bench", job, "--set", "model.echo.delay=4ms").stdout)
    compared = overnight("bench", "--compare", first, second)
    assert compared.returncode == 0
    assert "slower" in compared.stdout
    assert "answers: the same" in compared.stdout
    assert f"{first} is INVALID" in compared.stdout


@pytest.mark.parametrize("words", [[], ["job.yaml", "--compare", "a.json", "b.json"]])
def test_a_job_or_two_results_but_not_both(words: list[str]) -> None:
    assert overnight("bench", *words).returncode == 64


def test_an_input_without_a_good_line_is_refused(tmp_path: Path) -> None:
    done = overnight("bench", write_job(tmp_path, [b"{"]))
    assert (done.returncode, done.stdout) == (65, "")
    assert "no line that can be answered" in done.stderr


def test_only_results_over_the_same_work_are_compared(tmp_path: Path) -> None:
    facts = {"job": "x", "input_sha256": "1", "spec_fingerprint": "2", "machine": "here"}
    one = Benchmark(facts, result(), None).to_json()
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    first.write_text(json.dumps(one))
    second.write_text(json.dumps(one | {"input_sha256": "other", "num_requests": 65}))
    with pytest.raises(DataError, match="input_sha256, num_requests differ"):
        compare(first, second)
    second.write_text(json.dumps(one | {"output_throughput": one["output_throughput"] * 1.2}))
    assert "faster (spread 1.0%)" in compare(first, second)
    second.write_text(json.dumps(one | {"output_throughput": one["output_throughput"] * 1.005}))
    assert "no difference beyond the spread" in compare(first, second)
    second.write_text("[]")
    with pytest.raises(DataError, match="no result"):
        compare(first, second)
    with pytest.raises(NotFoundError):
        compare(first, tmp_path / "none.json")


def test_stock_transformers_is_measured_in_turn_and_answers_alike(tmp_path: Path) -> None:
    lines = [{"prompt": f"number {number}"} for number in range(20)]
    lines[3]["generation"] = {"max_new_tokens": 3}  # type: ignore[assignment]
    job = write_job(
        tmp_path,
        lines,
        model={"engine": "transformers", "path": "builtin:tiny-qwen3-next"},
        thinking={"mode": "off"},
        generation={"max_new_tokens": 6, "ignore_eos": True},
    )
    done = overnight("bench", job, "--baseline", "stock", "--passes", "1")
    value = json.loads(done.stdout)
    assert value["baseline"]["engine"] == "stock"
    assert value["output_tokens"] == value["baseline"]["output_tokens"] == 19 * 6 + 3
    assert value["ratio"] == pytest.approx(
        value["output_throughput"] / value["baseline"]["output_throughput"], rel=0.01
    )
    # Random weights in bfloat16 are full of near ties; answers to other prompts would have none in common.
    assert value["same_as_baseline"] > 0.3

    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "generation": {"temperature": 1}}\n')
    refused = overnight("bench", job, "--baseline", "stock")
    assert refused.returncode == 78
    assert "in.jsonl:1: is not greedy" in refused.stderr
