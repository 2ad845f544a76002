"""Decoding with recurrent layers: our slots against transformers' `generate` on the same weights in one process.

    python benchmarks/delta_net.py [DIRECTORY] [--slots 32] [--repeats 5] [--weights unpacked]

DIRECTORY is a model; without one `builtin:tiny-qwen3-next` is taken. A rate is what a longer run takes beyond a shorter
one, so that prefill and warm-up cancel out; the median of the repeats, which alternate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.facts.model_facts import read_facts
from pipeline.loading import load_model
from pipeline.loading.builtin import prepare_builtin
from pipeline.plan.plan import make_plan
from pipeline.probe import probe_machine
from pipeline.records import Item, Request, Settings
from pipeline.spec.keys import JobSpec

_PROMPT_TOKENS = 16
_FEW = 4


def _prompts(count: int) -> list[tuple[int, ...]]:
    return [tuple((11 * row + 3 * place) % 500 for place in range(_PROMPT_TOKENS)) for row in range(count)]


def _requests(prompts: list[tuple[int, ...]], num_tokens: int) -> list[Request]:
    settings = Settings(max_new_tokens=num_tokens, ignore_eos=True)
    return [
        Request(item=Item(index=row, file="", line=row + 1, offset=0), sample=0, token_ids=ids, settings=settings)
        for row, ids in enumerate(prompts)
    ]


def _stock(model: Any, prompts: list[tuple[int, ...]], num_tokens: int) -> None:
    import torch

    ids = torch.tensor(prompts)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
    )


def _seconds_a_token(run: Callable[[int], Any], num_rows: int, many: int) -> float:
    took = []
    for num_tokens in (_FEW, many):
        began = time.perf_counter()
        run(num_tokens)
        took.append(time.perf_counter() - began)
    return (took[1] - took[0]) / (many - _FEW) / num_rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=36)
    parser.add_argument("--weights", choices=["packed", "unpacked"], help="not as the plan has it")
    given = parser.parse_args()
    directory = given.directory or prepare_builtin("tiny-qwen3-next")
    spec = JobSpec.model_validate(
        {
            "model": {"path": str(directory), "load_strategy": "no-gpu"},
            "input": {"path": "none"},
            "output": {"path": "none.jsonl"},
            "generation": {"max_new_tokens": 64},
        }
    )
    plan = make_plan(spec, probe_machine(), read_facts(directory))
    plan = replace(plan, weights=given.weights or plan.weights)
    model = load_model(plan).model
    from transformers import AutoTokenizer

    from pipeline.engines.transformers import open_engine

    engine = open_engine(
        model,
        AutoTokenizer.from_pretrained(directory),
        thinking=None,
        slots=given.slots,
        cache_tokens=given.slots * (_PROMPT_TOKENS + given.tokens),
        report=print,
    )
    prompts = _prompts(given.slots)
    kinds: dict[str, tuple[Callable[[int], Any], int]] = {
        "ours": (lambda n: list(engine.generate(iter(_requests(prompts, n)))), given.slots),
        "stock, one by one": (lambda n: _stock(model, prompts[:1], n), 1),
        "stock, a batch": (lambda n: _stock(model, prompts, n), given.slots),
    }
    for run, _ in kinds.values():
        run(_FEW)
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(given.repeats):
        for kind, (run, num_rows) in kinds.items():
            found[kind].append(_seconds_a_token(run, num_rows, given.tokens))
    medians = {kind: statistics.median(values) for kind, values in found.items()}
    print(json.dumps({"slots": given.slots, "dtype": plan.dtype, "weights": plan.weights}))
    for kind, seconds in medians.items():
        print(f"{kind}: {1 / seconds:.1f} tokens/s, ours is {seconds / medians['ours']:.2f} times as fast")


if __name__ == "__main__":
    main()
