"""Makes `tiny-qwen3-next`: the flagship's architecture and quantization recipe, random weights, a few megabytes.

It says nothing sensible, and has every kind of tensor that the real model has: routed experts of 4 bits; attention,
linear attention and the shared expert of 8; routers, gates, norms, convolutions and tables as they are.
"""
# pyright: basic

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.loading.autoround_format import pack_symmetric
from pipeline.loading.prepared import Progress
from pipeline.loading.tiny_tokenizer import END_OF_TEXT, END_OF_TURN, VOCABULARY_SIZE, write_tiny_tokenizer

if TYPE_CHECKING:
    from numpy.random import Generator
    from torch import Tensor

_SEED = 20_260_101
_GROUP_SIZE = 128
_HIDDEN, _EXPERT_WIDTH = 256, 128
_NUM_LAYERS, _ATTENTION_EVERY = 4, 4
_NUM_EXPERTS = 16
_HEADS, _KV_HEADS, _HEAD_DIM = 4, 2, 64
_KEY_HEADS, _VALUE_HEADS, _LINEAR_DIM = 2, 4, 32
_KEYS, _VALUES = _KEY_HEADS * _LINEAR_DIM, _VALUE_HEADS * _LINEAR_DIM
_KERNEL = 4

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "dtype": "bfloat16",
    "vocab_size": VOCABULARY_SIZE,
    "bos_token_id": END_OF_TEXT,
    "eos_token_id": END_OF_TURN,
    "hidden_size": _HIDDEN,
    "hidden_act": "silu",
    "intermediate_size": 512,  # of layers without experts, of which there are none
    "num_hidden_layers": _NUM_LAYERS,
    "full_attention_interval": _ATTENTION_EVERY,
    "attention_bias": False,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _KV_HEADS,
    "head_dim": _HEAD_DIM,
    "linear_conv_kernel_dim": _KERNEL,
    "linear_key_head_dim": _LINEAR_DIM,
    "linear_value_head_dim": _LINEAR_DIM,
    "linear_num_key_heads": _KEY_HEADS,
    "linear_num_value_heads": _VALUE_HEADS,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": _EXPERT_WIDTH,
    "shared_expert_intermediate_size": _EXPERT_WIDTH,
    "num_experts": _NUM_EXPERTS,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10_000_000,
    "tie_word_embeddings": False,
}


class _Linear(NamedTuple):
    """A linear layer and the bits that it is stored with."""

    name: str
    num_outputs: int
    num_inputs: int
    bits: int


