"""A left-padded batch of rows on an unmodified transformers model, which makes and fills its own cache."""
# pyright: basic

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.errors import SpecError

if TYPE_CHECKING:
    import torch


class CausalModel:
    """Calls the model with those of our inputs that its `forward` names; says where and how wide its logits are."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model: Any = model
        self._parameters = inspect.signature(model.forward).parameters
        self.name = getattr(model.config, "name_or_path", "") or type(model).__name__
        self.vocabulary: int = model.config.get_text_config(decoder=True).vocab_size  # type: ignore
        # Where the prompt enters; with weights on several devices this is not where every parameter is.
        self.embeddings: torch.nn.Module = self._model.get_input_embeddings()
        self.device: torch.device = next(self.embeddings.parameters()).device
        self._cache_name = next((name for name in ("past_key_values", "cache_params") if name in self._parameters), "")
        if not self._cache_name:
            raise SpecError(
                f"{type(model).__name__} cannot carry its context from one token to the next in a way that the "
                "transformers engine knows; choose another model or engine"
            )

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, cache: Any
    ) -> tuple[torch.Tensor, Any]:
        """Logits [rows, vocabulary] after the last column of `input_ids`, and the cache with all columns in it.

        `input_ids` and `position_ids` are int64 [rows, columns]; `attention_mask` int64 [rows, columns so far].
        `cache` is what the call before returned, None at first.
        """
        if self._cache_name == "cache_params":  # no attention, hence no columns before these (see mamba)
            attention_mask = attention_mask[:, -input_ids.shape[1] :]
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, self._cache_name: cache, "use_cache": True}
        optional = {"position_ids": position_ids, "logits_to_keep": 1}
        inputs |= {name: value for name, value in optional.items() if name in self._parameters}
        output = self._model(**inputs)
        return output.logits[:, -1], getattr(output, self._cache_name)


class Batch:
    """Rows that were given their tokens together and take one token each per step."""

    def __init__(self, model: CausalModel, rows: Sequence[Sequence[int]], room: int, pad_id: int) -> None:
        """`rows` are the token ids of each row, none empty; `room` is the number of steps that may follow."""
        import torch

        width = max(map(len, rows))
        padded = [[pad_id] * (width - len(row)) + list(row) for row in rows]
        lengths = torch.tensor([len(row) for row in rows], device=model.device)
        columns = torch.arange(width + room, device=model.device)
        self._model = model
        self._input_ids = torch.tensor(padded, device=model.device)
        self._num_padding = width - lengths
        # Made whole at once, read up to the present column; a row's padding stays hidden for ever.
        self._mask = (columns >= self._num_padding[:, None]).long()
        self._num_columns = width
        self._cache: Any = None

    def prefill(self) -> torch.Tensor:
        """Logits [rows, vocabulary] after the given tokens."""
        positions = (self._mask[:, : self._num_columns].cumsum(dim=-1) - 1).clamp(min=0)
        return self._forward(self._input_ids, positions)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append one token to each row (int64 [rows]) and return the logits [rows, vocabulary] after it."""
        positions = self._num_columns - self._num_padding
        self._num_columns += 1
        return self._forward(tokens[:, None], positions[:, None])

    def keep(self, rows: torch.Tensor) -> bool:
        """Drop all rows but these (int64); False, and nothing changed, where the cache cannot be cut so."""
        if not _can_select(self._cache):
            return False
        # Not `batch_select_indices`: layers of linear attention have none, and hybrid ones inherit one that forgets
        # the recurrent state. Reordering knows all of a layer and accepts fewer rows than there are.
        self._cache.reorder_cache(rows)
        self._num_padding = self._num_padding[rows]
        self._mask = self._mask[rows]
        return True

    def _forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        logits, self._cache = self._model(input_ids, self._mask[:, : self._num_columns], positions, self._cache)
        return logits


def _can_select(cache: Any) -> bool:
    """True for a cache made of transformers' own layers; a model's own layer may hold more than reordering knows."""
    from transformers import Cache, cache_utils

    return isinstance(cache, Cache) and all(type(layer).__module__ == cache_utils.__name__ for layer in cache.layers)
