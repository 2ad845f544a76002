"""How long a job takes whose experts are read from disk for every pass: told by the disk, before anything has run."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from pipeline.forecast.forecast import Estimate, Forecast, Speed, Work, make_forecast
from pipeline.plan.plan import Plan
from pipeline.plan.streaming import WIDE_STEP_TOKENS, Streaming

_NOISE = 0.25  # disks that others use too


def forecast_plan(work: Work, plan: Plan, speeds: Sequence[Speed]) -> Forecast | None:
    """From past runs where there are some, else from the disk where it is what bounds the plan; None where neither."""
    forecast = make_forecast(work, speeds)
    if forecast is None and plan.streaming is not None and work.num_answers:
        return forecast_streaming(work, plan.streaming)
    return forecast


def forecast_streaming(work: Work, streaming: Streaming) -> Forecast:
    """The time of reading: one pass for so many tokens of prompts, and one for a token of each sequence under way.

    Arithmetic goes on beside it; what it takes beyond the reading is not foretold.
    """
    most = float(work.most_output_tokens)
    tokens = Estimate(most if work.exact_lengths else float(work.num_answers), most, most)
    prefill = ceil(work.prompt_tokens / WIDE_STEP_TOKENS)

    def seconds(output_tokens: float) -> float:
        return (prefill + ceil(output_tokens / work.concurrency) - 1) * streaming.pass_s

    passes = prefill + ceil(most / work.concurrency) - 1
    source = "measured" if streaming.is_measured else "assumed"
    lengths = "" if work.exact_lengths else ", if answers have the greatest length"
    return Forecast(
        generation_s=Estimate(seconds(tokens.low) * (1 - _NOISE), seconds(most), seconds(most) * (1 + _NOISE)),
        load_s=streaming.load_s,
        prompt_tokens=work.prompt_tokens,
        output_tokens=tokens,
        num_speeds=0,
        reason=(
            f"{passes} passes{lengths}, each of which reads {streaming.bytes_per_pass / 1e9:.1f} GB of experts at "
            f"{streaming.bytes_per_s / 1e9:.2f} GB/s ({source}); arithmetic beside it may take longer"
        ),
    )
