"""Loads an AutoRound checkpoint as an unquantized model: every packed layer is dequantized once, while it is read.

On a CPU without kernels for packed weights this is what makes a small quantized model usable. auto-round's fallback
dequantizes every matrix anew in every step, in float16, which such a CPU emulates; here a step costs what it costs the
unquantized model, and auto-round need not even be imported. The price is memory: all weights in `dtype`.
"""
# pyright: basic

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.facts.checkpoint import Checkpoint
from pipeline.facts.quantization import AUTO_GPTQ
from pipeline.loading.autoround_format import PackedLinear, dequantize

if TYPE_CHECKING:
    import torch

GENERATION_CONFIG = "generation_config.json"


def load_unpacked(checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[torch.nn.Module, dict[str, set[str]]]:
    """The model on the CPU in `dtype`, and what transformers says of keys that were missing, mismatched or unexpected.

    The layers are ordinary ones, experts stacked as transformers stacks those of an unquantized checkpoint. The weights
    are the checkpoint's own, exact in float32 and rounded once to anything smaller (auto-round's fallback rounds to
    float16 on the way). Raises ValueError for a checkpoint that is packed in another format.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig

    config: Any = AutoConfig.from_pretrained(checkpoint.directory, local_files_only=True)
    quantization = config.quantization_config
    if quantization.get("packing_format") != AUTO_GPTQ:
        raise ValueError(f"{checkpoint.directory}: packed as {quantization.get('packing_format')!r}, not {AUTO_GPTQ!r}")
    del config.quantization_config
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model, info = model_class.from_pretrained(
        None,
        config=config,
        state_dict=read_unpacked((shard.path for shard in checkpoint.shards), dtype),
        dtype=dtype,
        output_loading_info=True,
    )
    if (checkpoint.directory / GENERATION_CONFIG).exists():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.directory)
    return model.eval(), info


def read_unpacked(paths: Iterable[Path], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint's weight files; in place of the three of a packed layer its `weight` in `dtype`.

    Other tensors keep the type they are stored in. The three tensors of a layer must lie in one file, as auto-round
    writes them; KeyError otherwise.
    """
    from safetensors import safe_open

    state: dict[str, torch.Tensor] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (no mapping)
                layer, _, part = name.rpartition(".")
                if part == "qweight":
                    packed = PackedLinear(*(file.get_tensor(f"{layer}.{field}") for field in PackedLinear._fields))
                    state[f"{layer}.weight"] = dequantize(packed, dtype)
                elif part not in PackedLinear._fields:
                    state[name] = file.get_tensor(name)
    return state
