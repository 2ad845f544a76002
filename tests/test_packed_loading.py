"""Packed loading: the model is the one that the files describe, in memory, spread over places, or read from disk."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.make_checkpoint import make_checkpoint, models
from pipeline.errors import NotFoundError, SpecError
from pipeline.facts.checkpoint import open_checkpoint
from pipeline.facts.model_facts import read_facts
from pipeline.kernels.packed import PackedWeight
from pipeline.loading import load_model
from pipeline.loading.packed import load_packed
from pipeline.loading.unpack import load_unpacked
from pipeline.plan.plan import Plan, make_plan
from tests.model_files import INT4, LLAMA, write_model
from tests.test_loading import HERE
from tests.test_plan import job

torch.set_num_threads(1)

SMALL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 64}
LINEAR = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    **{"linear_conv_kernel_dim": 4, "shared_expert_intermediate_size": 64},
}
ALL_8 = {"bits": 8, "group_size": 32, "sym": True, "data_type": "int"}
RECIPE = INT4 | {
    "extra_config": {
        ".*self_attn.*": ALL_8,
        ".*shared_expert\\.": ALL_8,
        ".*in_proj_ba": {"bits": 16, "data_type": "float"},
    }
}


def config(like: str, **changes: Any) -> dict[str, Any]:
    sizes = SMALL | (EXPERTS if like != "qwen3-8b" else {}) | (LINEAR if like == "qwen3-next-80b" else {})
    return models()[like] | sizes | {"quantization_config": RECIPE} | changes


CONFIGS = {
    "qwen3-next": config("qwen3-next-80b"),
    "qwen3-moe": config("qwen3-30b-a3b", mlp_only_layers=[1]),
    "dense": config("qwen3-8b", tie_word_embeddings=True),
    "experts of 8 bits": config("qwen3-30b-a3b", quantization_config=INT4 | {"bits": 8, "group_size": 64}),
    "experts of 2 bits": config("qwen3-30b-a3b", quantization_config=INT4 | {"bits": 2}),
    "some experts as they are": config(
        "qwen3-30b-a3b", quantization_config=INT4 | {"extra_config": {r"layers\.2\.mlp\.experts": {"bits": 16}}}
    ),
}


def plan_of(directory: Path, **changes: Any) -> Plan:
    made = make_plan(job(path=str(directory), load_strategy="no-gpu"), HERE, read_facts(directory))
    return replace(made, **({"weights": "packed", "dtype": "float32"} | changes))


def scores(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(60).view(3, 20)).logits


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small flagship in several shards."""
    return make_checkpoint(tmp_path_factory.mktemp("packed") / "m", CONFIGS["qwen3-next"], shard_bytes=200_000)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_and_unpacked_give_the_same_scores(name: str, tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, CONFIGS[name])
    facts = read_facts(made)
    assert facts.can_pack
    loaded = load_model(plan_of(made, plain_kernel=False))
    unpacked, info = load_unpacked(open_checkpoint(made), torch.float32)
    assert not any(info.values())
    wanted = scores(unpacked)
    assert (scores(loaded.model) - wanted).abs().max() < 1e-4 * wanted.std()
    assert torch.equal(scores(loaded.model).argmax(-1), wanted.argmax(-1))
    kinds = {type(module).__name__ for module in loaded.model.modules()}
    assert "QuantizedLinear" in kinds
    assert ("QuantizedExperts" in kinds) == bool(facts.architecture.num_experts)
    needed = sum(part.num_bytes(4) for part in facts.loaded_parts)
    assert 0.7 * needed < loaded.weight_bytes < 1.05 * needed


@pytest.mark.parametrize("streamed", [0, 4])
def test_activations_of_8_bits_change_scores_a_little_and_are_only_for_packed_weights(
    directory: Path, streamed: int, tmp_path: Path
) -> None:
    spec = job(path=str(directory), load_strategy="no-gpu", activation="int8")
    made = make_plan(spec, HERE, read_facts(directory))
    assert (made.weights, made.activation) == ("packed", "int8")
    wanted = scores(load_model(plan_of(directory)).model)
    found = scores(load_model(replace(made, dtype="float32", num_streamed_layers=streamed)).model)
    # The median, since a near tie in a router of random weights sends a token to another expert.
    assert 1e-4 < (found - wanted).abs().median() / wanted.std() < 0.1
    plain = write_model(tmp_path / "plain", LLAMA)
    with pytest.raises(SpecError, match="is not quantized; use exact"):
        make_plan(job(path=str(plain), load_strategy="no-gpu", activation="int8"), HERE, read_facts(plain))


