"""Says where the plan puts routed experts, of how many layers, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.plan.budget import Placement
from pipeline.plan.placement import Placer, show_bytes
from pipeline.plan.streaming import Streaming


def tell_experts(placer: Placer, placement: Placement, streaming: Streaming | None) -> tuple[str, str] | None:
    """Value and reason, such as "20 on GPU 0, 28 in host memory"; nothing where experts lie with all the rest."""
    num_layers = len(placer.facts.architecture.sparse_layers)
    if placement.form != "packed" or not num_layers or not (placement.on_gpu or streaming):
        return None
    value = ", ".join(f"{count} {place}" for place, count in _places(placement, num_layers) if count)
    reason = "of all layers"
    if placement.on_gpu:
        reason += "; only the hidden states of tokens cross"
    if placement.strategy == "max-gpu" and placement.expert_layers_on_gpus[placement.main_gpu] < num_layers:
        reason += "".join(f"; GPU {gpu} does not compute bfloat16 and is not used" for gpu in placer.too_old_gpus())
    if streaming is not None:
        measured = "of this disk" if streaming.is_measured else "(assumed; no disk was measured)"
        reason += (
            f"; memory is short, so every step of the batch reads {show_bytes(streaming.bytes_per_pass)} from the "
            f"model's files: at the {streaming.bytes_per_s / 1e9:.2f} GB/s {measured} about {streaming.pass_s:.0f} s a "
            "token of each sequence"
        )
    return value, reason


def _places(placement: Placement, num_layers: int) -> Iterator[tuple[str, int]]:
    several = len(placement.expert_layers_on_gpus) > 1
    for gpu, count in enumerate(placement.expert_layers_on_gpus):
        yield f"on GPU {gpu}" if several else "on the GPU", count
    yield "in host memory", num_layers - placement.num_expert_layers_on_gpus - placement.num_streamed_layers
    yield "on disk", placement.num_streamed_layers
