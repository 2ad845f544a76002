"""Experts read from disk for every pass: what the plan says of it, and how long it says that will take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.make_checkpoint import make_checkpoint
from pipeline.engines.transformers import open_engine
from pipeline.facts.model_facts import ModelFacts, read_facts
from pipeline.forecast.forecast import Speed, Work
from pipeline.forecast.streaming import forecast_plan, forecast_streaming
from pipeline.loading import load_model
from pipeline.plan.placement import show_bytes
from pipeline.plan.plan import make_plan
from pipeline.plan.streaming import CHECK_PASSES, WIDE_STEP_TOKENS, Streaming
from tests.model_files import FLAGSHIP
from tests.test_packed_loading import CONFIGS, plan_of
from tests.test_plan import decision, job, machine

GB = 1_000_000_000


@pytest.fixture(scope="module")
def flagship() -> ModelFacts:
    return read_facts(FLAGSHIP)


def test_the_disk_tells_how_long_a_pass_takes(flagship: ModelFacts) -> None:
    assumed = make_plan(job(load_strategy="no-gpu"), machine(24), flagship)
    measured = make_plan(job(load_strategy="no-gpu"), replace(machine(24), disk_read_bytes_per_s=500_000_000), flagship)
    assert assumed.streaming is not None
    assert measured.streaming is not None
    layer = flagship.part("experts").disk_bytes // 48
    assert measured.streaming.bytes_per_pass == measured.num_streamed_layers * layer
    assert measured.streaming.pass_s == pytest.approx(2 * assumed.streaming.pass_s)
    assert "0.50 GB/s of this disk" in decision(measured, "experts")[1]
    assert "1.00 GB/s (assumed" in decision(assumed, "experts")[1]
    assert measured.step_tokens > make_plan(job(load_strategy="no-gpu"), machine(64), flagship).step_tokens
    assert make_plan(job(load_strategy="no-gpu"), machine(64), flagship).streaming is None


@pytest.mark.parametrize(
    ("asked", "memory_gib", "gpus", "made"),
    [
        ("auto", 64, (), "beside"),
        ("auto", 24, (), "never"),
        ("off", 64, (), None),
        ("some/where", 64, (), "first"),
        ("some/where", 24, (), "first"),
        ("auto", 64, (16,), None),
    ],
)
def test_weights_are_kept_repacked_where_that_helps(
    asked: str, memory_gib: float, gpus: tuple[float, ...], made: str | None, flagship: ModelFacts
) -> None:
    plan = make_plan(job(repack_cache=asked), machine(memory_gib, *gpus), flagship)
    assert (None if plan.repack_cache is None else plan.repack_cache.made) == made
    if plan.repack_cache is not None:
        value, reason = decision(plan, "repacked weights")
        assert value == show_bytes(plan.repack_cache.num_bytes)
        assert plan.repack_cache.directory in reason
        assert Path(plan.repack_cache.directory).is_absolute()
        assert plan.repack_cache.num_bytes == pytest.approx(flagship.disk_bytes, rel=0.05)


def work(num_answers: int, prompt_tokens: int, new_tokens: int, slots: int, *, exact: bool = True) -> Work:
    return Work(
        num_answers=num_answers,
        prompt_tokens=num_answers * prompt_tokens,
        most_output_tokens=num_answers * new_tokens,
        slots=slots,
        lengths_of="x",
        exact_lengths=exact,
    )


DISK = Streaming(bytes_per_pass=36 * GB, bytes_once=7 * GB, bytes_per_s=2 * GB, is_measured=True)  # 18 s a pass


@pytest.mark.parametrize(
    ("asked", "passes"),
    [
        (work(32, 20, 8, 64), 1 + 7),  # all prompts in one step, which gives the first token
        (work(64, 100, 8, 64), 4 + 7),  # 6,400 tokens of prompts in steps of 2,048
        (work(640, 20, 100, 64), 7 + 999),  # ten fillings of the slots
    ],
)
def test_the_time_is_that_of_the_passes(asked: Work, passes: int) -> None:
    forecast = forecast_streaming(asked, DISK)
    assert WIDE_STEP_TOKENS == 2048
    assert forecast.generation_s.expected == pytest.approx(18 * passes)
    assert forecast.generation_s.low < forecast.generation_s.expected < forecast.generation_s.high
    assert forecast.load_s == pytest.approx(3.5 + 18 * CHECK_PASSES)
    assert f"{passes} passes, each of which reads 36.0 GB" in forecast.reason
    assert "2.00 GB/s (measured)" in forecast.reason


def test_answers_that_may_end_early_may_take_less() -> None:
    forecast = forecast_streaming(work(32, 20, 64, 32, exact=False), DISK)
    assert forecast.generation_s.low < 18 * 2
    assert forecast.generation_s.expected == pytest.approx(18 * 64)
    assert "if answers have the greatest length" in forecast.reason


def test_what_was_once_measured_goes_before_the_disk(flagship: ModelFacts) -> None:
    plan = make_plan(job(load_strategy="no-gpu"), machine(24), flagship)
    values: dict[str, Any] = {"measured_at": 0.0, "source": "run", "num_answers": 32, "prompt_tokens": 640}
    speed = Speed(
        **values, output_tokens=256, concurrency=32, generation_s=99.0, prefill_s=None, load_s=1.0, lengths_of="x"
    )
    told = forecast_plan(work(32, 20, 8, 32), plan, [speed])
    assert told is not None
    assert told.num_speeds == 1
    told = forecast_plan(work(32, 20, 8, 32), plan, [])
    assert told is not None
    assert "GB of experts" in told.reason
    in_memory = make_plan(job(load_strategy="no-gpu"), machine(64), flagship)
    assert forecast_plan(work(32, 20, 8, 32), in_memory, []) is None


def test_the_check_at_the_beginning_takes_as_many_passes_as_the_plan_says(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, CONFIGS["qwen3-next"])
    loaded = load_model(plan_of(directory, num_streamed_layers=4))
    passes: list[int] = []
    first: Any = loaded.model.model.layers[0]  # type: ignore[union-attr]
    first.mlp.experts.register_forward_pre_hook(lambda *_: passes.append(1))
    from transformers import AutoTokenizer

    reports: list[str] = []
    tokenizer = AutoTokenizer.from_pretrained(directory)
    open_engine(loaded.model, tokenizer, thinking=None, slots=2, cache_tokens=64, report=reports.append)
    assert reports == []
    assert len(passes) == CHECK_PASSES


def test_a_check_that_looks_at_another_sequence_would_be_seen(tmp_path: Path) -> None:
    """The prompts of the check differ in the tokens that follow them, so that rows that are mixed up are noticed."""
    from pipeline.engines import self_check
    from pipeline.engines.packed_model import PackedModel

    directory = make_checkpoint(tmp_path, CONFIGS["dense"])
    model: Any = load_model(plan_of(directory)).model
    packed = PackedModel(model, 2)
    ids = list(range(3, 30))
    good, rounding = self_check.difference_by_packing(model, packed, ids)
    assert good <= rounding
    forward = packed.forward
    packed.forward = lambda *given: forward(*given).flip(0)  # type: ignore[method-assign]
    bad, rounding = self_check.difference_by_packing(model, packed, ids)
    assert bad > rounding


torch.set_num_threads(1)
