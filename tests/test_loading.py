"""Loading: what comes out is the model that the plan and the files describe, or a refusal."""

from __future__ import annotations

import gc
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import loading
from pipeline.errors import MachineError, NotFoundError, SpecError
from pipeline.facts.model_facts import read_facts
from pipeline.job import prepare
from pipeline.kernels.plain import is_served
from pipeline.loading import apply_environment, load_model
from pipeline.machine import Machine
from pipeline.plan.plan import Plan, make_plan
from pipeline.prompting import encoder
from pipeline.source.inputs import expand_inputs
from pipeline.spec.keys import JobSpec
from tests.model_files import INT4, LLAMA, write_model
from tests.tiny_models import bytes_tokenizer

GIB = 1 << 30
HERE = Machine(
    name="test", physical_cores=1, logical_cpus=1, memory_total_bytes=16 * GIB, memory_available_bytes=16 * GIB
)


def plan_of(directory: Path, **changes: Any) -> Plan:
    spec = JobSpec.model_validate(
        {"model": {"path": str(directory), "load_strategy": "no-gpu"}, "input": {"path": "x"}, "output": {"path": "y"}}
    )
    return replace(make_plan(spec, HERE, read_facts(directory)), **changes)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights as transformers saves it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("models") / "plain"
    model = LlamaForCausalLM(LlamaConfig(**LLAMA)).to(torch.bfloat16)  # type: ignore[arg-type]
    model.generation_config.eos_token_id = [2, 7]
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def packed(llama: Path) -> Path:
    """The same quantized to 4 bits in AutoRound's format."""
    from safetensors.torch import load_file, save_file

    from pipeline.loading.autoround_format import pack_symmetric

    directory = llama.with_name("packed")
    shutil.copytree(llama, directory)
    state: dict[str, Any] = {}
    for name, tensor in load_file(llama / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            state |= pack_symmetric(tensor, 4, 32).named(name.removesuffix(".weight"))
        else:
            state[name] = tensor
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((llama / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": INT4}))
    return directory


def logits(loaded: Any) -> Any:
    import torch

    with torch.inference_mode():
        return loaded.model(torch.arange(12).view(2, 6)).logits.float()


def test_an_unquantized_model_is_loaded_as_planned_and_in_silence(
    llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import torch

    plan = replace(plan_of(llama), plain_kernel=False)
    loaded = load_model(plan)
    assert plan.dtype == "float32"
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    assert not loaded.model.training
    assert loaded.device == "cpu"
    assert loaded.peak_host_bytes > loaded.weight_bytes
    assert loaded.load_s > 0
    assert capfd.readouterr() == ("", "")
    bfloat16 = load_model(replace(plan, dtype="bfloat16"))
    assert {parameter.dtype for parameter in bfloat16.model.parameters()} == {torch.bfloat16}
    assert torch.allclose(logits(loaded), logits(bfloat16), atol=0.02)


def test_without_bfloat16_instructions_linear_layers_keep_bfloat16_weights_and_the_scores(llama: Path) -> None:
    import torch

    plan = plan_of(llama)
    assert plan.plain_kernel
    plain, ours = load_model(replace(plan, plain_kernel=False)), load_model(plan)
    assert torch.allclose(logits(ours), logits(plain), atol=1e-6)
    parts = {"attention", "mlp", "embeddings", "norms", "head in blocks"}
    planned = sum(need.num_bytes for need in plan.budgets[0].needs if need.part in parts)
    assert planned <= ours.weight_bytes < planned + 10_000  # and the rotary frequencies
    assert next(ours.model.parameters()).dtype == ours.model.config.dtype == torch.float32
    layers = [module for module in plain.model.modules() if type(module) is torch.nn.Linear]
    linear = sum(layer.weight.nbytes for layer in layers)
    assert is_served()
    embedding = plain.model.get_input_embeddings().weight.nbytes  # it shares its matrix with the head, and keeps it
    assert ours.weight_bytes == plain.weight_bytes - linear / 2 + embedding


def test_what_stays_bfloat16_is_never_held_in_float32(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That would be the peak of the load. With one tensor of another type nothing is narrowed, and so the plan says."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    types: list[torch.dtype] = []
    own = AutoModelForCausalLM.from_pretrained

    def spy(*directory: Any, **named: Any) -> Any:
        types.append(named["dtype"])
        return own(*directory, **named)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    mixed = shutil.copytree(llama, tmp_path / "mixed")
    state = load_file(llama / "model.safetensors")
    exact = state["model.norm.weight"] = state["model.norm.weight"].float() + 2e-4  # no bfloat16
    save_file(state, mixed / "model.safetensors", metadata={"format": "pt"})
    plans = [plan_of(llama), plan_of(mixed)]
    narrow, wide = (next(need.num_bytes for need in plan.budgets[0].needs if need.part == "mlp") for plan in plans)
    assert wide == 2 * narrow
    loaded = [load_model(plan) for plan in plans]
    assert types == [torch.bfloat16, torch.float32]
    assert torch.equal(loaded[1].model.get_parameter("model.norm.weight"), exact)


@pytest.mark.parametrize("weights", ["stock", "unpacked"])
def test_a_model_in_bfloat16_may_have_its_linear_layers_in_blocks_too(llama: Path, packed: Path, weights: Any) -> None:
    plan = replace(plan_of(llama if weights == "stock" else packed, weights=weights), dtype="bfloat16")
    torchs, ours = load_model(replace(plan, plain_kernel=False)), load_model(replace(plan, plain_kernel=True))
    assert "PlainLinear" in {type(module).__name__ for module in ours.model.modules()}
    found, wanted = logits(ours), logits(torchs)
    assert found.dtype == wanted.dtype
    assert (found - wanted).float().square().mean().sqrt() < 0.02 * wanted.float().std()


def test_packed_and_unpacked_loading_give_the_same_model(packed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import torch

    unpacked = load_model(plan_of(packed, weights="unpacked", plain_kernel=False))
    stock = load_model(plan_of(packed, weights="stock", plain_kernel=False))
    assert capfd.readouterr() == ("", "")
    assert torch.allclose(logits(unpacked), logits(stock), atol=1e-3)
    assert logits(unpacked).std() > 0.05
    assert unpacked.model.generation_config.eos_token_id == stock.model.generation_config.eos_token_id == [2, 7]  # type: ignore[union-attr]
    assert {type(layer) for layer in unpacked.model.modules() if "Linear" in type(layer).__name__} == {torch.nn.Linear}
    assert stock.weight_bytes < unpacked.weight_bytes / 2
    assert next(iter(stock.model.parameters())).dtype == torch.float32


def test_missing_weights_are_not_made_up(llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(llama, tmp_path / "model")
    state = load_file(llama / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotFoundError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(plan_of(tmp_path / "model"))


def test_weights_of_another_shape_are_not_loaded(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "model")
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    with pytest.raises(NotFoundError, match="do not fit the configuration"):
        load_model(plan_of(tmp_path / "model"))


def test_a_type_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, LLAMA)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"model_type": "never_seen"}))
    with pytest.raises(SpecError, match="does not know models of type 'never_seen'"):
        load_model(plan_of(tmp_path))


def test_what_cannot_be_loaded_is_refused_before_any_of_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path, LLAMA)
    plan = plan_of(model)
    monkeypatch.setattr("pipeline.loading.load_stock", None)
    (model / "modeling.py").write_text("import os")
    with pytest.raises(SpecError, match="Python code"):
        load_model(plan)
    (model / "modeling.py").unlink()
    (model / "model.safetensors").unlink()
    with pytest.raises(NotFoundError, match="no weights"):
        load_model(plan)


def test_memory_that_runs_out_and_libraries_that_lack_are_the_machines_fault(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (MemoryError("no room"), ImportError("No module named 'kernels'")):

        def fail(*_args: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setitem(loading._LOADERS, "stock", fail)
        with pytest.raises(MachineError, match=str(error)):
            load_model(plan_of(llama))


def test_the_environment_is_as_planned(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    threads = torch.get_num_threads()
    try:
        apply_environment(
            plan_of(llama, num_threads=3, environment=(("OMP_NUM_THREADS", "3"), ("TOKENIZERS_PARALLELISM", "false")))
        )
        assert torch.get_num_threads() == 3
        assert os.environ["OMP_NUM_THREADS"] == "3"
        assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    finally:
        torch.set_num_threads(threads)


def test_garbage_is_looked_for_more_rarely_but_not_where_it_is_never(llama: Path) -> None:
    usual = gc.get_threshold()
    try:
        for set_, expected in ((700, 200_000), (0, 0), (10**6, 10**6)):
            gc.set_threshold(set_)
            apply_environment(plan_of(llama, environment=()))
            assert gc.get_threshold()[0] == expected
    finally:
        gc.set_threshold(*usual)


def test_the_tokenizer_of_a_plan_that_is_revised_is_read_once_and_after_the_environment_is_set(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str | None] = []

    def load_tokenizer(_directory: Path, *, trust_remote_code: bool) -> Any:
        reads.append(os.environ.get("GOMP_SPINCOUNT"))
        return bytes_tokenizer()

    monkeypatch.setattr(encoder, "load_tokenizer", load_tokenizer)
    monkeypatch.setattr(loading.os, "environ", dict(os.environ))
    os.environ.pop("GOMP_SPINCOUNT", None)
    lines = tmp_path / "in.jsonl"
    lines.write_text('{"prompt": "a few words"}\n')
    spec = JobSpec.model_validate(
        {
            "model": {"path": str(llama), "load_strategy": "no-gpu"},
            "input": {"path": str(lines), "chat_template": "off"},
            "generation": {"max_new_tokens": 16},
            "batch": {"cache_tokens": 500},
            "output": {"path": "y"},
        }
    )
    plan, choice = prepare(spec, read_facts(llama), machine=HERE, files=expand_inputs(spec.input.path))
    choice.encoder()
    assert plan.slots == 500 // (len("a few words") + 16)
    assert reads == ["1000"]
