"""The gated delta rule over states by slot on a GPU: the sequences of a step beside each other, token by token.

The formulas are those of `delta_net.c`. One program holds the state of a value head, so that a token costs no traffic
but its own numbers; sums are float32.
"""
# pyright: basic, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from pipeline.kernels.gpu import on_device_of, power_of_two

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.kernels.delta_net import DeltaNetInputs, DeltaNetWeights

_CHANNELS = 256  # that one program convolves
_PROMPT_TOKENS = 16  # that it does at once


def delta_net(
    weights: DeltaNetWeights, inputs: DeltaNetInputs, spans: Tensor, windows: Tensor, states: Tensor
) -> Tensor:
    """As `pipeline.kernels.delta_net.delta_net`, all on one GPU; inputs may be of any floating type."""
    import torch

    query, key, value, gate, beta, decay = (part.flatten(1) for part in inputs)
    mixed = torch.cat([query, key, value], dim=1)
    num_tokens, channels = mixed.shape
    convolved = torch.empty(num_tokens, channels, dtype=torch.float32, device=mixed.device)
    out = torch.zeros(num_tokens, weights.num_value_heads * weights.value_size, device=mixed.device)
    with on_device_of(mixed):
        convolve: Any = _convolve[(len(spans), triton.cdiv(channels, _CHANNELS))]
        convolve(
            mixed,
            weights.taps,
            windows,
            spans,
            convolved,
            channels,
            TAPS=len(weights.taps),
            TOKENS=1 if num_tokens <= len(spans) else _PROMPT_TOKENS,
            CHANNELS=_CHANNELS,
        )
        rule: Any = _rule[(len(spans), weights.num_value_heads)]
        rule(
            convolved,
            gate.contiguous(),
            beta.contiguous(),
            decay.contiguous(),
            weights.rate,
            weights.bias,
            weights.norm,
            weights.norm_eps,
            states,
            spans,
            out,
            KEY_HEADS=weights.num_key_heads,
            HEADS=weights.num_value_heads,
            KEY_SIZE=weights.key_size,
            VALUE_SIZE=weights.value_size,
            KEYS=power_of_two(weights.key_size),
            VALUES=power_of_two(weights.value_size),
            num_warps=8,
        )
    return out


@triton.jit
def _convolve(
    mixed,  # [tokens, channels]
    taps,  # [TAPS, channels]
    windows,  # [slots, TAPS - 1, channels]
    spans,
    convolved,  # [tokens, channels]
    channels,
    TAPS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    span = spans + tl.program_id(0) * 4
    slot, first, num_tokens, begins = tl.load(span), tl.load(span + 1), tl.load(span + 2), tl.load(span + 3)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    window = windows + slot * (TAPS - 1) * channels + channel
    own = mixed + first * channels + channel
    for at in range(0, num_tokens, TOKENS):
        tokens = at + tl.arange(0, TOKENS)
        total = tl.zeros((TOKENS, CHANNELS), tl.float32)
        for tap in tl.static_range(TAPS):
            source = tokens + tap - (TAPS - 1)
            x = tl.load(
                own[None, :] + (source * channels)[:, None],
                mask=((source >= 0) & (source < num_tokens))[:, None] & inside[None, :],
                other=0.0,
            ).to(tl.float32)
            x += tl.load(
                window[None, :] + ((source + TAPS - 1) * channels)[:, None],
                mask=((source < 0) & (begins == 0))[:, None] & inside[None, :],
                other=0.0,
            )
            total += x * tl.load(taps + tap * channels + channel, mask=inside, other=0.0)[None, :]
        tl.store(
            convolved + ((first + tokens) * channels)[:, None] + channel[None, :],
            total * tl.sigmoid(total),
            mask=(tokens < num_tokens)[:, None] & inside[None, :],
        )
    tl.debug_barrier()  # the window is read by all before any of it changes
    for place in tl.static_range(TAPS - 1):  # in this order: what a later one takes is not yet overwritten
        source = num_tokens + place - (TAPS - 1)
        x = tl.load(own + source * channels, mask=inside & (source >= 0), other=0.0).to(tl.float32)
        x += tl.load(window + (source + TAPS - 1) * channels, mask=inside & (source < 0) & (begins == 0), other=0.0)
        tl.store(window + place * channels, x, mask=inside)
        tl.debug_barrier()


@triton.jit
def _rule(
    convolved,  # [tokens, queries of KEY_HEADS, keys of KEY_HEADS, values of HEADS]
    gates,  # [tokens, HEADS, VALUE_SIZE]
    betas,  # [tokens, HEADS]
    decays,  # [tokens, HEADS]
    rates,
    biases,
    norm,
    norm_eps,
    states,  # [slots, HEADS, KEY_SIZE, VALUE_SIZE]
    spans,
    out,  # [tokens, HEADS, VALUE_SIZE]
    KEY_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
):
    CHANNELS: tl.constexpr = 2 * KEY_HEADS * KEY_SIZE + HEADS * VALUE_SIZE
    span, head = spans + tl.program_id(0) * 4, tl.program_id(1)
    slot, first, num_tokens, begins = tl.load(span), tl.load(span + 1), tl.load(span + 2), tl.load(span + 3)
    row, column = tl.arange(0, KEYS), tl.arange(0, VALUES)
    in_row, in_column = row < KEY_SIZE, column < VALUE_SIZE
    places = states + ((slot * HEADS + head) * KEY_SIZE + row[:, None]) * VALUE_SIZE + column[None, :]
    held = in_row[:, None] & in_column[None, :]
    state = tl.load(places, mask=held & (begins == 0), other=0.0)
    rate, bias = tl.load(rates + head), tl.load(biases + head)
    scale = tl.load(norm + column, mask=in_column, other=0.0)
    key_head = head // (HEADS // KEY_HEADS)
    for token in range(first, first + num_tokens):
        numbers = convolved + token * CHANNELS
        query = tl.load(numbers + key_head * KEY_SIZE + row, mask=in_row, other=0.0)
        key = tl.load(numbers + (KEY_HEADS + key_head) * KEY_SIZE + row, mask=in_row, other=0.0)
        value = tl.load(numbers + 2 * KEY_HEADS * KEY_SIZE + head * VALUE_SIZE + column, mask=in_column, other=0.0)
        query *= tl.rsqrt(tl.sum(query * query, 0) + 1e-6) * tl.rsqrt(KEY_SIZE * 1.0)
        key *= tl.rsqrt(tl.sum(key * key, 0) + 1e-6)
        beta = tl.sigmoid(tl.load(betas + token * HEADS + head).to(tl.float32))
        step = tl.load(decays + token * HEADS + head).to(tl.float32) + bias
        softplus = tl.maximum(step, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(step)))
        state *= tl.exp(-rate * softplus)
        delta = (value - tl.sum(state * key[:, None], 0)) * beta
        state += key[:, None] * delta[None, :]
        answer = tl.sum(state * query[:, None], 0)
        answer *= tl.rsqrt(tl.sum(answer * answer, 0) / VALUE_SIZE + norm_eps) * scale
        at = (token * HEADS + head) * VALUE_SIZE + column
        gate = tl.load(gates + at, mask=in_column, other=0.0).to(tl.float32)
        tl.store(out + at, answer * gate * tl.sigmoid(gate), mask=in_column)
    tl.store(places, state, mask=held)
