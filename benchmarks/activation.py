"""What `model.activation: int8` does to a packed model's scores: the same weights and texts, exact and rounded.

    python benchmarks/activation.py JOB.yaml [--limit 32]

The job's prompts are computed whole. For each of their tokens: whether the likeliest next token is the same, the
Kullback-Leibler divergence of the next token's distribution in nats, and the share of time that rounding saves.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from pipeline import talk
from pipeline.engines import choose_engine
from pipeline.facts.model_facts import read_facts
from pipeline.loading import load_model
from pipeline.loading.packed_modules import QuantizedExperts, QuantizedLinear
from pipeline.loading.resolve import find_model
from pipeline.plan.plan import make_plan
from pipeline.probe import probe_machine
from pipeline.records import Prompt, Request
from pipeline.source.inputs import expand_inputs
from pipeline.source.line_parser import LineParser
from pipeline.source.lines import read_lines
from pipeline.spec.job_file import load_spec


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("--limit", type=int, default=32)
    given = parser.parse_args()
    spec = load_spec(given.job, overrides=["model.activation=int8", "model.load_strategy=no-gpu"])
    facts = read_facts(find_model(spec.model, config_only=False, report=talk.say))
    plan = make_plan(spec, probe_machine(), facts)
    encode = choose_engine(spec, plan, facts).encoder().encode
    model = load_model(plan).model
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear | QuantizedExperts)]

    def scores(request: Request, *, int8: bool) -> tuple[Any, float]:
        for layer in layers:
            layer.int8 = int8
        began = time.perf_counter()
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([request.token_ids])).logits[0]
        return logits.float().log_softmax(-1), time.perf_counter() - began

    lines = read_lines(tuple(expand_inputs(spec.input.path)), max_line_bytes=spec.input.max_line)
    prompts = (prompt for prompt in map(LineParser(spec).parse, lines) if isinstance(prompt, Prompt))
    tokens, same, nats, exact_s, int8_s = 0, 0, 0.0, 0.0, 0.0
    for prompt in islice(prompts, given.limit):
        request = encode(prompt)
        if isinstance(request, Request):
            (exact, took), (rounded, took_rounded) = scores(request, int8=False), scores(request, int8=True)
            tokens, exact_s, int8_s = tokens + len(exact), exact_s + took, int8_s + took_rounded
            same += int((exact.argmax(-1) == rounded.argmax(-1)).sum())
            nats += float((exact.exp() * (exact - rounded)).sum())
    print(
        json.dumps(
            {"tokens": tokens, "same_choice": same / tokens, "nats": nats / tokens, "time_saved": 1 - int8_s / exact_s}
        )
    )


if __name__ == "__main__":
    main()