def test_a_model_that_also_sees_is_loaded_without_its_eyes(tmp_path: Path) -> None:
    text = config("qwen3-30b-a3b") | LINEAR | {"model_type": "qwen3_5_moe_text", "full_attention_interval": 2}
    quantization = text.pop("quantization_config")
    whole = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "text_config": text | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "quantization_config": quantization | {"block_name_to_quantize": "model.language_model.layers"},
        "tie_word_embeddings": False,
    }
    make_checkpoint(tmp_path, whole)
    tensors = load_file(tmp_path / "model.safetensors")
    alone = {name.replace("model.language_model.", "model."): tensor for name, tensor in tensors.items()}
    extra = {"mtp.layers.0.mlp.gate.weight": torch.ones(2, 2), "model.visual.patch_embed.weight": torch.ones(3)}
    save_file(tensors | extra, tmp_path / "model.safetensors", metadata={"format": "pt"})
    plan = plan_of(tmp_path)
    found = scores(load_model(plan).model)
    (tmp_path / "alone").mkdir()
    save_file(alone, tmp_path / "alone" / "model.safetensors", metadata={"format": "pt"})
    settings = whole["text_config"] | {"architectures": ["Qwen3_5MoeForCausalLM"], "quantization_config": quantization}
    (tmp_path / "alone" / "config.json").write_text(json.dumps(settings))
    wanted = scores(load_unpacked(open_checkpoint(tmp_path / "alone"), torch.float32)[0])
    assert (found - wanted).abs().max() < 1e-4 * wanted.std()


@pytest.mark.parametrize("streamed", [1, 2, 3, 4])
def test_experts_read_from_disk_for_every_pass_are_the_same(directory: Path, streamed: int) -> None:
    wanted = scores(load_model(plan_of(directory)).model)
    loaded = load_model(plan_of(directory, num_streamed_layers=streamed))
    kinds = [type(layer.mlp.experts).__name__ for layer in loaded.model.model.layers]  # type: ignore[union-attr]
    assert kinds.count("StreamedExperts") == streamed
    for _ in range(3):
        assert torch.equal(scores(loaded.model), wanted)


def test_a_pass_that_was_broken_off_does_not_mix_up_the_next(directory: Path) -> None:
    loaded = load_model(plan_of(directory, num_streamed_layers=4))
    wanted = scores(loaded.model)

    def stop(*_: object) -> None:
        raise RuntimeError("out of memory")

    handle = loaded.model.model.layers[2].mlp.register_forward_pre_hook(stop)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="out of memory"):
        scores(loaded.model)
    handle.remove()
    assert torch.equal(scores(loaded.model), wanted)


