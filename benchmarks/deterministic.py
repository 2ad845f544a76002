"""What deterministic answers cost: the same requests by both kinds of engine on the same weights, in turn.

    python benchmarks/deterministic.py [MODEL] [--slots 64] [--prompt-tokens 40] [--new-tokens 32] [--repeats 3]

MODEL is a directory or builtin:NAME; `builtin:smollm2-135m-bf16` without one. Prints medians, and whether the answers
are the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from planned import planned

from pipeline.engines.transformers import open_deterministic_engine, open_engine
from pipeline.loading import load_model
from pipeline.records import Item, Request, Settings


def _requests(count: int, num_prompt: int, num_new: int) -> list[Request]:
    settings = Settings(max_new_tokens=num_new, ignore_eos=True)
    return [
        Request(
            item=Item(index=row, file="", line=row + 1, offset=0),
            sample=0,
            token_ids=tuple(100 + (17 * row + 7 * place * (1 + row % 5)) % 900 for place in range(num_prompt)),
            settings=settings,
        )
        for row in range(count)
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="builtin:smollm2-135m-bf16")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=40)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    plan = planned(given.model)
    model = load_model(plan).model
    from transformers import AutoTokenizer

    # Its library leaves the type open.
    tokenizer: Any = AutoTokenizer.from_pretrained(plan.model_dir)  # pyright: ignore[reportUnknownMemberType]
    room = given.slots * (given.prompt_tokens + given.new_tokens)
    options: dict[str, Any] = {"thinking": None, "slots": given.slots, "cache_tokens": room, "report": print}
    engines = {"normal": open_engine, "deterministic": open_deterministic_engine}
    opened = {kind: engine(model, tokenizer, **options) for kind, engine in engines.items()}
    took: dict[str, dict[int, list[float]]] = {kind: {1: [], given.new_tokens: []} for kind in opened}
    texts: dict[str, list[str | None]] = {}
    for number in range(given.repeats + 1):
        for kind, engine in opened.items():
            for num_new in (1, given.new_tokens):
                began = time.perf_counter()
                requests = iter(_requests(given.slots, given.prompt_tokens, num_new))
                answers = [answer for answer in engine.generate(requests) if answer is not None]
                if number:
                    took[kind][num_new].append(time.perf_counter() - began)
                texts[kind] = [answer.text for answer in sorted(answers, key=lambda answer: answer.item.index)]
    for kind, times in took.items():
        prefill, whole = (statistics.median(times[num_new]) for num_new in (1, given.new_tokens))
        decoding = given.slots * (given.new_tokens - 1) / (whole - prefill)
        print(f"{kind}: prompts {given.slots * given.prompt_tokens / prefill:.0f} tokens/s, decoding {decoding:.0f}")
    print("the same answers" if texts["normal"] == texts["deterministic"] else "some answers differ")


if __name__ == "__main__":
    main()
