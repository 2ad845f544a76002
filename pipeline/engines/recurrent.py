"""States of recurrent layers (gated DeltaNet, Mamba) by slot, and these layers over packed tokens.

A layer that a kernel of ours knows is computed by it, once for all sequences of a step. Others read and write their
states through transformers' cache object: a packed step calls each once for all sequences that decode and once for each
prompt, with a view of just their states in the place of that cache.
"""
# pyright: basic

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pipeline.engines.delta_net import DeltaNetLayer, is_served
from pipeline.engines.slot_cache import SlotCache

if TYPE_CHECKING:
    import torch

_Pools = dict[tuple[int, int], "torch.Tensor"]  # by layer and number of the state: [slots, ...]


class RecurrentStates:
    """The states of all slots: with the layers that a kernel computes, else made when a layer first writes one."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._layers: dict[int, DeltaNetLayer] = {}  # by layer
        self.convolution: _Pools = {}
        self.recurrent: _Pools = {}

    def layer(self, module: Any) -> DeltaNetLayer | None:
        """The kernel's form of a module; None for one that computes itself."""
        if module.layer_idx not in self._layers and is_served(module):
            self._layers[module.layer_idx] = DeltaNetLayer(module, self._num_slots)
        return self._layers.get(module.layer_idx)

    def copy(self, source: int, target: int) -> None:
        """Give one slot the states of another."""
        import torch

        with torch.inference_mode():
            for layer in self._layers.values():
                layer.copy(source, target)
            for pool in (*self.convolution.values(), *self.recurrent.values()):
                pool[target] = pool[source]

    def write(self, pools: _Pools, key: tuple[int, int], slots: torch.Tensor, state: torch.Tensor) -> None:
        """Set the state [rows, ...] of these slots."""
        if key not in pools:
            pools[key] = state.new_zeros(self._num_slots, *state.shape[1:])
        pools[key][slots] = state.to(pools[key].dtype)


class StateView:
    """The states of some slots, in the form of transformers' cache as recurrent layers use it.

    `fresh`: these sequences begin, whatever their slots held before.
    """

    def __init__(self, states: RecurrentStates, slots: torch.Tensor, *, fresh: bool) -> None:
        self._states = states
        self._slots = slots
        self._fresh = fresh
        self._lent: dict[tuple[int, int], torch.Tensor] = {}  # convolution states, which layers update in place

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        if self._fresh:
            return None
        state = self._states.convolution[layer_idx, state_idx][self._slots]
        self._lent[layer_idx, state_idx] = state
        return state

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return None if self._fresh else self._states.recurrent[layer_idx, state_idx][self._slots]

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Append columns [rows, channels, n] to what was kept; all of it is returned, the last of it is kept."""
        import torch

        before = self.get_conv_state(layer_idx, state_idx)
        columns = conv_states if before is None else torch.cat([before, conv_states], dim=-1)
        width = conv_kernel_size if conv_kernel_size is not None else conv_states.shape[-1]
        kept = torch.nn.functional.pad(columns, (max(0, width - columns.shape[-1]), 0))[..., -width:]
        self._lent[layer_idx, state_idx] = kept
        return columns

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        self._states.write(self._states.recurrent, (layer_idx, state_idx), self._slots, recurrent_states)
        return recurrent_states

    def is_recording_past(self, _layer_idx: int) -> bool:
        return False

    def has_previous_state(self, _layer_idx: int | None = None, _state_idx: int | None = None) -> bool:
        return not self._fresh

    def give_back(self) -> None:
        """Keep what the layer did to the states that it was lent."""
        for key, state in self._lent.items():
            self._states.write(self._states.convolution, key, self._slots, state)


def is_recurrent(module: Any) -> bool:
    """Whether a module carries a state through transformers' cache of recurrent layers."""
    return "cache_params" in inspect.signature(module.forward).parameters and hasattr(module, "layer_idx")


def packed_forward(module: Any, cache: SlotCache, states: RecurrentStates) -> Callable[..., torch.Tensor]:
    """The module's forward for the cache's current step: [1, tokens, hidden] in and out."""
    original = module.forward
    layer = states.layer(module)

    def native(hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        assert layer is not None
        assert cache.step is not None
        return layer.forward(hidden_states, cache.step)

    def forward(hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        import torch

        step = cache.step
        assert step is not None
        outputs: list[torch.Tensor] = []
        num_decoding = step.num_decoding
        if num_decoding:
            view = StateView(states, step.slots, fresh=False)
            rows = hidden_states[:, :num_decoding].transpose(0, 1)
            outputs.append(original(rows, cache_params=view, attention_mask=None).transpose(0, 1))
            view.give_back()
        for span in step.prefill:
            slots = torch.tensor([span.slot], device=hidden_states.device)
            view = StateView(states, slots, fresh=span.num_before == 0)
            part = hidden_states[:, span.first : span.first + span.num_tokens]
            outputs.append(original(part, cache_params=view, attention_mask=None))
            view.give_back()
        return torch.cat(outputs, dim=1)

    return forward if layer is None else native
