"""Modules of transformers' models computed in fewer passes: RMS norms, gated MLPs, rotary attention, and their layers.

Which modules those are follows from their parts (Llama, Mistral, Qwen and their like), and each is tried on a real
prompt: one that does not give what the module itself gives is left alone. Weights that are multiplied with the same
numbers are laid side by side, the module's own becoming views of them, so that one product does for all. What follows
a product is done to its sums before they are written: gates, and adding to what a layer was given.
"""
# pyright: basic

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.engines.slot_cache import SlotCache
from pipeline.kernels import packed, rowwise
from pipeline.kernels.decoder_layer import AttentionParts, DecoderLayer, MlpParts, Norm
from pipeline.kernels.packed import BLOCK
from pipeline.kernels.plain import PlainWeight

if TYPE_CHECKING:
    import torch

_LEAST_ERROR = 1e-5  # of float32 sums in another order

Forward = Callable[..., Any]
Project = Callable[["torch.Tensor"], Sequence["torch.Tensor"]]


class OnRows(NamedTuple):
    """What a module does to rows, and what native code has to know to do it as a part of a layer.

    Rows [tokens, hidden] become such, plus others of that shape where there are any. Attention takes positions too.
    """

    compute: Callable[..., torch.Tensor]
    parts: AttentionParts | MlpParts | None


def fused_forwards(model: torch.nn.Module, cache: SlotCache) -> dict[torch.nn.Module, Forward]:
    """For each module that looks like one that can be computed faster, how; to be tried."""
    forwards: dict[torch.nn.Module, Forward] = {}
    if not rowwise.available(next(model.parameters())):
        return forwards
    on_rows: dict[torch.nn.Module, OnRows] = {}  # of attentions and MLPs, for the layers they are in
    for module in reversed(list(model.modules())):  # what a module consists of comes before it
        if not _is_served(module):
            continue
        if (norm := _norm(module)) is not None:
            forwards[module] = norm
        elif (mlp := _gated_mlp(module)) is not None:
            on_rows[module] = mlp
            forwards[module] = _forward_of_mlp(mlp)
        elif (attention := _attention(module, cache)) is not None:
            on_rows[module] = attention
            forwards[module] = _forward_of_attention(attention)
        elif (layer := _decoder_layer(module, cache, forwards, on_rows)) is not None:
            forwards[module] = layer
    return forwards


def keep_faithful(forwards: dict[torch.nn.Module, Forward], run: Callable[[], Any]) -> dict[torch.nn.Module, Forward]:
    """Those that give what their modules give while `run` has the model compute something.

    Compared are root mean squares: rounding in another order passes, another formula does not. Who has a part that does
    not pass does not pass either: beside what a layer was given, an error of its parts would be small.
    """
    import torch

    faithful: dict[torch.nn.Module, Forward] = {}

    def compare(module: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        try:
            found = forwards[module](*inputs, **named)
        except Exception:  # noqa: BLE001 - it was not made for this module
            return
        if isinstance(found, tuple) != isinstance(output, tuple):
            return
        expected, found = (one[0] if isinstance(one, tuple) else one for one in (output, found))
        if found.shape != expected.shape or found.dtype != expected.dtype:
            return
        error, size = (one.float().square().mean().sqrt() for one in (found.float() - expected.float(), expected))
        if error <= max(_LEAST_ERROR, 2 * torch.finfo(found.dtype).eps) * size:
            faithful[module] = forwards[module]

    with ExitStack() as stack:
        for module in forwards:
            stack.callback(module.register_forward_hook(compare, with_kwargs=True).remove)
        run()
    unfaithful = forwards.keys() - faithful.keys()
    return {module: forward for module, forward in faithful.items() if unfaithful.isdisjoint(module.children())}


def _is_served(module: Any) -> bool:
    """Whether its weights are where kernels of ours compute, and no hook of another library moves them."""
    parameters = [*module.parameters(), *module.buffers()]
    return not hasattr(module, "_hf_hook") and all(one.device.type == "cpu" for one in parameters)


def _norm(module: Any) -> Forward | None:
    found = _rms_norm(module)
    if found is None:
        return None
    scale, epsilon = found

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        return rowwise.norm(hidden_states, scale, epsilon)

    return forward


def _rms_norm(module: Any) -> tuple[torch.Tensor, float] | None:
    """As `norm_of`, of an RMS norm with one weight, or one more than its weight (Gemma, Qwen3-Next)."""
    import torch

    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, torch.Tensor) or weight.dim() != 1:
        return None
    return norm_of(module)


