"""The time of a job from the speeds of others: right about itself, and never outside what the past allows."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.forecast.forecast import Estimate, Speed, Work, make_forecast, show_duration
from pipeline.forecast.speeds import SpeedBook

SPEED = Speed(
    measured_at=0.0,
    source="run",
    num_answers=100,
    prompt_tokens=5_000,
    output_tokens=8_000,
    concurrency=64,
    generation_s=40.0,
    prefill_s=None,
    load_s=3.0,
    lengths_of="chat",
)
WORK = Work(num_answers=100, prompt_tokens=5_000, most_output_tokens=25_600, slots=64, lengths_of="chat")


def test_the_same_work_takes_the_same_time():
    forecast = make_forecast(WORK, [SPEED])
    assert forecast.generation_s.expected == pytest.approx(40.0)
    assert forecast.generation_s.low < 40.0 < forecast.generation_s.high < 50.0
    assert forecast.load_s == 3.0 and forecast.output_tokens == Estimate(8_000, 8_000, 8_000)
    assert forecast.total_s.expected == pytest.approx(43.0)


def test_twice_the_work_takes_twice_as_long():
    forecast = make_forecast(replace(WORK, num_answers=200, prompt_tokens=10_000, most_output_tokens=51_200), [SPEED])
    assert forecast.generation_s.expected == pytest.approx(80.0)


counts = st.integers(1, 10_000)


@given(st.floats(0, 1), st.floats(1e-5, 1), counts, counts, counts, counts)
def test_whatever_a_token_costs_the_truth_is_within(share, output_s, prompt, output, more_prompt, more_output):
    """A token of a prompt costs any part of one of an answer; the past run does not tell which."""
    prompt_s = share * output_s
    past = replace(
        SPEED, prompt_tokens=prompt, output_tokens=output, generation_s=prompt * prompt_s + output * output_s
    )
    work = replace(WORK, prompt_tokens=more_prompt, most_output_tokens=more_output, exact_lengths=True)
    truth = more_prompt * prompt_s + more_output * output_s
    forecast = make_forecast(work, [past])
    assert forecast.generation_s.low <= truth * (1 + 1e-9) and truth <= forecast.generation_s.high * (1 + 1e-9)


@given(st.integers(1, 256), st.integers(1, 256), st.floats(0, 1))
def test_whatever_more_sequences_bring_the_truth_is_within(then, now, gain):
    """n times the sequences make a batch between not at all and n times as fast."""
    speedup = (now / then) ** gain
    forecast = make_forecast(replace(WORK, slots=now, num_answers=1000), [replace(SPEED, concurrency=then)])
    same = make_forecast(replace(WORK, slots=then, num_answers=1000), [replace(SPEED, concurrency=then)])
    truth = same.generation_s.expected / speedup
    assert forecast.generation_s.low <= truth <= forecast.generation_s.high


def test_prefill_measured_apart_leaves_only_noise():
    past = replace(SPEED, source="bench", prefill_s=10.0)  # 2 ms a token of a prompt, 30 s for 7,900 more
    work = replace(WORK, prompt_tokens=50_000, most_output_tokens=7_900, exact_lengths=True)
    forecast = make_forecast(work, [past])
    assert forecast.generation_s.expected == pytest.approx(100.0 + 30.0)
    assert forecast.generation_s.high / forecast.generation_s.low < 1.4
    vague = make_forecast(work, [SPEED])
    assert vague.generation_s.high / vague.generation_s.low > 1.4


def test_a_speed_that_says_much_silences_those_that_say_little():
    exact = replace(SPEED, source="bench", prefill_s=10.0)
    work = replace(WORK, prompt_tokens=50_000, most_output_tokens=7_900, exact_lengths=True)
    assert make_forecast(work, [SPEED, exact, SPEED]).num_speeds == 1


def test_lengths_nobody_knows_are_the_greatest():
    forecast = make_forecast(replace(WORK, lengths_of="another job"), [SPEED])
    assert forecast.output_tokens.expected == forecast.output_tokens.high == 25_600
    assert "nothing tells how long" in forecast.reason


def test_lengths_are_never_longer_than_allowed():
    forecast = make_forecast(replace(WORK, most_output_tokens=1_000), [SPEED])
    assert forecast.output_tokens.high == 1_000


def test_nothing_is_said_without_a_speed_or_without_work():
    assert make_forecast(WORK, []) is None
    assert make_forecast(replace(WORK, num_answers=0), [SPEED]) is None


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (42.4, "42 s"),
        (425, "7 min 5 s"),
        (1800, "30 min"),
        (11_520, "3 h 12 min"),
        (7200, "2 h"),
    ],
)
def test_durations_are_shown_for_people(seconds, shown):
    assert show_duration(seconds) == shown


def test_speeds_are_kept_by_model_machine_and_versions(tmp_path, monkeypatch):
    monkeypatch.setenv("OVERNIGHT_CACHE", str(tmp_path))
    key, versions = [("model", "m"), ("cores", "2")], {"torch": "2"}
    SpeedBook(key, versions).write(SPEED)
    assert SpeedBook(key, versions).read() == (SPEED,)
    assert SpeedBook(key, {"torch": "3"}).read() == SpeedBook([("model", "n"), ("cores", "2")], versions).read() == ()
    for number in range(30):
        SpeedBook(key, versions).write(replace(SPEED, load_s=float(number)))
    assert [speed.load_s for speed in SpeedBook(key, versions).read()] == list(map(float, range(10, 30)))
    assert len(list((tmp_path / "speeds").iterdir())) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"key": {"model": "m"}, "speeds": [{"load_s": "x"}]}'])
def test_a_spoilt_file_of_speeds_is_as_good_as_none(tmp_path, monkeypatch, text):
    monkeypatch.setenv("OVERNIGHT_CACHE", str(tmp_path))
    book = SpeedBook([("model", "m")], {})
    book.write(SPEED)
    (path,) = (tmp_path / "speeds").iterdir()
    path.write_text(text)
    assert book.read() == ()
    book.write(SPEED)
    assert book.read() == (SPEED,) and json.loads(path.read_text())["key"] == {"model": "m"}


def test_a_cache_that_cannot_be_written_costs_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("OVERNIGHT_CACHE", str(tmp_path / "file"))
    SpeedBook([], {}).write(SPEED)
    assert SpeedBook([], {}).read() == () and [path.name for path in tmp_path.iterdir()] == ["file"]
