"""Tiny models of many architectures with random weights, a tokenizer for them, and the engine on top."""

import copy
import functools
from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.engines.padded import PaddedEngine
from pipeline.engines.slots import SlotEngine
from pipeline.records import Completion, Item, Request, Settings

torch.set_num_threads(1)  # tests run in parallel, and these models have nothing to share out

NUM_TOKENS = 272  # bytes and special tokens, and some that the tokenizer does not know, as real models have
END, PAD, OPEN, CLOSE = 256, 257, 258, 259
ENDS = [END, *range(94, 190, 2)]  # so many that random answers end by themselves; none of them is ASCII
THINKING: Any = SimpleNamespace(open_id=OPEN, close_id=CLOSE)
SHAPE = {
    "vocab_size": NUM_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # large, so that the best token is rarely nearly tied
    "eos_token_id": END,
    "pad_token_id": PAD,
    "bos_token_id": None,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
CONFIGS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(**SHAPE, **EXPERTS),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SHAPE, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
    ),
    "qwen3-next": lambda: transformers.Qwen3NextConfig(
        **(SHAPE | EXPERTS | DELTA_NET), shared_expert_intermediate_size=16
    ),
    "qwen3.5": lambda: transformers.Qwen3_5TextConfig(**(SHAPE | DELTA_NET)),
    "qwen3.5-moe": lambda: transformers.Qwen3_5MoeTextConfig(
        **(SHAPE | EXPERTS | DELTA_NET), shared_expert_intermediate_size=16
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=NUM_TOKENS,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        initializer_range=0.3,
        eos_token_id=END,
        pad_token_id=PAD,
        bos_token_id=None,
    ),
    # No position_ids: positions come from the attention mask.
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=NUM_TOKENS,
        hidden_size=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.3,
        eos_token_id=END,
        pad_token_id=PAD,
        bos_token_id=None,
    ),
    # No attention: its cache has another name and no columns.
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=NUM_TOKENS,
        hidden_size=32,
        state_size=8,
        num_hidden_layers=2,
        initializer_range=0.3,
        eos_token_id=END,
        pad_token_id=PAD,
        bos_token_id=None,
    ),
}


@cache
def tiny_model(name: str) -> Any:
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()
    model.generation_config.eos_token_id = ENDS
    return model


def tampered(
    before: Callable[[torch.Tensor], None] | None = None,
    after: Callable[[Any], None] | None = None,
    name: str = "llama",
) -> Any:
    """A tiny model that calls `before` with the input ids of each call and `after` with its output."""
    model = copy.deepcopy(tiny_model(name))
    original = model.forward

    @functools.wraps(original)
    def forward(**inputs: Any) -> Any:
        if before:
            before(inputs["input_ids"])
        output = original(**inputs)
        if after:
            after(output)
        return output

    model.forward = forward
    return model


@cache
def bytes_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: place for place, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>", "<pad>", "<think>", "</think>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


ENGINES = ("padded", "slots")
PACKED = (
    "llama",
    "qwen3",
    "qwen3-moe",
    "gemma3",
    "qwen3-next",
    "qwen3.5",
    "gpt2",
)  # the architectures that slots serve


def engine_of(model: Any, tokenizer: Any = None, *, engine: str = "padded", **changes: Any) -> Any:
    options: dict[str, Any] = {
        "thinking": None,
        "slots": 4,
        "cache_tokens": 2000,
        "window": 16,
        "report": pytest.fail,
    }
    kind = {"padded": PaddedEngine, "slots": SlotEngine}[engine]
    return kind(model, tokenizer or bytes_tokenizer(), **(options | changes))


def request(index: int, prompt: Sequence[int], *, sample: int = 0, **settings: Any) -> Request:
    item = Item(index=index, file="in.jsonl", line=index + 1, offset=0)
    settings = {"max_new_tokens": 12} | settings
    return Request(item=item, sample=sample, token_ids=tuple(prompt), settings=Settings(**settings))


def prompts(count: int, seed: int = 0, longest: int = 30) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]


def answers(engine: Any, requests: Sequence[Request]) -> dict[tuple[int, int], Completion]:
    found = [answer for answer in engine.generate(iter(requests)) if answer is not None]
    assert sorted((answer.item.index, answer.sample) for answer in found) == sorted(
        (request.item.index, request.sample) for request in requests
    )
    return {(answer.item.index, answer.sample): answer for answer in found}


def texts(found: dict[tuple[int, int], Completion]) -> dict[tuple[int, int], tuple[str | None, str, int]]:
    return {
        key: (answer.text, answer.finish_reason, answer.usage.completion_tokens if answer.usage else 0)
        for key, answer in found.items()
    }
