"""Every family that is loaded packed gives the scores and greedy tokens of transformers with auto-round, its oracle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.make_checkpoint import make_checkpoint
from pipeline.facts.model_facts import read_facts
from pipeline.loading import load_model
from tests.model_files import INT4
from tests.test_packed_loading import ALL_8, EXPERTS, LINEAR, SMALL, config, plan_of

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
# Layers of few outputs, which the quantizer skips; it names them, for stock would ask for kernels for them.
PLAIN = {"bits": 16, "data_type": "float"}
AS_IT_IS = {
    "extra_config": {
        ".*in_proj_(ba|a|b)$": PLAIN,
        ".*shared_expert_gate": PLAIN,
        ".*mlp\\.gate$": PLAIN,
        ".*shared_expert\\.": ALL_8,
    }
}
SCHEMES = {"extra_config": {"model.layers.1.self_attn.q_proj": ALL_8, ".*layers\\.2.*o_proj": PLAIN}}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3-Next, Qwen3-Coder-Next": config("qwen3-next-80b", quantization_config=INT4 | AS_IT_IS),
    "Qwen3-30B-A3B": config("qwen3-30b-a3b", mlp_only_layers=[1], quantization_config=INT4 | AS_IT_IS),
    "Qwen3, names and patterns": config("qwen3-8b", quantization_config=INT4 | SCHEMES),
    "Qwen3, tied": config("qwen3-8b", tie_word_embeddings=True),
    "Llama": config("qwen3-8b", **LLAMA),
    "Llama, tied, 8 bits": config("qwen3-8b", **LLAMA, tie_word_embeddings=True, quantization_config=INT4 | ALL_8),
}
# In a process of its own, for auto-round changes transformers for good. In float32 nothing is rounded but float32 sums.
STOCK = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
for directory in sys.argv[1:]:
    model = torch.nn.Module.float(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)).eval()
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        scores = model(ids).logits
        tokens = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    save_file({"scores": scores.contiguous(), "tokens": tokens.contiguous()}, directory + "/stock.out")
"""


def seen_and_written(directory: Path) -> Path:
    """A model that also sees: its decoder nested in the configuration, eyes and speculative layers beside it."""
    text = config("qwen3-30b-a3b") | LINEAR | {"model_type": "qwen3_5_moe_text", "full_attention_interval": 2}
    text.pop("quantization_config")
    quantization = INT4 | AS_IT_IS
    whole = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "text_config": text | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "quantization_config": quantization | {"block_name_to_quantize": "model.language_model.layers"},
        "tie_word_embeddings": False,
    }
    make_checkpoint(directory, whole)
    tensors = load_file(directory / "model.safetensors")
    extra = {"mtp.layers.0.mlp.gate.weight": torch.ones(2, 2), "model.visual.patch_embed.weight": torch.ones(3)}
    save_file(tensors | extra, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.slow
def test_scores_and_greedy_tokens_are_those_of_stock(tmp_path: Path) -> None:
    assert {"hidden_size", "num_experts"} <= (SMALL | EXPERTS).keys()
    made = [make_checkpoint(tmp_path / str(number), one) for number, one in enumerate(FAMILIES.values())]
    made.append(seen_and_written(tmp_path / "seen"))
    command = [sys.executable, "-W", "ignore", "-c", STOCK, *map(str, made)]
    ended = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, timeout=600
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    for directory in made:
        stock = load_file(directory / "stock.out")
        assert read_facts(directory).can_pack
        model: Any = load_model(plan_of(directory)).model
        assert any(type(module).__name__ == "QuantizedLinear" for module in model.modules())
        ids = torch.arange(40)[None]
        with torch.inference_mode():
            scores = model(ids).logits
            tokens = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
        name = json.loads((directory / "config.json").read_text())["architectures"]
        assert (scores - stock["scores"]).abs().max() < 1e-3 * stock["scores"].std(), name
        assert torch.equal(tokens, stock["tokens"]), name
