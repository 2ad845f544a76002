"""On a real GPU: packed steps give what stock `generate` gives there, and whole runs go where the plan says."""

import copy
import json
from pathlib import Path

import pytest
import torch

from benchmarks.make_checkpoint import make_checkpoint
from tests.command import overnight
from tests.test_exactness import stock_tokens, tokens_of
from tests.test_packed_loading import CONFIGS
from tests.tiny_models import PACKED, engine_of, prompts, request, tampered, tiny_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", PACKED)
def test_answers_are_those_of_stock_generate(name: str) -> None:
    model = copy.deepcopy(tiny_model(name)).cuda()
    requests = [request(index, prompt, ignore_eos=True) for index, prompt in enumerate(prompts(24, seed=6, longest=70))]
    engine = engine_of(model, engine="slots", slots=8, step_tokens=64)
    difference, rounding = engine.self_check()
    assert difference <= rounding
    assert tokens_of(engine, requests) == [stock_tokens(model, one) for one in requests]


def test_a_step_that_runs_out_of_gpu_memory_is_computed_in_smaller_ones() -> None:
    """The real allocator refuses."""
    refused: list[int] = []

    def take_all(token_ids: torch.Tensor) -> None:
        if token_ids.is_cuda and token_ids.shape[1] > 1000:
            refused.append(token_ids.shape[1])
            torch.empty(torch.cuda.mem_get_info()[1], dtype=torch.uint8, device="cuda")

    requests = [request(index, [1 + index] * 200, ignore_eos=True) for index in range(16)]
    options = {"slots": 16, "cache_tokens": 5000, "step_tokens": 4000}
    expected = tokens_of(engine_of(copy.deepcopy(tiny_model("llama")).cuda(), engine="slots", **options), requests)
    told: list[str] = []
    engine = engine_of(tampered(take_all).cuda(), engine="slots", report=told.append, **options)
    assert tokens_of(engine, requests) == expected
    assert refused
    assert engine.out_of_memory_events == len(refused)
    assert any("out of memory" in one for one in told)


@pytest.mark.parametrize(("strategy", "on_gpu"), [("min-gpu", 0), ("max-gpu", 4)])
def test_a_whole_run(strategy: str, on_gpu: int, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "m", CONFIGS["qwen3-next"])
    lines = [{"id": str(number), "prompt": f"line {number} " * (1 + number % 9)} for number in range(60)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "job.yaml").write_text(
        f"model: {{path: m, load_strategy: {strategy}, strict: true}}\n"
        "input: {path: in.jsonl}\noutput: {path: out.jsonl}\n"
        "generation: {max_new_tokens: 24, ignore_eos: true}\n"
    )
    planned = json.loads(overnight("plan", "job.yaml", "--json", cwd=tmp_path).stdout)
    assert sum(planned["expert_layers_on_gpus"]) == on_gpu
    run = overnight("run", "job.yaml", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer["index"] for answer in answers if "index" in answer] == list(range(60))
    assert all(answer.get("error") is None for answer in answers)
    assert overnight("verify", "job.yaml", cwd=tmp_path).returncode == 0