def test_files_that_vanish_while_experts_are_streamed_are_told(directory: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(directory, tmp_path / "copy")
    loaded = load_model(plan_of(copy, num_streamed_layers=4))
    for shard in copy.glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(NotFoundError, match="cut short"):
        scores(loaded.model)


def test_without_a_compiler_the_model_is_the_same(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = scores(load_model(plan_of(directory)).model)
    monkeypatch.setattr("pipeline.kernels.packed.native_library", lambda: None)
    monkeypatch.setattr("pipeline.kernels.place.native_library", lambda: None)
    found = scores(load_model(plan_of(directory)).model)
    assert (found - wanted).abs().max() < 1e-4 * wanted.std()


def test_experts_and_the_rest_lie_where_the_plan_says(directory: Path) -> None:
    """`meta` stands in for a GPU: tensors there have shapes and no values."""
    model, info = load_packed(
        plan_of(directory, device="meta", plain_kernel=False, expert_layers_on_gpus=(1,)), open_checkpoint(directory)
    )
    assert not any(info.values())
    places = [
        {name: buffer.device.type for name, buffer in layer.mlp.experts.named_buffers()}  # type: ignore[union-attr]
        for layer in model.model.layers  # type: ignore[union-attr]
    ]
    assert [set(place.values()) for place in places] == [{"meta"}, {"cpu"}, {"cpu"}, {"cpu"}]
    rest = {
        tensor.device.type
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if ".mlp.experts." not in name
    }
    assert rest == {"meta"}
    assert not any(type(module).__name__ == "QuantizedLinear" for module in model.modules())


def test_layers_of_experts_go_one_after_the_other_to_the_gpus_of_the_plan(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in has no numbers, so what is asked of it is written down."""
    asked: list[torch.device] = []

    def moved(weight: PackedWeight, device: torch.device) -> PackedWeight:
        asked.append(device)
        return PackedWeight(weight.codes.to(device), weight.scales.to(device), weight.bits)

    monkeypatch.setattr("pipeline.loading.packed._moved", moved)
    monkeypatch.setattr("pipeline.loading.packed.dequantize", lambda weight, dtype: weight.codes.to(dtype))
    plan = plan_of(directory, device="meta:2", plain_kernel=False, expert_layers_on_gpus=(1, 0, 0, 2))
    model, info = load_packed(plan, open_checkpoint(directory))
    assert not any(info.values())
    # Of each layer gate and up, and down; then dense layers, all on the main GPU.
    num_dense = len(asked) - 6
    assert [device.index for device in asked] == [0, 0, 3, 3, 3, 3, *[2] * num_dense] and num_dense > 0
    places = [{one.device.type for one in layer.mlp.experts.buffers()} for layer in model.model.layers]  # type: ignore[union-attr]
    assert places == [{"meta"}, {"meta"}, {"meta"}, {"cpu"}]


@pytest.mark.gpu
@pytest.mark.parametrize("on_gpu", [0, 2, 4])
def test_on_a_gpu_the_scores_are_the_same(directory: Path, on_gpu: int) -> None:
    wanted = scores(load_model(plan_of(directory)).model)
    loaded = load_model(plan_of(directory, device="cuda:0", plain_kernel=False, expert_layers_on_gpus=(on_gpu,)))
    with torch.inference_mode():
        found = loaded.model(torch.arange(60, device="cuda:0").view(3, 20)).logits.cpu()
    assert (found - wanted).abs().max() < 1e-3 * wanted.std()


def test_zero_points_that_are_not_symmetric_are_refused(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, CONFIGS["qwen3-moe"])
    tensors = load_file(made / "model.safetensors")
    name = "model.layers.2.mlp.experts.5.up_proj.qzeros"
    tensors[name][0, 1] += 1
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotFoundError, match=name.replace(".", r"\.")):
        load_model(plan_of(made))


def damaged(directory: Path, change: Any) -> str:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotFoundError) as caught:
        read_facts(directory)
    return str(caught.value)


def test_tensors_that_do_not_fit_the_configuration_are_told_at_once(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, CONFIGS["qwen3-moe"])

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.0.self_attn.k_proj.scales"]
        del tensors["model.norm.weight"]
        name = "model.layers.3.mlp.experts.7.down_proj.qweight"
        tensors[name] = tensors[name][:-1].contiguous()
        tensors["model.layers.1.mlp.gate_proj.bias"] = torch.zeros(192)
        tensors["model.layers.4.mlp.gate_proj.bias"] = torch.zeros(192)  # beyond the layers: set aside

    message = damaged(made, change)
    assert "4 faults" in message
    assert "model.layers.0.self_attn.k_proj.scales is missing" in message
    assert "model.norm.weight is missing" in message
    assert "experts.7.down_proj.qweight is 7 x 128, and a layer of 64 to 128 has 8 x 128" in message
    assert "model.layers.1.mlp.gate_proj.bias has no place" in message


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quantization_config": INT4 | {"packing_format": "auto_round:auto_awq"}}, "not packed as"),
        ({"quantization_config": INT4 | {"sym": False}}, "not symmetric"),
        ({"hidden_act": "gelu"}, "activation"),
        ({"quantization_config": INT4 | {"group_size": 16}}, "not of 16"),
    ],
)
def test_what_cannot_stay_packed_is_known_before_loading(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    facts = read_facts(make_checkpoint(tmp_path, CONFIGS["qwen3-moe"] | changes))
    assert facts.packed_fault is not None
    assert reason in facts.packed_fault
    assert not facts.can_pack


def test_experts_of_one_layer_that_differ_in_bits_are_left_to_transformers(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, CONFIGS["qwen3-moe"])
    tensors = load_file(made / "model.safetensors")
    name = "model.layers.2.mlp.experts.3.up_proj"
    for leaf, axis in (("qweight", 0), ("qzeros", 1)):
        tensors[f"{name}.{leaf}"] = torch.cat([tensors[f"{name}.{leaf}"]] * 2, axis)
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    assert "differ in bits" in str(read_facts(made).packed_fault)
