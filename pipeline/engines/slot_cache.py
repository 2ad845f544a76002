"""The context of all live sequences: keys and values in one pool a layer, recurrent states by slot, and attention.

A packed step has no batch dimension to speak of: its tokens are those of many sequences, one row [1, tokens] for the
model. Only attention and recurrent layers know which token belongs to whom, and they ask here.
"""
# pyright: basic

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.engines.memory import give_back_freed_memory
from pipeline.kernels.attention import ALIKE_TOKENS, attend_one, attend_prompts
from pipeline.kernels.decoder_layer import Rows

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of one sequence in a step."""

    slot: int
    first: int  # place of its first token among the step's tokens
    num_tokens: int
    start: int  # of the sequence's room in the pool
    num_before: int  # tokens of the sequence that the pool holds already
    # Where the keys and values of its first tokens lie too, and of how many, for a sequence that decodes.
    alike_start: int = 0
    num_alike: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a packed step consists of: first one token of each of several sequences, then prompts or parts of them.

    All tensors are int64, on the model's device.
    """

    num_decoding: int
    prefill: Sequence[Span]
    places: torch.Tensor  # [tokens]: of the step's tokens in the pool
    spans: torch.Tensor  # [prefill, 4]: first, num_tokens, start, num_before
    slots: torch.Tensor  # this and the next two [decoding]
    starts: torch.Tensor
    lengths: torch.Tensor  # with the new token
    alike: torch.Tensor | None  # [decoding, 2], as `attend_one` takes it
    sequences: torch.Tensor  # [decoding and prefill, 4]: slot, first, num_tokens, whether the sequence begins here
    # [tokens]: starts and lengths for each token, as if all were of sequences that decode
    token_starts: torch.Tensor
    token_lengths: torch.Tensor

    @staticmethod
    def of(decoding: Sequence[Span], prefill: Sequence[Span], device: torch.device) -> Step:
        """The step of these spans, those that decode first."""
        import torch

        spans = [*decoding, *prefill]
        places: list[int] = []
        for span in spans:
            begin = span.start + span.num_before
            places += range(begin, begin + span.num_tokens)

        def whole_numbers(values: Sequence[Any]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        where = whole_numbers(places)
        token_starts = whole_numbers([span.start for span in spans for _ in range(span.num_tokens)])
        return Step(
            num_decoding=len(decoding),
            prefill=prefill,
            places=where,
            spans=whole_numbers([[span.first, span.num_tokens, span.start, span.num_before] for span in prefill]),
            slots=whole_numbers([span.slot for span in decoding]),
            starts=whole_numbers([span.start for span in decoding]),
            lengths=whole_numbers([span.num_before + 1 for span in decoding]),
            alike=whole_numbers(
                [[span.alike_start, span.num_alike // ALIKE_TOKENS * ALIKE_TOKENS] for span in decoding]
            )
            if any(span.num_alike for span in decoding)
            else None,
            sequences=whole_numbers([[span.slot, span.first, span.num_tokens, not span.num_before] for span in spans]),
            token_starts=token_starts,
            token_lengths=where - token_starts + 1,
        )

    @staticmethod
    def of_single_tokens(starts: torch.Tensor, lengths: torch.Tensor, slots: torch.Tensor) -> Step:
        """The step in which sequences, whose states are in `slots`, take one token each; all int64 [decoding]."""
        import torch

        rows = torch.arange(len(starts), device=starts.device)
        begins = (lengths == 1).long()
        return Step(
            num_decoding=len(starts),
            prefill=(),
            places=starts + lengths - 1,
            spans=starts.new_empty(0, 4),
            slots=slots,
            starts=starts,
            lengths=lengths,
            alike=None,
            sequences=torch.stack([slots, rows, torch.ones_like(rows), begins], dim=1),
            token_starts=starts,
            token_lengths=lengths,
        )


class NotServedError(Exception):
    """The model's layers do something that the pool cannot do."""


class SlotCache:
    """Keys and values [tokens, heads, head size] for each attention layer, made when a layer first asks.

    `row_by_row`: the tokens of a prompt attend one by one, as those of an answer do, so that no bit of a token's
    numbers depends on how its sequence was cut.
    """

    def __init__(self, *, row_by_row: bool = False) -> None:
        self._row_by_row = row_by_row
        self._step: Step | None = None
        self._rows: Rows | None = None
        self.num_tokens = 0
        self._pools: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def step(self) -> Step | None:
        """What is computed now."""
        return self._step

    @step.setter
    def step(self, step: Step | None) -> None:
        self._step, self._rows = step, None

    @property
    def rows(self) -> Rows:
        """The step's rows as native code takes them."""
        if self._rows is None:
            step = self._step
            assert step is not None
            if self._row_by_row and step.prefill:
                self._rows = Rows(step.places, step.token_starts, step.token_lengths, None, None)
            else:
                spans = step.spans if step.prefill else None
                self._rows = Rows(step.places, step.starts, step.lengths, step.alike, spans)
        return self._rows

    def resize(self, num_tokens: int) -> None:
        """Hold so many tokens, and one of nobody after them; what was held is lost if that is another number."""
        if num_tokens != self.num_tokens:
            self.num_tokens = num_tokens
            self._pools = {}
            give_back_freed_memory()

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        _mask: torch.Tensor | None,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        """transformers' attention interface for a packed step.

        `query` is [1, heads, tokens, head size]; `key` and `value`, with fewer heads perhaps, hold the same tokens.
        Returns [1, tokens, heads, value size]. Raises NotServedError for what only some models ask of attention.
        """
        if unknown := [name for name in ("softcap", "s_aux") if others.get(name) is not None]:
            raise NotServedError(f"attention with {unknown[0]}")
        if self.step is None:
            raise NotServedError("attention outside a packed step")

        step = self.step
        shapes = ((key.shape[1], key.shape[-1]), (value.shape[1], value.shape[-1]))
        keys, values = self.pools(module.layer_idx, key, *shapes)
        keys[step.places] = key[0].transpose(0, 1)
        values[step.places] = value[0].transpose(0, 1)
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        return self.attend_to(query[0].transpose(0, 1), keys, values, scale, sliding_window).unsqueeze(0), None

    def attend_to(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, sliding_window: int | None
    ) -> torch.Tensor:
        """Attention of the step's tokens [tokens, heads, size] to a layer's pools, which hold them already."""
        step = self.step
        assert step is not None
        how = (scale, sliding_window)
        if not step.prefill:
            return attend_one(query, keys, values, step.starts, step.lengths, *how, step.alike)
        if self._row_by_row:
            return attend_one(query, keys, values, step.token_starts, step.token_lengths, *how)
        output = attend_prompts(query, keys, values, step.spans, *how)
        if num_decoding := step.num_decoding:
            output[:num_decoding] = attend_one(
                query[:num_decoding], keys, values, step.starts, step.lengths, *how, step.alike
            )
        return output

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the keys and values of so many tokens from one place of the pool to another."""
        import torch

        with torch.inference_mode():
            for pools in self._pools.values():
                for pool in pools:
                    pool[target : target + num_tokens] = pool[source : source + num_tokens]

    def pools(
        self, layer: int, like: torch.Tensor, key_shape: tuple[int, int], value_shape: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's keys and values [places, heads, size], of these heads and sizes and as `like` when first made."""
        pools = self._pools.get(layer)
        if pools is None:
            keys, values = (like.new_empty(self.num_tokens + 1, *shape) for shape in (key_shape, value_shape))
            pools = self._pools[layer] = (keys, values)
        return pools
