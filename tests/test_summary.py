"""Tallies add up, quantiles are within their promise, and the summary says what the answers say."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.records import Completion, Item, ItemError, Timing, Usage
from pipeline.summary import Histogram, Session, Tally, summarize, timestamp

ITEM = Item(index=0, file="in.jsonl", line=1, offset=0)
durations = st.floats(min_value=1e-6, max_value=1e5)


def completion(queue_s: float, prefill_s: float, decode_s: float, num_tokens: int) -> Completion:
    return Completion(
        item=ITEM,
        sample=0,
        finish_reason="stop",
        text="x",
        usage=Usage(prompt_tokens=3, completion_tokens=num_tokens, reasoning_tokens=1),
        timing=Timing(started_at=0.0, queue_s=queue_s, prefill_s=prefill_s, decode_s=decode_s),
    )


completions = st.one_of(
    st.builds(completion, durations, durations, durations, st.integers(1, 1000)),
    st.sampled_from(["too_long", "invalid_json"]).map(lambda kind: Completion.failed(ITEM, 0, ItemError(kind, "why"))),
)


def tally_of(answers: list[Completion]) -> Tally:
    tally = Tally()
    for answer in answers:
        tally.add(answer)
    return tally


@given(st.lists(durations, min_size=1), st.floats(0, 1))
def test_quantiles_are_within_one_percent_of_an_observed_value(values: list[float], fraction: float) -> None:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    exact = sorted(values)[math.floor(fraction * (len(values) - 1))]
    assert histogram.quantile(fraction) == pytest.approx(exact, rel=0.0101)


@given(st.lists(completions), st.lists(completions))
def test_tallies_of_shards_add_up(left: list[Completion], right: list[Completion]) -> None:
    merged = tally_of(left)
    merged.merge(tally_of(right))
    whole = tally_of(left + right)
    assert merged.ttft.buckets == whole.ttft.buckets
    assert merged.e2el.sum == pytest.approx(whole.e2el.sum)
    merged.ttft.sum, merged.tpot.sum, merged.e2el.sum = whole.ttft.sum, whole.tpot.sum, whole.e2el.sum
    assert merged == whole


@given(st.lists(completions))
def test_a_tally_survives_json(answers: list[Completion]) -> None:
    tally = tally_of(answers)
    assert Tally.from_json(json.loads(json.dumps(tally.to_json()))) == tally


def test_the_summary_divides_by_the_generation_time_of_all_sessions() -> None:
    tally = tally_of([completion(0.1, 0.1, 1.8, 10), completion(0.1, 0.3, 3.6, 19)])
    tally.add(Completion.failed(ITEM, 0, ItemError("too_long", "why")))
    sessions = [
        Session(started_at=0.0, duration=4.0, load_s=1.5, completed=1, ended="killed"),
        Session(started_at=9.0, duration=6.0, load_s=1.5, completed=1, ended="finished"),
    ]
    summary = summarize(tally, sessions, {"job": "j", "engine": "echo"})
    assert (summary["completed"], summary["failed"]) == (2, 1)
    assert (summary["duration"], summary["load_s"]) == (10.0, 3.0)
    assert summary["output_throughput"] == 2.9
    assert summary["total_token_throughput"] == 3.5
    assert summary["request_throughput"] == 0.2
    assert summary["mean_e2el_ms"] == pytest.approx(3000)
    assert summary["mean_tpot_ms"] == pytest.approx(200)
    assert summary["mean_ttft_ms"] == pytest.approx(300)
    assert summary["errors"] == {"too_long": 1}
    assert [session["ended"] for session in summary["sessions"]] == ["killed", "finished"]
    assert summary["engine"] == "echo"


def test_a_summary_of_nothing_has_no_infinities() -> None:
    summary = summarize(Tally(), [], {"job": "empty"})
    assert summary["output_throughput"] == 0
    json.dumps(summary, allow_nan=False)


def test_timestamps_are_utc_with_milliseconds() -> None:
    assert timestamp(1767225600.0625) == "2026-01-01T00:00:00.062Z"