def write_tiny_qwen3_next(directory: Path, progress: Progress) -> None:
    """Write the whole model into `directory`, the same bytes on every machine."""
    from safetensors.torch import save_file

    progress("generating tiny-qwen3-next", 0.0)
    write_tiny_tokenizer(directory)
    save_file(_tensors(), directory / "model.safetensors", metadata={"format": "pt"})
    generation = {"bos_token_id": END_OF_TEXT, "pad_token_id": END_OF_TEXT, "eos_token_id": [END_OF_TURN, END_OF_TEXT]}
    config = {**CONFIG, "quantization_config": _quantization()}
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        (directory / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _quantization() -> dict[str, Any]:
    """What AutoRound writes for a mixed recipe: the experts are the rule, all else is an exception by name."""
    eight = {"bits": 8, "group_size": _GROUP_SIZE, "sym": True, "data_type": "int"}
    full = {"bits": 16, "data_type": "float"}
    return {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 4,
        "group_size": _GROUP_SIZE,
        "sym": True,
        "data_type": "int",
        "iters": 0,
        "block_name_to_quantize": "model.layers",
        "autoround_version": "0.16.1",
        "extra_config": {
            linear.name: eight if linear.bits == 8 else full for linear in _linears() if ".experts." not in linear.name
        },
    }


def _linears() -> Iterator[_Linear]:
    for layer in range(_NUM_LAYERS):
        block = f"model.layers.{layer}"
        if _has_attention(layer):
            attention = f"{block}.self_attn"
            yield _Linear(f"{attention}.q_proj", 2 * _HEADS * _HEAD_DIM, _HIDDEN, 8)  # queries and their gate
            yield _Linear(f"{attention}.k_proj", _KV_HEADS * _HEAD_DIM, _HIDDEN, 8)
            yield _Linear(f"{attention}.v_proj", _KV_HEADS * _HEAD_DIM, _HIDDEN, 8)
            yield _Linear(f"{attention}.o_proj", _HIDDEN, _HEADS * _HEAD_DIM, 8)
        else:
            attention = f"{block}.linear_attn"
            yield _Linear(f"{attention}.in_proj_qkvz", 2 * _KEYS + 2 * _VALUES, _HIDDEN, 8)
            yield _Linear(f"{attention}.in_proj_ba", 2 * _VALUE_HEADS, _HIDDEN, 16)
            yield _Linear(f"{attention}.out_proj", _HIDDEN, _VALUES, 8)
        yield _Linear(f"{block}.mlp.gate", _NUM_EXPERTS, _HIDDEN, 16)
        yield _Linear(f"{block}.mlp.shared_expert_gate", 1, _HIDDEN, 16)
        yield from _expert(f"{block}.mlp.shared_expert", 8)
        for expert in range(_NUM_EXPERTS):
            yield from _expert(f"{block}.mlp.experts.{expert}", 4)


def _expert(name: str, bits: int) -> Iterator[_Linear]:
    yield _Linear(f"{name}.gate_proj", _EXPERT_WIDTH, _HIDDEN, bits)
    yield _Linear(f"{name}.up_proj", _EXPERT_WIDTH, _HIDDEN, bits)
    yield _Linear(f"{name}.down_proj", _HIDDEN, _EXPERT_WIDTH, bits)


def _has_attention(layer: int) -> bool:
    return (layer + 1) % _ATTENTION_EVERY == 0


def _tensors() -> dict[str, Tensor]:
    import numpy as np
    import torch

    random = np.random.default_rng(_SEED)
    tensors: dict[str, Tensor] = {}
    for name, outputs, inputs, bits in _linears():
        weight = _uniform(random, (outputs, inputs), inputs**-0.5)
        if bits == 16:
            tensors[f"{name}.weight"] = weight.to(torch.bfloat16)
        else:
            tensors |= pack_symmetric(weight, bits, _GROUP_SIZE).named(name)
    for name, (shape, centre, deviation) in _others():
        tensors[name] = (centre + _uniform(random, shape, deviation)).to(torch.bfloat16)
    return tensors


def _others() -> Iterator[tuple[str, tuple[tuple[int, ...], float, float]]]:
    """Tensors that are no linear layers: shape, centre and deviation."""
    yield "model.embed_tokens.weight", ((VOCABULARY_SIZE, _HIDDEN), 0.0, 1.0)
    # The deviation makes some next tokens likely and some unlikely, as those of a trained model are.
    yield "lm_head.weight", ((VOCABULARY_SIZE, _HIDDEN), 0.0, 0.2)
    yield "model.norm.weight", ((_HIDDEN,), 0.0, 0.1)  # norms of this architecture are centred at zero, but for one
    for layer in range(_NUM_LAYERS):
        block = f"model.layers.{layer}"
        yield f"{block}.input_layernorm.weight", ((_HIDDEN,), 0.0, 0.1)
        yield f"{block}.post_attention_layernorm.weight", ((_HIDDEN,), 0.0, 0.1)
        if _has_attention(layer):
            yield f"{block}.self_attn.q_norm.weight", ((_HEAD_DIM,), 0.0, 0.1)
            yield f"{block}.self_attn.k_norm.weight", ((_HEAD_DIM,), 0.0, 0.1)
        else:
            attention = f"{block}.linear_attn"
            yield f"{attention}.conv1d.weight", ((2 * _KEYS + _VALUES, 1, _KERNEL), 0.0, _KERNEL**-0.5)
            yield f"{attention}.A_log", ((_VALUE_HEADS,), 0.0, 1.0)
            yield f"{attention}.dt_bias", ((_VALUE_HEADS,), 1.0, 0.1)
            yield f"{attention}.norm.weight", ((_LINEAR_DIM,), 1.0, 0.1)


def _uniform(random: Generator, shape: tuple[int, ...], deviation: float) -> Tensor:
    """Values of that standard deviation. Uniform, since a normal draw takes a logarithm, which machines round apart."""
    import torch

    width = deviation * 12**0.5
    return torch.from_numpy((random.random(shape) - 0.5) * width).float()
