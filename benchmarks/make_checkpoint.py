"""Writes a model directory in AutoRound's format with random weights, of any size, to measure and test with.

    python benchmarks/make_checkpoint.py DIRECTORY --like qwen3-next-80b --layers 4

The layout is the real one: the configuration with its `extra_config`, shards with an index, every expert by itself as
`qweight`, `qzeros` and `scales`, layers of 8 and 16 bits. Written one tensor after the other, so memory is no limit.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pipeline.facts.architecture import Architecture, Module, read_architecture
from pipeline.facts.quantization import FULL_BITS, Quantization, read_quantization
from pipeline.loading.tiny_tokenizer import END_OF_TEXT, END_OF_TURN, write_tiny_tokenizer

_FLAGSHIP = Path(__file__).parents[1] / "examples/models/qwen3-next-80b-a3b-instruct-int4-mixed-autoround"
_INT4 = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "data_type": "int",
    "block_name_to_quantize": "model.layers",
}
_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "tie_word_embeddings": False,
    "quantization_config": _INT4,
}
_QWEN3_MOE = _QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_ZERO_CENTRED = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")  # families whose norms multiply by 1 + weight
_DTYPES = {"I32": 4, "F16": 2, "BF16": 2}
_SHARD_BYTES = 5_000_000_000


class Stored(NamedTuple):
    """A tensor to be written; its values follow from its name and `inputs`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    inputs: int  # of the layer that it belongs to
    bits: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _DTYPES[self.dtype]


def models() -> dict[str, dict[str, Any]]:
    """The configurations that a checkpoint may be like."""
    flagship = json.loads((_FLAGSHIP / "config.json").read_text(encoding="utf-8"))
    return {"qwen3-next-80b": flagship, "qwen3-30b-a3b": _QWEN3_MOE, "qwen3-8b": _QWEN3}


def make_checkpoint(
    directory: Path, config: Mapping[str, Any], *, seed: int = 1, shard_bytes: int = _SHARD_BYTES
) -> Path:
    """Write the model that `config` describes, the same bytes for the same arguments; gives `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    config = dict(config) | {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TURN}
    architecture = read_architecture(config, file="config.json")
    tensors = list(_tensors(architecture, read_quantization(config, file="config.json")))
    shards: list[list[Stored]] = [[]]
    filled = 0
    for tensor in tensors:
        if filled > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.num_bytes
    random = np.random.default_rng(seed)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        with (directory / name).open("wb") as file:
            _write_shard(file, shard, architecture, random)
        weight_map |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": _size(tensors)}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_tiny_tokenizer(directory)
    return directory


def _size(tensors: list[Stored]) -> int:
    return sum(tensor.num_bytes for tensor in tensors)


def _tensors(architecture: Architecture, quantization: Quantization | None) -> Iterator[Stored]:
    modules = list(architecture.modules())
    quantization = quantization and quantization.for_modules(modules)
    for module in modules:
        scheme = quantization.scheme_of(module) if quantization else None
        for copy in range(module.copies):
            one = module._replace(name=module.name.replace(".experts.0.", f".experts.{copy}."))
            if scheme and scheme.bits < FULL_BITS:
                yield from _packed(one, scheme.bits, scheme.group_size)
            else:
                yield _plain(one, architecture)
            if one.bias:
                yield Stored(f"{one.name}.bias", "BF16", (one.num_outputs,), one.num_inputs, FULL_BITS)


def _packed(module: Module, bits: int, group_size: int) -> Iterator[Stored]:
    inputs, outputs = module.num_inputs, module.num_outputs
    groups = 1 if group_size == -1 else inputs // group_size
    yield Stored(f"{module.name}.qweight", "I32", (inputs * bits // 32, outputs), inputs, bits)
    yield Stored(f"{module.name}.qzeros", "I32", (groups, outputs * bits // 32), inputs, bits)
    yield Stored(f"{module.name}.scales", "F16", (groups, outputs), inputs, bits)


def _plain(module: Module, architecture: Architecture) -> Stored:
    name, shape = f"{module.name}.weight", (module.num_outputs, module.num_inputs)
    if module.name.endswith(("A_log", "dt_bias")):
        name = module.name
    if module.name.endswith("conv1d"):
        assert architecture.linear_attention is not None
        kernel = architecture.linear_attention.kernel_size
        shape = (module.num_outputs // kernel, 1, kernel)
    return Stored(name, "BF16", tuple(side for side in shape if side), module.num_inputs, FULL_BITS)


def _write_shard(
    file: BinaryIO, tensors: list[Stored], architecture: Architecture, random: np.random.Generator
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.num_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors:
        file.write(_values(tensor, architecture, random).tobytes())


def _values(tensor: Stored, architecture: Architecture, random: np.random.Generator) -> np.ndarray[Any, Any]:
    """Such that a layer keeps the size of what passes through it, as layers of trained models about do."""
    module, _, leaf = tensor.name.rpartition(".")
    deviation = max(1, tensor.inputs) ** -0.5
    packed = {
        "qweight": lambda: np.frombuffer(random.bytes(tensor.num_bytes), np.int32),
        "qzeros": lambda: np.full(tensor.shape, _zeros(tensor.bits), np.uint32),
        "scales": lambda: deviation * 12**0.5 / (1 << tensor.bits) * random.uniform(0.8, 1.2, tensor.shape),
    }
    if leaf in packed:
        values = packed[leaf]()
        return values.astype(np.float16) if leaf == "scales" else values
    if tensor.name.endswith("A_log"):
        return _bfloat16(np.log(random.uniform(1, 16, tensor.shape)))
    if tensor.name.endswith("dt_bias"):
        return _bfloat16(np.ones(tensor.shape))
    if "norm" in module:
        centred = architecture.model_type in _ZERO_CENTRED and not module.endswith("linear_attn.norm")
        return _bfloat16(np.full(tensor.shape, 0.0 if centred else 1.0))
    if module.endswith("embed_tokens"):
        deviation = 1.0
    if module.endswith("conv1d"):
        deviation = tensor.shape[-1] ** -0.5
    return _bfloat16((random.random(tensor.shape, dtype=np.float32) - 0.5) * (deviation * 12**0.5))


def _zeros(bits: int) -> int:
    """A word of stored zero points: each the middle code minus one."""
    return sum(((1 << (bits - 1)) - 1) << shift for shift in range(0, 32, bits))


def _bfloat16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The upper halves, which is rounding towards zero."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def main() -> None:
    """The command line."""
    known = models()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--like", choices=known, default="qwen3-next-80b")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--shard-bytes", type=int, default=_SHARD_BYTES)
    sizes = {"layers": "num_hidden_layers", "experts": "num_experts", "top-k": "num_experts_per_tok"}
    sizes |= {"hidden": "hidden_size", "width": "moe_intermediate_size", "vocabulary": "vocab_size"}
    for option in sizes:
        parser.add_argument(f"--{option}", type=int)
    given = vars(parser.parse_args())
    changes = {key: value for option, key in sizes.items() if (value := given[option.replace("-", "_")])}
    make_checkpoint(
        given["directory"], known[given["like"]] | changes, seed=given["seed"], shard_bytes=given["shard_bytes"]
    )


if __name__ == "__main__":
    main()
