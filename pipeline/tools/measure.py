"""A short measurement of how fast a job's model is here: it is loaded, and computes a few steps of a full batch."""

from __future__ import annotations

import time
from collections.abc import Callable

from pipeline.forecast.census import Census
from pipeline.forecast.forecast import Speed
from pipeline.plan.plan import Plan
from pipeline.spec.keys import JobSpec
from pipeline.tools.contestant import Contestant

_MOST_PROMPT_TOKENS = 16_384  # in all: seconds with a small model, a minute with one of 80 billion parameters
_STEPS = 16  # of decoding; with them a step's time is known to a few percent


def measure_speed(spec: JobSpec, plan: Plan, census: Census, say: Callable[[str], None]) -> Speed:
    """Load the model in a process of its own, warm it up, and time the prompts alone and with a few tokens each.

    `census` must have a good line. Raises what loading raises.
    """
    mean = census.num_tokens / census.num_encoded
    limit = max(1, min(plan.slots, census.num_lines, round(_MOST_PROMPT_TOKENS / mean)))
    generation = spec.generation.model_copy(update={"max_new_tokens": _STEPS + 1, "num_samples": 1, "ignore_eos": True})
    short = spec.model_copy(update={"generation": generation})
    say(f"measuring: loading the model, then {_STEPS} steps of {limit} sequences")
    with Contestant(short, limit=limit, stock=False) as contestant:
        contestant.measure("warm-up")
        prefill, whole = contestant.measure("prefill"), contestant.measure("whole")
        introduction = contestant.introduction
    return Speed(
        measured_at=time.time(),
        source="measurement",
        num_answers=introduction.num_requests,
        prompt_tokens=whole.prompt_tokens,
        output_tokens=whole.output_tokens,
        concurrency=min(whole.slots, introduction.num_requests),
        generation_s=whole.duration_s,
        prefill_s=prefill.duration_s,
        load_s=introduction.load_s,
        lengths_of=None,
    )
