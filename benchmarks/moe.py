"""Loading and batched decoding of a mixture of experts, ours or stock: a line of JSON for each figure.

    python benchmarks/moe.py DIRECTORY [--stock] [--int8] [--load-strategy no-gpu] [--gpu-memory 16GB]
                             [--batches 1 8 64 256] [--prompt-tokens 8] [--repeats 3]

Stock is transformers with auto-round, whose kernels are those of auto-round-lib where that can be imported. Prefill is
a run of one new token each, decoding what a longer run takes beyond it; the median of the repeats counts.
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
from pipeline.plan.plan import make_plan
from pipeline.probe import probe_machine
from pipeline.records import Item, Request, Settings
from pipeline.spec.keys import JobSpec

_FEW, _MANY = 1, 9  # new tokens of the shorter and the longer run


def _requests(batch: int, prompt_tokens: int, num_tokens: int) -> list[Request]:
    settings = Settings(max_new_tokens=num_tokens, ignore_eos=True)
    prompts = [tuple((7 * row + place) % 500 for place in range(prompt_tokens)) for row in range(batch)]
    return [
        Request(item=Item(index=row, file="", line=row + 1, offset=0), sample=0, token_ids=ids, settings=settings)
        for row, ids in enumerate(prompts)
    ]


def _ours(model: Any, tokenizer: Any, batch: int, prompt_tokens: int, step_tokens: int) -> Callable[[int], None]:
    from pipeline.engines.transformers import open_engine

    engine = open_engine(
        model,
        tokenizer,
        thinking=None,
        slots=max(2, batch),
        cache_tokens=batch * (prompt_tokens + _MANY),
        step_tokens=step_tokens,
        report=print,
    )
    return lambda num_tokens: list(engine.generate(iter(_requests(batch, prompt_tokens, num_tokens)))) and None


def _stock(model: Any, _tokenizer: Any, batch: int, prompt_tokens: int, _step_tokens: int) -> Callable[[int], None]:
    import torch

    ids = torch.tensor([request.token_ids for request in _requests(batch, prompt_tokens, 1)], device=model.device)

    def run(num_tokens: int) -> None:
        with torch.inference_mode():
            model.generate(ids, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, pad_token_id=0)

    return run


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--int8", action="store_true", help="model.activation: int8")
    parser.add_argument("--load-strategy", default="no-gpu", choices=["no-gpu", "min-gpu", "max-gpu"])
    parser.add_argument("--gpu-memory")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--prompt-tokens", type=int, default=8)
    given = parser.parse_args()
    spec = JobSpec.model_validate(
        {
            "model": {
                "path": str(given.directory),
                "load_strategy": given.load_strategy,
                "gpu_memory": given.gpu_memory,
                "activation": "int8" if given.int8 else "exact",
            },
            "input": {"path": "none"},
            "output": {"path": "none.jsonl"},
            "generation": {"max_new_tokens": 32},
        }
    )
    plan = make_plan(spec, probe_machine(), read_facts(given.directory))
    loaded = load_model(replace(plan, weights="stock", plain_kernel=False) if given.stock else plan)
    loading = {"load_s": loaded.load_s, "weight_bytes": loaded.weight_bytes, "peak_bytes": loaded.peak_host_bytes}
    placed = {"load_strategy": plan.load_strategy, "expert_layers_on_gpus": plan.expert_layers_on_gpus}
    print(json.dumps({"stock": given.stock, "dtype": plan.dtype} | placed | loading), flush=True)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(given.directory)
    for batch in given.batches:
        run = (_stock if given.stock else _ours)(loaded.model, tokenizer, batch, given.prompt_tokens, plan.step_tokens)
        run(_MANY)
        rates, prefills = [], []
        for _ in range(given.repeats):
            took = []
            for num_tokens in (_FEW, _MANY):
                began = time.perf_counter()
                run(num_tokens)
                took.append(time.perf_counter() - began)
            rates.append(batch * (_MANY - _FEW) / (took[1] - took[0]))
            prefills.append(batch * given.prompt_tokens / took[0])
        rate, prefill = (round(statistics.median(found), 2) for found in (rates, prefills))
        figures = {"batch": batch, "decode_tokens_per_s": rate, "prefill_tokens_per_s": prefill}
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
