"""Gated DeltaNet layers of transformers that a kernel of ours computes: all sequences of a packed step in one call."""
# pyright: basic

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.kernels.delta_net import DeltaNetInputs, DeltaNetWeights, delta_net, is_available

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pipeline.engines.slot_cache import Step

_JOINED = {"Qwen3NextGatedDeltaNet"}  # one projection for queries, keys, values and gates, by key head; one for b and a
_SPLIT = {"Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet"}  # queries, keys and values by kind; the others apart


def is_served(module: Any) -> bool:
    """Whether this is transformers' own layer of that kind, as we know it, and can be computed here."""
    kind = type(module)
    return (
        kind.__module__.startswith("transformers.models.")
        and kind.__name__ in _JOINED | _SPLIT
        and module.activation == module.norm.activation == "silu"
        and module.conv1d.bias is None
        and not any(hasattr(part, "_hf_hook") for part in (module, module.conv1d, module.norm))
        and is_available(module.A_log.device)
    )


class DeltaNetLayer:
    """A layer and the states of all slots: float32, zeros until a sequence has begun."""

    def __init__(self, module: Any, num_slots: int) -> None:
        import torch

        def own(tensor: Tensor) -> Tensor:
            return tensor.detach().float().contiguous()

        self._module = module
        self._weights = DeltaNetWeights(
            num_key_heads=module.num_k_heads,
            num_value_heads=module.num_v_heads,
            key_size=module.head_k_dim,
            value_size=module.head_v_dim,
            taps=own(module.conv1d.weight.squeeze(1).T),
            rate=own(module.A_log).exp(),
            bias=own(module.dt_bias),
            norm=own(module.norm.weight),
            norm_eps=module.norm.variance_epsilon,
        )
        self._project = _joined if type(module).__name__ in _JOINED else _split
        device = module.A_log.device
        self._windows = torch.zeros(num_slots, *self._weights.window_shape, device=device)
        self._states = torch.zeros(num_slots, *self._weights.state_shape, device=device)

    def forward(self, hidden_states: Tensor, step: Step) -> Tensor:
        """[1, tokens, hidden] in and out; the states of the step's sequences move on."""
        inputs = DeltaNetInputs(*(part.float() for part in self._project(self._module, hidden_states[0])))
        mixed = delta_net(self._weights, inputs, step.sequences, self._windows, self._states)
        return self._module.out_proj(mixed.to(hidden_states.dtype).unsqueeze(0))

    def copy(self, source: int, target: int) -> None:
        """Give one slot the states of another."""
        for pool in (self._windows, self._states):
            pool[target] = pool[source]


def _joined(module: Any, hidden: Tensor) -> tuple[torch.Tensor, ...]:
    import torch

    values = module.num_v_heads // module.num_k_heads
    sizes = [module.head_k_dim] * 2 + [values * module.head_v_dim] * 2
    query, key, value, gate = torch.split(
        module.in_proj_qkvz(hidden).unflatten(-1, (module.num_k_heads, -1)), sizes, -1
    )
    beta, decay = torch.split(module.in_proj_ba(hidden).unflatten(-1, (module.num_k_heads, -1)), values, -1)
    return query, key, value, gate, beta, decay


def _split(module: Any, hidden: Tensor) -> tuple[torch.Tensor, ...]:
    import torch

    mixed = torch.split(module.in_proj_qkv(hidden), [module.key_dim, module.key_dim, module.value_dim], -1)
    others = [layer(hidden) for layer in (module.in_proj_z, module.in_proj_b, module.in_proj_a)]
    return tuple(part.unflatten(-1, (module.num_k_heads, -1)) for part in (*mixed, *others))
