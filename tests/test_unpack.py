"""An unpacked model, against auto-round's own reading of the same checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.facts.checkpoint import open_checkpoint
from pipeline.loading.builtin import prepare_builtin
from pipeline.loading.unpack import load_unpacked, read_unpacked

REPOSITORY = Path(__file__).parent.parent

# In a process of its own: auto-round changes how transformers builds and reads this architecture, for good. Its
# modules compute in the type of their input, so in float32 with float32 scales nothing is rounded.
STOCK = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = torch.nn.Module.float(AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16))
tensors = {"logits": model(torch.arange(40)[None]).logits.detach()}
for name, module in model.named_modules():
    if hasattr(module, "qweight"):
        tensors[name + ".weight"] = module(torch.eye(module.infeatures)).T.detach().contiguous()
save_file(tensors, sys.argv[2])
"""


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_builtin("tiny-qwen3-next", cache_dir=tmp_path_factory.mktemp("cache"))


def test_unpacked_weights_and_scores_are_those_of_auto_round(model_path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", STOCK, str(model_path), str(tmp_path / "stock")]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, timeout=300)
    stock = load_file(tmp_path / "stock")
    ours = read_unpacked([model_path / "model.safetensors"], torch.float32)
    expected = stock.pop("logits")
    assert len(stock) == 3 * (2 + 3) + (4 + 3) + 4 * 16 * 3  # projections and shared experts, and the routed experts
    for name, weight in stock.items():
        assert torch.equal(ours[name], weight), name
    model, info = load_unpacked(open_checkpoint(model_path), torch.float32)
    assert not any(info.values())
    with torch.inference_mode():
        logits = model(torch.arange(40)[None]).logits
    assert torch.isfinite(logits).all()
    assert (logits - expected).abs().max() < 1e-3 * expected.std()


def test_the_model_is_an_ordinary_one(model_path: Path) -> None:
    model, _ = load_unpacked(open_checkpoint(model_path), torch.bfloat16)
    kinds = {type(module).__name__ for module in model.modules()}
    assert "Qwen3NextExperts" in kinds
    assert "QuantLinear" not in kinds
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not hasattr(model.config, "quantization_config")
    assert not model.training
    settings = json.loads((model_path / "generation_config.json").read_text())
    assert model.generation_config.eos_token_id == settings["eos_token_id"]


def test_missing_weights_are_told(model_path: Path, tmp_path: Path) -> None:
    for path in model_path.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    name = "model.layers.3.self_attn.q_proj"
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(name)}
    save_file(kept, tmp_path / "shard.safetensors", metadata={"format": "pt"})
    (tmp_path / "shard.safetensors").replace(tmp_path / "model.safetensors")
    _, info = load_unpacked(open_checkpoint(tmp_path), torch.float32)
    assert info["missing_keys"] == {f"{name}.weight"}


@pytest.mark.parametrize("packing", ["auto_round:auto_awq", None])
def test_another_packing_is_refused(model_path: Path, tmp_path: Path, packing: str | None) -> None:
    for path in model_path.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["packing_format"] = packing
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="packed as"):
        load_unpacked(open_checkpoint(tmp_path), torch.float32)