def norm_of(module: Any) -> tuple[torch.Tensor, float] | None:
    """What an RMS norm multiplies with, float32 [size], and its epsilon; None where that is not to be told."""
    import torch

    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(epsilon, float):
        return None
    with torch.inference_mode():
        weight = module.weight.float()
        probe = torch.ones(1, len(weight), dtype=module.weight.dtype)  # its root mean square is 1
        try:
            seen = module(probe).float().flatten()
        except Exception:  # noqa: BLE001 - it takes something else
            return None
        for scale in (weight, 1.0 + weight):
            if torch.allclose(seen, scale, rtol=0.02, atol=0.02):
                return scale.clone(), epsilon
    return None


def _gated_mlp(module: Any) -> OnRows | None:
    """down(silu(gate(x)) * up(x))."""

    if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return None
    if type(module.act_fn).__name__ not in ("SiLUActivation", "SiLU"):
        return None
    layers = module.gate_proj, module.up_proj, module.down_proj
    gates, down = _gates(*layers[:2]), _product(layers[2])
    in_blocks = all(map(_in_blocks, layers)) and layers[0].form == layers[1].form

    def compute(rows: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        return down(gates(rows), residual)

    return OnRows(compute, MlpParts(*(layer.layer() for layer in layers)) if in_blocks else None)


def _forward_of_mlp(mlp: OnRows) -> Forward:
    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        return mlp.compute(hidden_states.reshape(-1, hidden_states.shape[-1]), None).view(*hidden_states.shape[:-1], -1)

    return forward


def _attention(module: Any, cache: SlotCache) -> OnRows | None:
    """Attention with rotary positions and, it may be, norms of its heads."""

    names = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "layer_idx", "scaling")
    if not all(hasattr(module, name) for name in names):
        return None
    size = module.head_dim
    norms: list[tuple[torch.Tensor, float] | None] = [None, None]
    for place, name in enumerate(("q_norm", "k_norm")):
        if hasattr(module, name):
            norms[place] = norm_of(getattr(module, name))
            if norms[place] is None:
                return None
    query_norm, key_norm = (None if found is None else found[0] for found in norms)
    epsilon = next((found[1] for found in norms if found is not None), 0.0)
    window = getattr(module, "sliding_window", None)
    projections, layers = (module.q_proj, module.k_proj, module.v_proj), None
    project, joined = _side_by_side(*projections)
    if joined is not None:
        layers = [joined]
    elif all(map(_in_blocks, projections)):
        layers = [layer.layer() for layer in projections]
    output, parts = _product(module.o_proj), None
    if layers is not None and _in_blocks(module.o_proj) and len({layer.out_features for layer in projections[1:]}) == 1:
        heads, key_heads = (layer.out_features // size for layer in projections[:2])
        how = ((query_norm, key_norm), epsilon, heads, key_heads, size, module.scaling, window)
        parts = AttentionParts(layers, module.o_proj.layer(), *how)

    def compute(
        rows: torch.Tensor, residual: torch.Tensor | None, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        query, key, value = project(rows)
        pools = cache.pools(module.layer_idx, key, (key.shape[1] // size, size), (value.shape[1] // size, size))
        step = cache.step
        assert step is not None
        rotated = rowwise.rotate(
            *(query, key, value), position_embeddings, (query_norm, key_norm), epsilon, pools, step.places
        )
        attended = cache.attend_to(rotated, *pools, module.scaling, window)
        return output(attended.flatten(1), residual)

    return OnRows(compute, parts)


def _forward_of_attention(attention: OnRows) -> Forward:
    def forward(
        hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **_: Any
    ) -> tuple[torch.Tensor, None]:
        return attention.compute(hidden_states[0], None, position_embeddings).unsqueeze(0), None

    return forward


def _decoder_layer(
    module: Any, cache: SlotCache, forwards: dict[torch.nn.Module, Forward], on_rows: dict[torch.nn.Module, OnRows]
) -> Forward | None:
    """x = x + attention(norm(x)), then x + mlp(norm(x)), of parts that are themselves computed in fewer passes."""
    parts = dict(module.named_children())
    if parts.keys() != {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}:
        return None
    attends, mlp = on_rows.get(parts["self_attn"]), on_rows.get(parts["mlp"])
    before, between = (_rms_norm(parts[name]) for name in ("input_layernorm", "post_attention_layernorm"))
    if any(part not in forwards for part in parts.values()) or not (attends and mlp and before and between):
        return None
    attention_parts, mlp_parts = attends.parts, mlp.parts
    dtype = parts["input_layernorm"].weight.dtype
    if (
        isinstance(attention_parts, AttentionParts)
        and isinstance(mlp_parts, MlpParts)
        and DecoderLayer.is_served(attention_parts, mlp_parts, dtype)
    ):
        layer = DecoderLayer(Norm(*before), attention_parts, Norm(*between), mlp_parts, dtype)
        return _forward_of_layer(layer, cache, parts["self_attn"].layer_idx, attention_parts)

    def forward(
        hidden_states: torch.Tensor, *_: Any, position_embeddings: tuple[torch.Tensor, torch.Tensor], **__: Any
    ) -> torch.Tensor:
        rows = hidden_states[0]
        rows = attends.compute(rowwise.norm(rows, *before), rows, position_embeddings)
        return mlp.compute(rowwise.norm(rows, *between), rows).unsqueeze(0)

    return forward


def _forward_of_layer(layer: DecoderLayer, cache: SlotCache, index: int, attends: AttentionParts) -> Forward:
    shape = attends.key_heads, attends.size

    def forward(
        hidden_states: torch.Tensor, *_: Any, position_embeddings: tuple[torch.Tensor, torch.Tensor], **__: Any
    ) -> torch.Tensor:
        rows = hidden_states[0]
        return layer(rows, cache.rows, position_embeddings, cache.pools(index, rows, shape, shape)).unsqueeze(0)

    return forward


def _product(layer: Any) -> Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]:
    """A layer's outputs for rows [rows, inputs], plus others of that shape where there are any."""
    if _in_blocks(layer):
        own = layer.layer()
        return lambda rows, residual: packed.multiply(rows, own, residual)
    return lambda rows, residual: layer(rows) if residual is None else residual + layer(rows)


def _gates(gate: Any, up: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """silu(gate(x)) * up(x) for rows [rows, inputs]."""
    if _in_blocks(gate) and _in_blocks(up) and gate.form == up.form:
        return partial(packed.multiply, layer=gate.layer(), up=up.layer())
    project, _ = _side_by_side(gate, up)
    return lambda rows: rowwise.gated(*project(rows))


def _in_blocks(layer: Any) -> bool:
    """Whether native code multiplies with it, and nothing else is done to its outputs."""
    # Derived from torch's, hence imported here.
    from pipeline.loading.packed_modules import PlainLinear, QuantizedLinear

    is_ours = isinstance(layer, PlainLinear | QuantizedLinear) and layer.bias is None
    return is_ours and not hasattr(layer, "_hf_hook") and packed.native_library() is not None


def _side_by_side(*layers: Any) -> tuple[Project, packed.Layer | None]:
    """The outputs of several layers for the same rows [rows, inputs], each [rows, outputs] with dense rows.

    One product, where they are of one plain kind; packed ones are called one by one. Also the layer that gives all of
    them, where native code has such and needs nothing else.
    """
    import torch

    from pipeline.loading.packed_modules import PlainLinear  # derived from torch's, hence imported here

    kinds = {(type(layer), layer.bias is None, hasattr(layer, "_hf_hook")) for layer in layers}
    first: Any = layers[0]
    sizes = [layer.out_features for layer in layers]
    if len(kinds) > 1 or hasattr(first, "_hf_hook"):
        return (lambda rows: [layer(rows) for layer in layers]), None
    bias = None if first.bias is None else torch.cat([layer.bias.detach() for layer in layers])
    if type(first) is torch.nn.Linear and len({layer.weight.dtype for layer in layers}) == 1:
        weight = _joined(layer.weight for layer in layers)
        return (lambda rows: torch.nn.functional.linear(rows, weight, bias).split(sizes, dim=-1)), None
    in_whole_blocks = type(first) is PlainLinear and not any(size % BLOCK for size in sizes)
    if in_whole_blocks and len(bits := {layer.bits for layer in layers}) == 1:
        joined = PlainWeight(_joined(layer.blocks for layer in layers), sum(sizes), bits.pop()).layer()

        def project(rows: torch.Tensor) -> Sequence[torch.Tensor]:
            output = packed.multiply(rows, joined)
            return (output if bias is None else output.add_(bias)).split(sizes, dim=-1)

        return project, joined if bias is None else None
    return (lambda rows: [layer(rows) for layer in layers]), None


def _joined(tensors: Iterator[Any]) -> torch.Tensor:
    """One tensor for several, which become views of it."""
    import torch

    own = list(tensors)
    with torch.no_grad():
        joined = torch.cat([tensor.detach() for tensor in own])
        for tensor, part in zip(own, joined.split([len(tensor) for tensor in own]), strict=True):
            tensor.data = part
    return joined
