"""Routed experts over packed weights on a GPU: two grouped products, whose weights are unpacked in registers.

Pairs of a token and one of its experts are sorted by expert and cut into tiles of one expert each. How many tiles there
are is known on the GPU alone; as many programs are started as there may be at most, so that nobody waits for a number.
"""
# pyright: basic, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from pipeline.kernels.gpu import on_device_of

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.kernels.packed import PackedWeight

_BLOCK = 32  # outputs that lie together in a packed weight: those of one program
_MOST_TILE_INPUTS = 128
_LEAST_DEPTH = 16  # of a product, what a tensor core takes
_TILE_PAIRS = (16, 64)  # few experts or few tokens, what tensor cores take; and many


def experts(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: PackedWeight, down: PackedWeight) -> Tensor:
    """As `pipeline.kernels.packed.experts`, all on one GPU.

    Codes are multiplied as they are, whole numbers that bfloat16 holds exactly, and a group's sum with its scale in
    float32. What goes into the second product is rounded to the type of x, as is each expert's weighted answer.
    """
    import torch

    num_experts, (num_tokens, top_k) = len(gate_up.codes), chosen.shape
    num_pairs, inner_size = chosen.numel(), down.num_inputs
    tile = next((size for size in _TILE_PAIRS if num_pairs <= size * num_experts), _TILE_PAIRS[-1])
    order, tiles = _tiles(chosen, num_experts, tile)
    into, out_of = _compiled_for(gate_up, tile), _compiled_for(down, tile)
    inner = torch.empty(num_pairs, inner_size, dtype=x.dtype, device=x.device)
    # A pair of no expert has no tile: nothing is written for it.
    answers = torch.zeros(num_pairs, down.num_outputs, dtype=x.dtype, device=x.device)
    with on_device_of(x):
        enter: Any = _gate_up[(tiles.shape[1], inner_size // _BLOCK)]
        turned = {"INNER_TILE": out_of["TILE_INPUTS"], "INNER_PLACES": out_of["PLACES"]}
        enter(_by_place(x, into), order, tiles, gate_up.codes, gate_up.scales, inner, top_k, **into, **turned)
        leave: Any = _down[(tiles.shape[1], down.num_outputs // _BLOCK)]
        leave(inner, order, tiles, weights.float().contiguous(), down.codes, down.scales, answers, **out_of)
    return answers.view(num_tokens, top_k, -1).sum(1, dtype=torch.float32).to(x.dtype)


def _tiles(chosen: Tensor, num_experts: int, size: int) -> tuple[Tensor, Tensor]:
    """Pairs in order of their experts, int64 [pairs]; and expert, first pair and end of each tile, int64 [3, tiles].

    Tiles beyond the last are of expert `num_experts`.
    """
    import torch

    flat = chosen.flatten()
    flat = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    experts, order = torch.sort(flat, stable=True)
    bounds = torch.arange(num_experts + 1, device=flat.device)
    ends = torch.searchsorted(experts, bounds, right=True)
    starts = torch.searchsorted(experts, bounds)
    tile_ends = ((ends - starts + size - 1) // size)[:num_experts].cumsum(0)
    most = flat.numel() // size + min(num_experts, flat.numel())
    numbers = torch.arange(most, device=flat.device)
    expert = torch.searchsorted(tile_ends, numbers, right=True)
    before = torch.nn.functional.pad(tile_ends, (1, 0))[expert]
    first = starts[expert] + (numbers - before) * size
    return order, torch.stack([expert, first, torch.minimum(first + size, ends[expert])])


def _compiled_for(weight: PackedWeight, tile: int) -> dict[str, Any]:
    """What the kernels are compiled for."""
    inputs, per_word = _MOST_TILE_INPUTS, 32 // weight.bits
    while weight.group_size % inputs:
        inputs //= 2
    return {
        "NUM_EXPERTS": len(weight.codes),
        "OUTPUTS": weight.num_outputs,
        "INPUTS": weight.num_inputs,
        "GROUP": weight.group_size,
        "BITS": weight.bits,
        "TILE": tile,
        "TILE_INPUTS": inputs,
        "PLACES": per_word if inputs // per_word >= _LEAST_DEPTH else 1,
        "num_warps": 2,
        "num_stages": 3,
    }


def _by_place(x: Tensor, compiled: dict[str, Any]) -> Tensor:
    """x [tokens, inputs] with the inputs of a tile by their place within a word: all first ones, all second ones ..."""
    tiles = x.unflatten(-1, (-1, compiled["TILE_INPUTS"] // compiled["PLACES"], compiled["PLACES"]))
    return tiles.transpose(-2, -1).contiguous()


@triton.jit
def _numbers(codes, BITS: tl.constexpr, TYPE: tl.constexpr):
    """Codes, the last bits of these words, as whole numbers around zero.

    Written into the last bits of a power of two, a code becomes that number and itself: a GPU turns whole numbers into
    others four times slower than it subtracts. Of bfloat16 too few bits are left for codes of 8.
    """
    MIDDLE: tl.constexpr = 1 << (BITS - 1)
    codes = codes & ((1 << BITS) - 1)
    if TYPE == tl.bfloat16 and BITS <= 4:
        return (codes | 0x4300).to(tl.int16).to(TYPE, bitcast=True) - tl.full((1, 1), 128 + MIDDLE, TYPE)
    elif TYPE == tl.float16:
        return (codes | 0x6400).to(tl.int16).to(TYPE, bitcast=True) - tl.full((1, 1), 1024 + MIDDLE, TYPE)
    else:
        return ((codes | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + MIDDLE)).to(TYPE)


@triton.jit
def _product(
    rows,  # [TILE] addresses
    valid,  # [TILE]
    codes,  # of a block of outputs: [INPUTS * BITS / 32, 32]
    scales,  # of a block: [INPUTS / GROUP, 32]
    first,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Rows times the weights of a block, of the inputs of a tile from `first` on: float32 [TILE, 32].

    Where there are words enough for a tensor core, the codes of each place within a word are one product, since words
    spread over inputs would have to change hands between threads.
    """
    WORDS: tl.constexpr = TILE_INPUTS * BITS // 32
    outputs = tl.arange(0, 32)
    words = tl.load(codes + first * BITS + tl.arange(0, WORDS)[:, None] * 32 + outputs[None, :])
    if PLACES == 1:
        inputs = first + tl.arange(0, TILE_INPUTS)
        x = tl.load(rows[:, None] + inputs[None, :], mask=valid[:, None], other=0.0)
        spread = words[:, None, :] >> (tl.arange(0, 32 // BITS) * BITS)[None, :, None]
        numbers = _numbers(tl.reshape(spread, (TILE_INPUTS, 32)), BITS, x.dtype)
        total = tl.dot(x, numbers, input_precision="ieee")
    else:
        total = tl.zeros((TILE, 32), dtype=tl.float32)
        for place in tl.static_range(PLACES):
            inputs = first + place * WORDS + tl.arange(0, WORDS)
            x = tl.load(rows[:, None] + inputs[None, :], mask=valid[:, None], other=0.0)
            total = tl.dot(x, _numbers(words >> (place * BITS), BITS, x.dtype), total, input_precision="ieee")
    return total * tl.load(scales + first // GROUP * 32 + outputs).to(tl.float32)[None, :]


@triton.jit
def _gate_up(
    x,  # [tokens, INPUTS], by place
    order,
    tiles,
    codes,  # [experts, OUTPUTS / 32, INPUTS * BITS / 32, 32], outputs of the gate before those of up
    scales,  # [experts, OUTPUTS / 32, INPUTS / GROUP, 32]
    inner,  # [pairs, OUTPUTS / 2], pairs in order, by the place that they have as inputs of what follows
    top_k,
    NUM_EXPERTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    PLACES: tl.constexpr,
    INNER_TILE: tl.constexpr,
    INNER_PLACES: tl.constexpr,
):
    tile, num_tiles, block = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    expert = tl.load(tiles + tile)
    if expert >= NUM_EXPERTS:
        return
    pairs = tl.load(tiles + num_tiles + tile) + tl.arange(0, TILE)
    valid = pairs < tl.load(tiles + 2 * num_tiles + tile)
    rows = x + tl.load(order + pairs, mask=valid, other=0) // top_k * INPUTS
    gate_block = expert * (OUTPUTS // 32) + block
    gate_codes, gate_scales = codes + gate_block * (INPUTS * BITS), scales + gate_block * (INPUTS // GROUP * 32)
    up_codes, up_scales = gate_codes + OUTPUTS // 64 * INPUTS * BITS, gate_scales + OUTPUTS // 64 * INPUTS // GROUP * 32
    gate = tl.zeros((TILE, 32), dtype=tl.float32)
    up = tl.zeros((TILE, 32), dtype=tl.float32)
    for first in range(0, INPUTS, TILE_INPUTS):
        gate += _product(rows, valid, gate_codes, gate_scales, first, GROUP, BITS, TILE, TILE_INPUTS, PLACES)
        up += _product(rows, valid, up_codes, up_scales, first, GROUP, BITS, TILE, TILE_INPUTS, PLACES)
    outputs = block * 32 + tl.arange(0, 32)
    within = outputs % INNER_TILE
    turned = within % INNER_PLACES * (INNER_TILE // INNER_PLACES) + within // INNER_PLACES
    places = inner + pairs[:, None] * (OUTPUTS // 2) + (outputs - within + turned)[None, :]
    tl.store(places, (gate * tl.sigmoid(gate) * up).to(inner.dtype.element_ty), mask=valid[:, None])


@triton.jit
def _down(
    inner,  # [pairs, INPUTS], pairs in order, by place
    order,
    tiles,
    weights,  # [tokens, top_k]
    codes,  # as above
    scales,
    answers,  # [pairs, OUTPUTS], pairs as they came
    NUM_EXPERTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    PLACES: tl.constexpr,
):
    tile, num_tiles, block = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    expert = tl.load(tiles + tile)
    if expert >= NUM_EXPERTS:
        return
    pairs = tl.load(tiles + num_tiles + tile) + tl.arange(0, TILE)
    valid = pairs < tl.load(tiles + 2 * num_tiles + tile)
    own = expert * (OUTPUTS // 32) + block
    codes, scales = codes + own * (INPUTS * BITS), scales + own * (INPUTS // GROUP * 32)
    total = tl.zeros((TILE, 32), dtype=tl.float32)
    for first in range(0, INPUTS, TILE_INPUTS):
        total += _product(inner + pairs * INPUTS, valid, codes, scales, first, GROUP, BITS, TILE, TILE_INPUTS, PLACES)
    origin = tl.load(order + pairs, mask=valid, other=0)
    total *= tl.load(weights + origin, mask=valid, other=0.0)[:, None]
    places = answers + origin[:, None] * OUTPUTS + (block * 32 + tl.arange(0, 32))[None, :]
    tl.store(places, total.to(answers.dtype.element_ty), mask=valid[:, None])
