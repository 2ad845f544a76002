"""One linear layer after another: our kernels for packed and plain weights beside torch's product.

    python benchmarks/linear.py [--outputs 2048 --inputs 2048] [--rows 1 4 16 64 256] [--dtype bfloat16]

Each line gives medians in microseconds, for rows of the type. As many layers take turns as exceed the caches, as those
of a model do. `int8` is what `model.activation: int8` computes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timing import median_us

from pipeline.kernels.packed import PackedWeight, kernel_in_use, linear
from pipeline.kernels.plain import in_plain_blocks, plain_linear

_ALL_BYTES = 60_000_000  # of a layer's copies together


def _packed(outputs: int, inputs: int, bits: int) -> PackedWeight:
    codes = torch.randint(-(2**31), 2**31 - 1, (outputs // 32, inputs * bits // 32, 32))
    return PackedWeight(codes.to(torch.int32), torch.rand(outputs // 32, inputs // 128, 32).half() * 0.01, bits)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=int, default=2048)
    parser.add_argument("--inputs", type=int, default=2048)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the rows")
    given = parser.parse_args()
    outputs, inputs = given.outputs, given.inputs
    copies = range(max(1, _ALL_BYTES // (outputs * inputs * 4)))
    plain = [torch.randn(outputs, inputs).bfloat16().float() for _ in copies]
    dtype = getattr(torch, given.dtype)
    ways: dict[str, tuple[Callable[[torch.Tensor, Any], object], Sequence[Any]]] = {
        f"torch {given.dtype}": (torch.nn.functional.linear, [weight.to(dtype) for weight in plain]),
        "ours bfloat16": (plain_linear, [in_plain_blocks(weight) for weight in plain]),
        "ours 8 bits": (linear, [_packed(outputs, inputs, 8) for _ in copies for _ in range(4)]),
        "ours 4 bits": (linear, [_packed(outputs, inputs, 4) for _ in copies for _ in range(8)]),
    }
    if dtype == torch.float32:
        ways["ours float32"] = plain_linear, [in_plain_blocks(weight + 1e-4) for weight in plain]
    for bits in (8, 4):
        ways[f"{bits} bits, int8"] = (partial(linear, int8=True), ways[f"ours {bits} bits"][1])
    print(f"{outputs} x {inputs}, {torch.get_num_threads()} threads, {kernel_in_use()}")
    print("rows", *ways, sep=" | ")
    for rows in given.rows:
        x = torch.randn(rows, inputs).to(dtype)
        print(
            rows,
            *(
                f"{median_us(partial(multiply, x), [(layer,) for layer in layers]):.0f}"
                for multiply, layers in ways.values()
            ),
            sep=" | ",
        )


if __name__ == "__main__":
    main()
