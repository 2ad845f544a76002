"""Single steps of a model as the engine computes them: rows that decode with contexts of a length, and prompts alone.

    python benchmarks/step.py [MODEL] [--rows 1 8 16 64] [--places 300] [--alike 0] [--prompt-tokens 512] [--repeats 20]

MODEL is a directory or builtin:NAME; `builtin:smollm2-135m-bf16` without one. Medians and least of the repeats in
milliseconds; where other work shares the machine compare least with least.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from planned import planned

from pipeline.engines.packed_model import PackedModel
from pipeline.engines.slot_cache import Span
from pipeline.loading import load_model


def _time(what: str, num_tokens: int, step: Callable[[], Any], repeats: int) -> None:
    took: list[float] = []
    for number in range(repeats + 2):
        began = time.perf_counter()
        step()
        if number >= 2:
            took.append(time.perf_counter() - began)
    median, least = statistics.median(took), min(took)
    print(what, f"{median * 1e3:.1f}", f"{least * 1e3:.1f}", f"{num_tokens / median:.0f}", sep=" | ", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="builtin:smollm2-135m-bf16")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 64])
    parser.add_argument("--places", type=int, default=300, help="of each row's context")
    parser.add_argument("--alike", type=int, default=0, help="places that the contexts begin alike with, as steps know")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=20)
    given = parser.parse_args()
    plan = planned(given.model)
    rows, places, length = max(given.rows), given.places, given.prompt_tokens
    packed = PackedModel(load_model(plan).model, rows)
    print(f"{given.model}, {plan.dtype}, {torch.get_num_threads()} threads")
    print("step | median ms | least ms | tokens/s at the median")
    with torch.inference_mode():
        packed.fuse(range(100, 160))
        packed.resize(max(rows * places, length))
        # One context as a run would leave it, for all rows.
        first = Span(0, 0, places - 1, 0, 0)
        packed.forward([100 + place % 900 for place in range(places - 1)], [], [first], [places - 2])
        for row in range(1, rows):
            packed.copy(first, Span(row, 0, places - 1, row * places, 0), places - 1)
        for count in given.rows:
            decoding = [Span(row, row, 1, row * places, places - 1, 0, given.alike) for row in range(count)]
            step = partial(packed.forward, [7] * count, decoding, [], range(count))
            _time(f"{count} rows", count, step, given.repeats)
        prompt = Span(0, 0, length, 0, 0)
        ids = [100 + place % 900 for place in range(length)]
        _time(f"prompt of {length}", length, lambda: packed.forward(ids, [], [prompt], [length - 1]), given.repeats)


if __name__ == "__main__":
    main()
