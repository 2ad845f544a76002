"""Attention to contexts in one pool, beside torch's own: of rows that decode, and of prompts.

    python benchmarks/attention.py [--heads 9 --key-heads 3 --size 64] [--dtype bfloat16]

Each line gives medians in microseconds for one layer, and what ours reads or computes a second. As many layers take
turns as exceed the caches, as those of a model do.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from timing import median_us

from pipeline.kernels.attention import (
    attend_one,
    attend_one_in_torch,
    attend_prompts,
    attend_prompts_in_torch,
)

_ALL_BYTES = 200_000_000  # of the keys and values of all layers together

Pools = tuple[torch.Tensor, torch.Tensor]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--key-heads", type=int, default=3)
    parser.add_argument("--size", type=int, default=64, help="of a head")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    given = parser.parse_args()
    heads, key_heads, size, dtype = given.heads, given.key_heads, given.size, getattr(torch, given.dtype)
    scale, place_bytes = size**-0.5, 2 * key_heads * size * dtype.itemsize

    def layers(num_places: int) -> list[Pools]:
        copies = max(1, _ALL_BYTES // (num_places * place_bytes))
        keys, values = (torch.randn(num_places, key_heads, size).to(dtype) for _ in range(2))
        return [(keys.clone(), values.clone()) for _ in range(copies)]

    print(f"{heads} heads, {key_heads} key heads of {size} in {given.dtype}, {torch.get_num_threads()} threads")
    print("rows that decode | context | ours | torch | GB/s of ours")
    for rows, context in ((1, 500), (8, 500), (64, 300), (128, 150), (32, 2000)):
        lengths = torch.full((rows,), context)
        numbers = (torch.arange(rows) * context, lengths, scale, None)
        query, pools = torch.randn(rows, heads, size).to(dtype), layers(rows * context)
        ours, stock = (
            median_us(partial(attend, query), [(*layer, *numbers) for layer in pools])
            for attend in (attend_one, attend_one_in_torch)
        )
        speed = rows * context * place_bytes / ours / 1e3
        print(rows, context, f"{ours:.0f}", f"{stock:.0f}", f"{speed:.1f}", sep=" | ")
    print("prompts | tokens of each | ours | torch | GFLOP/s of ours")
    for prompts, length in ((8, 64), (4, 128), (1, 512), (1, 2000)):
        spans = torch.tensor([[row * length, length, row * length, 0] for row in range(prompts)])
        query, pools = torch.randn(prompts * length, heads, size).to(dtype), layers(prompts * length)
        ours, stock = (
            median_us(partial(attend, query), [(*layer, spans, scale, None) for layer in pools])
            for attend in (attend_prompts, attend_prompts_in_torch)
        )
        speed = prompts * length * (length + 1) / 2 * heads * size * 4 / ours / 1e3
        print(prompts, length, f"{ours:.0f}", f"{stock:.0f}", f"{speed:.0f}", sep=" | ")


if __name__ == "__main__":
    main()
