"""Facts of models: the flagship's published figures, estimates that equal headers, and transformers' own modules."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import NotFoundError
from pipeline.facts.model_facts import EXPERTS, ModelFacts, facts_from_config, part_of, read_facts
from tests.model_files import FLAGSHIP, INT4, LLAMA, QWEN3_NEXT, expected_tensors, write_model, write_shard

GB = 1e9
INSTRUCT = FLAGSHIP.with_name(FLAGSHIP.name.replace("thinking", "instruct"))


def facts_of(config: dict[str, Any]) -> ModelFacts:
    return facts_from_config(config, name="test")


@pytest.mark.parametrize("directory", [FLAGSHIP, INSTRUCT], ids=["thinking", "instruct"])
def test_the_flagship_has_its_published_size(directory: Path) -> None:
    facts = read_facts(directory)
    assert facts.estimated
    assert facts.num_parameters == pytest.approx(79.7 * GB, rel=0.002)
    assert facts.disk_bytes == pytest.approx(43.2 * GB, rel=0.005)
    # Per expert linear 544,768 bytes of qweight, scales and qzeros; 3 x 512 x 48 of them.
    assert facts.part(EXPERTS).disk_bytes == 544_768 * 3 * 512 * 48
    everything_else = facts.disk_bytes - facts.part(EXPERTS).disk_bytes
    assert everything_else == pytest.approx(3.1 * GB, rel=0.02)
    assert sum(part.num_bytes(2, unpacked=True) for part in facts.parts if part.name != EXPERTS) == pytest.approx(
        4.7 * GB, rel=0.02
    )


def test_the_flagship_keeps_its_published_state() -> None:
    facts = read_facts(FLAGSHIP)
    assert facts.kv_bytes_per_token(2) == 24_576
    window = facts.state_bytes_per_sequence(2) - 75_497_472  # beside the states, both float32
    assert window == pytest.approx(2.4e6 * 2 * 3 / 4, rel=0.02)
    assert Counter(facts.architecture.layer_types) == {"linear_attention": 36, "full_attention": 12}
    assert facts.architecture.context_length == 262_144


def test_the_flagship_has_its_recipe_of_bits() -> None:
    facts = read_facts(FLAGSHIP)
    bits = {part.name: part.bits for part in facts.parts}
    assert bits == {
        EXPERTS: (4,),
        **{"shared experts": (8,), "attention": (8,), "linear attention": (8, 16)},
        **{"routers": (16,), "embeddings": (16,), "head": (16,), "norms": ()},
    }
    assert facts.can_unpack
    assert facts.quantization is not None
    assert facts.quantization.symmetric


MIXED = INT4 | {
    "extra_config": {
        "model.layers.3.self_attn.q_proj": {"bits": 8},
        ".*linear_attn.in_proj_qkvz": {"bits": 8, "group_size": 16},
        "shared_expert_gate": {"bits": 16},
        "lm_head": {"bits": 8},
    }
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama int4": LLAMA | {"quantization_config": INT4},
    "llama with biases": LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "qwen2": LLAMA | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen3": LLAMA | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 24},
    "qwen3_moe": {
        **LLAMA,
        **{"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 16},
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [0]},
    },
    "qwen3_next": QWEN3_NEXT,
    "qwen3_next mixed": QWEN3_NEXT | {"quantization_config": MIXED},
    "qwen3_5_moe text": QWEN3_NEXT | {"model_type": "qwen3_5_moe_text", "architectures": ["Qwen3_5MoeForCausalLM"]},
    "qwen3_5_moe": {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "tie_word_embeddings": False,
        "text_config": {key: value for key, value in QWEN3_NEXT.items() if key != "architectures"}
        | {"model_type": "qwen3_5_moe_text"},
        "quantization_config": INT4 | {"block_name_to_quantize": "model.language_model.layers"},
    },
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_what_the_configuration_promises_is_what_the_headers_say(tmp_path: Path, config: dict[str, Any]) -> None:
    stored, estimated = read_facts(write_model(tmp_path, config)), facts_of(config)
    assert estimated.estimated
    assert not stored.estimated
    assert stored.parts == estimated.parts
    shards = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert 0 < sum(shards) - stored.disk_bytes < 2**18  # the headers


def test_overrides_of_bits_follow_auto_rounds_rule() -> None:
    quantization = facts_of(CONFIGS["qwen3_next mixed"]).quantization
    assert quantization is not None
    modules = {module.name: module for module in facts_of(QWEN3_NEXT).architecture.modules()}
    quantization = quantization.for_modules(modules.values())
    bits = {name: quantization.scheme_of(module).bits for name, module in modules.items()}
    assert bits["model.layers.3.self_attn.q_proj"] == 8  # by its name
    assert bits["model.layers.3.self_attn.k_proj"] == 4  # the default
    assert bits["model.layers.0.linear_attn.in_proj_qkvz"] == 8  # by a pattern ...
    assert quantization.scheme_of(modules["model.layers.0.linear_attn.in_proj_qkvz"]).group_size == 16
    assert bits["model.layers.1.mlp.shared_expert_gate"] == 16  # ... which may lie anywhere in the name
    assert bits["model.layers.0.linear_attn.in_proj_ba"] == 16  # eight outputs do not fill words
    assert bits["model.layers.0.mlp.gate"] == 16  # a router is no linear layer
    assert bits["lm_head"] == 8  # outside the blocks, but named
    assert bits["model.embed_tokens"] == 16


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(.*)*x", ".*.*.*.*.*.*x", "a" * 500, "[", "model.layers.0.mlp.experts.7."]
)
def test_patterns_that_could_take_for_ever_are_not_tried(pattern: str) -> None:
    config = QWEN3_NEXT | {"quantization_config": INT4 | {"extra_config": {pattern: {"bits": 8}}}}
    assert facts_of(config).parts == facts_of(QWEN3_NEXT | {"quantization_config": INT4}).parts


def test_tensors_that_are_never_loaded_are_set_aside(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    extra = {
        "mtp.layers.0.mlp.experts.0.up_proj.weight": ("BF16", (8, 8)),
        "model.visual.patch.weight": ("F32", (2, 2)),
    }
    write_shard(tmp_path / "model.safetensors", expected_tensors(LLAMA) | extra)
    facts, plain = read_facts(tmp_path), facts_of(LLAMA)
    assert facts.part("set aside").disk_bytes == 8 * 8 * 2 + 2 * 2 * 4
    assert facts.loaded_parts == plain.parts
    assert facts.disk_bytes - plain.disk_bytes == 144


def test_experts_may_be_stored_stacked(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_NEXT))
    tensors = {name: shape for name, shape in expected_tensors(QWEN3_NEXT).items() if ".experts." not in name}
    for layer in range(4):
        tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = ("BF16", (8, 64, 64))
        tensors[f"model.layers.{layer}.mlp.experts.down_proj"] = ("BF16", (8, 64, 32))
    write_shard(tmp_path / "model.safetensors", tensors)
    assert read_facts(tmp_path).parts == facts_of(QWEN3_NEXT).parts


@given(bits=st.sampled_from([2, 4, 8]), group_size=st.sampled_from([16, 32, -1]), value_bytes=st.sampled_from([2, 4]))
def test_packed_and_unpacked_count_the_same_parameters(bits: int, group_size: int, value_bytes: int) -> None:
    packed = facts_of(QWEN3_NEXT | {"quantization_config": INT4 | {"bits": bits, "group_size": group_size}})
    plain = facts_of(QWEN3_NEXT)
    for part in plain.parts:
        quantized = packed.part(part.name)
        assert quantized.num_parameters == part.num_parameters
        assert quantized.num_bytes(value_bytes, unpacked=True) == part.num_bytes(value_bytes)
        assert quantized.num_bytes(value_bytes) <= part.num_bytes(value_bytes)
        # The codes alone are the least it can take.
        assert 8 * quantized.packed_bytes >= bits * quantized.packed_parameters


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"num_hidden_layers": 0, "hidden_size": "64"}, ("num_hidden_layers", "hidden_size")),
        ({"num_hidden_layers": 10**12}, ("num_hidden_layers",)),
        ({"vocab_size": None}, ("vocab_size",)),
        ({"architectures": ["BertForMaskedLM"]}, ("architectures",)),
        ({"architectures": None}, ("architectures",)),
        ({"layer_types": ["full_attention"]}, ("layer_types",)),
        ({"layer_types": ["linear_attention"] * 2}, ("linear_num_value_heads",)),
        ({"quantization_config": {"bits": 4}}, ("quantization_config",)),
        ({"quantization_config": {"quant_method": "auto-round", "bits": 400}}, ("quantization_config",)),
        ({"model_type": "never_seen"}, ("never_seen",)),
    ],
)
def test_a_configuration_of_something_else_is_not_found(changes: dict[str, Any], fields: tuple[str, ...]) -> None:
    with pytest.raises(NotFoundError) as caught:
        facts_of(LLAMA | changes)
    assert all(field in str(caught.value) for field in fields)


def test_a_family_that_we_cannot_enumerate_is_read_from_its_headers(tmp_path: Path) -> None:
    write_model(tmp_path, LLAMA)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"model_type": "never_seen"}))
    assert read_facts(tmp_path).parts == facts_of(LLAMA).parts


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from pathlib import Path; import pipeline.plan.plan;"
        "from pipeline.facts.model_facts import read_facts;"
        f"read_facts(Path({str(FLAGSHIP)!r}));"
        "print({'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"


TRANSFORMERS = ("llama", "llama with biases", "qwen2", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_moe text")


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_parameters_by_part_are_those_of_transformers(family: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = CONFIGS[family]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    parts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parts[part_of(name if "." in name else f"{name}.")] += parameter.numel()
    assert parts == {part.name: part.num_parameters for part in facts_of(config).parts}


def test_cache_sizes_are_those_of_transformers() -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**QWEN3_NEXT)).eval()
    facts = facts_of(QWEN3_NEXT)
    with torch.inference_mode():
        cache = model(torch.zeros(2, 5, dtype=torch.long), use_cache=True).past_key_values
    kept: Counter[str] = Counter()
    for layer in cache.layers:
        if hasattr(layer, "keys") and layer.keys is not None:
            kept["attention"] += layer.keys.nbytes + layer.values.nbytes
        else:
            kept["linear"] += sum(state.nbytes for state in (layer.conv_states[0], layer.recurrent_states[0]))
    assert kept["attention"] == 2 * 5 * facts.kv_bytes_per_token(4)
    assert kept["linear"] == 2 * facts.state_bytes_per_sequence(4)
