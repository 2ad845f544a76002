"""Single steps of a model as the engine computes them: rows that decode with contexts of a length, and prompts alone.

    python benchmarks/step.py [MODEL] [--rows 1 8 16 64] [--places 300] [--alike 0] [--prompt-tokens 512] [--repeats 20]
        [--against DIRECTORY]

MODEL is a directory or builtin:NAME; `builtin:smollm2-135m-bf16` without one. Medians and least of the repeats in
milliseconds; where other work shares the machine compare least with least. `--against` takes kernels of another version
(`pipeline/kernels` of a checkout whose C functions take the same arguments): both do every step in turn, which shows
differences of one in a hundred where separate runs differ by eight.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from planned import planned

from pipeline.engines.packed_model import PackedModel
from pipeline.engines.slot_cache import Span
from pipeline.kernels import attention, decoder_layer, packed, rowwise
from pipeline.loading import load_model

_FUNCTIONS: Any = decoder_layer._functions
_LIBRARIES: list[tuple[ModuleType, Any]] = [(one, one.native_library) for one in (packed, attention, rowwise)]


def _kernels(directory: Path) -> Callable[[], None]:
    """Has the kernels in C of a directory computed with, once it is called."""
    swapped: list[tuple[ModuleType, str, object]] = []
    for module, load in _LIBRARIES:
        given = module.SOURCE
        module.SOURCE = directory / given.name
        swapped.append((module, "native_library", load.__wrapped__()))
        module.SOURCE = given

    def use() -> None:
        for module, name, value in swapped:
            setattr(module, name, lambda value=value: value)

    use()
    swapped.append((decoder_layer, "_functions", _FUNCTIONS.__wrapped__()))
    return use


def _time(
    what: str, num_tokens: int, step: Callable[[], Any], repeats: int, versions: Sequence[Callable[[], None]]
) -> None:
    took: list[list[float]] = [[] for _ in versions]
    for number in range(repeats + 2):
        for seconds, use in zip(took, versions, strict=True):
            use()
            began = time.perf_counter()
            step()
            if number >= 2:
                seconds.append(time.perf_counter() - began)
    medians = [statistics.median(seconds) for seconds in took]
    milliseconds = [f"{value * 1e3:.1f}" for pair in zip(medians, map(min, took), strict=True) for value in pair]
    print(what, *milliseconds, f"{num_tokens / medians[0]:.0f}", sep=" | ", end="")
    print(f" | {medians[1] / medians[0]:.2f}" if len(versions) > 1 else "", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="builtin:smollm2-135m-bf16")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 64])
    parser.add_argument("--places", type=int, default=300, help="of each row's context")
    parser.add_argument("--alike", type=int, default=0, help="places that the contexts begin alike with, as steps know")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--against", type=Path, help="kernels of another version")
    given = parser.parse_args()
    directories = [Path(packed.__file__).parent, *([given.against.resolve()] if given.against else [])]
    versions = [_kernels(directory) for directory in directories]
    plan = planned(given.model)
    rows, places, length = max(given.rows), given.places, given.prompt_tokens
    model = PackedModel(load_model(plan).model, rows)
    print(f"{given.model}, {plan.dtype}, {torch.get_num_threads()} threads")
    others = " | the other's median ms | least ms" if given.against else ""
    print(f"step | median ms | least ms{others} | tokens/s at the median" + (" | faster by" if others else ""))
    with torch.inference_mode():
        model.fuse(range(100, 160))
        model.resize(max(rows * places, length))
        # One context as a run would leave it, for all rows.
        first = Span(0, 0, places - 1, 0, 0)
        model.forward([100 + place % 900 for place in range(places - 1)], [], [first], [places - 2])
        for row in range(1, rows):
            model.copy(first, Span(row, 0, places - 1, row * places, 0), places - 1)
        for count in given.rows:
            decoding = [Span(row, row, 1, row * places, places - 1, 0, given.alike) for row in range(count)]
            tokens = [100 + row * 37 % 900 for row in range(count)]  # experts differ from row to row
            step = partial(model.forward, tokens, decoding, [], range(count))
            _time(f"{count} rows", count, step, given.repeats, versions)
        prompt = Span(0, 0, length, 0, 0)
        ids = [100 + place % 900 for place in range(length)]
        _time(
            f"prompt of {length}",
            length,
            lambda: model.forward(ids, [], [prompt], [length - 1]),
            given.repeats,
            versions,
        )


if __name__ == "__main__":
    main()
