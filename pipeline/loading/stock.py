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

    Linear layers are in blocks already where they keep a narrower type. Nothing is fetched and nothing is unpickled.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from pipeline.kernels.plain import is_served
    from pipeline.loading.packed_modules import put_linears_in_blocks

    dtype = getattr(torch, plan.dtype)
    # Layers whose weights stay bfloat16 in blocks never are float32: twice the memory would be the peak of a load.
    keeps_bfloat16 = plan.plain_kernel and dtype == torch.float32 and checkpoint.is_bfloat16 and is_served()
    loaded = AutoModelForCausalLM.from_pretrained(
        checkpoint.directory,
        dtype=torch.bfloat16 if keeps_bfloat16 else dtype,
        device_map={"": plan.device},
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=plan.trust_remote_code,
        output_loading_info=True,
    )
    model, info = cast("tuple[torch.nn.Module, dict[str, Any]]", loaded)
    if keeps_bfloat16:
        put_linears_in_blocks(model)
        model.config.dtype = dtype
    # auto-round turns the whole model to float16 where its kernel has no float32; but that kernel computes in the type
    # of its input, so the model can be turned back.
    return model.to(dtype), info
