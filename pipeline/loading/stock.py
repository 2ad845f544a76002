"""Loads a model the way transformers does, auto-round included: right for every model, slow for large packed ones."""
# pyright: basic

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from pipeline.facts.checkpoint import Checkpoint
from pipeline.plan.plan import Plan

if TYPE_CHECKING:
    import torch


def load_stock(plan: Plan, checkpoint: Checkpoint) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model whole on the plan's device and in its dtype, and what transformers says of keys that were missing.

    Nothing is fetched and nothing is unpickled.
    """
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, plan.dtype)
    loaded = AutoModelForCausalLM.from_pretrained(
        checkpoint.directory,
        dtype=dtype,
        device_map={"": plan.device},
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=plan.trust_remote_code,
        output_loading_info=True,
    )
    model, info = cast("tuple[torch.nn.Module, dict[str, Any]]", loaded)
    # auto-round turns the whole model to float16 where its kernel has no float32; but that kernel computes in the type
    # of its input, so the model can be turned back.
    return model.to(dtype), info
