"""Model directories for tests: configurations of two families, and weight files right in all but content."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.facts.architecture import read_architecture
from pipeline.facts.quantization import FULL_BITS, read_quantization

VALUE_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I32": 4}
Shape = tuple[str, tuple[int, ...]]  # dtype and shape

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
QWEN3_NEXT = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "full_attention_interval": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
INT4 = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "data_type": "int",
    "block_name_to_quantize": "model.layers",
}
FLAGSHIP = Path("examples/models/qwen3-next-80b-a3b-thinking-int4-mixed-autoround")


def write_shard(path: Path, tensors: Mapping[str, Shape], *, padding: bytes = b"") -> None:
    """A safetensors file of these tensors, all zeros; the data is a hole in the file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, size = end, VALUE_BYTES[dtype]
        for side in shape:
            size *= side
        end = begin + size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode() + padding
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def expected_tensors(config: Mapping[str, Any], dtype: str = "BF16") -> dict[str, Shape]:
    """The tensors of a checkpoint with this configuration, every expert by itself, named as auto-round names them."""
    return dict(_tensors(config, dtype))


def _tensors(config: Mapping[str, Any], dtype: str) -> Iterator[tuple[str, Shape]]:
    modules = list(read_architecture(config, file="config.json").modules())
    quantization = read_quantization(config, file="config.json")
    if quantization:
        quantization = quantization.for_modules(modules)
    for module in modules:
        inputs, outputs = module.num_inputs, module.num_outputs
        for copy in range(module.copies):
            name = module.name.replace("experts.0.", f"experts.{copy}.")
            scheme = quantization.scheme_of(module) if quantization else None
            if scheme and scheme.bits < FULL_BITS:
                groups = inputs // scheme.group_size
                yield f"{name}.qweight", ("I32", (inputs * scheme.bits // 32, outputs))
                yield f"{name}.qzeros", ("I32", (groups, outputs * scheme.bits // 32))
                yield f"{name}.scales", ("F16", (groups, outputs))
            elif name.endswith(("A_log", "dt_bias")):
                yield name, (dtype, (outputs,))
            else:
                yield f"{name}.weight", (dtype, (outputs, inputs) if inputs else (outputs,))
            if module.bias:
                yield f"{name}.bias", (dtype, (outputs,))


def write_model(directory: Path, config: Mapping[str, Any], *, num_shards: int = 1) -> Path:
    """A model directory with configuration and weight files; with several shards, an index too."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = list(expected_tensors(config).items())
    if num_shards == 1:
        write_shard(directory / "model.safetensors", dict(tensors))
        return directory
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = dict(tensors[shard::num_shards])
        write_shard(directory / name, part)
        weight_map |= dict.fromkeys(part, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory
