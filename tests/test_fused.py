"""Modules computed in fewer passes give what they give by themselves; those that would not are left alone."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import transformers

from pipeline.engines.fused import fused_forwards, keep_faithful
from pipeline.engines.packed_model import PackedModel
from pipeline.kernels import rowwise
from pipeline.kernels.native import native
from pipeline.loading.packed_modules import put_linears_in_blocks
from tests.test_exactness import stock_tokens, tokens_of
from tests.tiny_models import PACKED, SHAPE, engine_of, prompts, request, tiny_model

needs_compiler = pytest.mark.skipif(native(rowwise.SOURCE).library is None, reason="no C compiler")
PROMPT = list(range(1, 24))


def fused(model: Any) -> PackedModel:
    packed = PackedModel(model, 2)
    with torch.inference_mode():
        packed.fuse(PROMPT)
    return packed


@needs_compiler
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", {"LlamaRMSNorm": 5, "LlamaMLP": 2, "LlamaAttention": 2, "LlamaDecoderLayer": 2}),
        ("qwen3", {"Qwen3RMSNorm": 9, "Qwen3MLP": 2, "Qwen3Attention": 2, "Qwen3DecoderLayer": 2}),
        ("gemma3", {"Gemma3RMSNorm": 13, "Gemma3Attention": 2}),
        ("gpt2", {}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_fused(name: str, expected: dict[str, int], dtype: torch.dtype) -> None:
    packed = fused(copy.deepcopy(tiny_model(name)).to(dtype))
    assert Counter(type(module).__name__ for module in packed._fused) == expected


@pytest.mark.parametrize("name", PACKED)
def test_greedy_answers_of_fused_models_are_those_of_stock_token_for_token(name: str) -> None:
    model = copy.deepcopy(tiny_model(name))
    requests = [request(index, prompt, ignore_eos=True) for index, prompt in enumerate(prompts(14, seed=4, longest=60))]
    expected = [stock_tokens(tiny_model(name), one) for one in requests]
    engine = engine_of(model, engine="slots", slots=5, step_tokens=23)
    difference, rounding = engine.self_check()
    assert difference < rounding / 100
    assert tokens_of(engine, requests) == expected


@needs_compiler
@pytest.mark.parametrize("bias", [False, True])
def test_layers_in_blocks_are_one_product_too(bias: bool) -> None:
    shape = SHAPE | {"head_dim": 32, "hidden_size": 64, "intermediate_size": 96}
    torch.manual_seed(2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, attention_bias=bias, mlp_bias=bias)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    requests = [request(index, prompt, ignore_eos=True) for index, prompt in enumerate(prompts(6, seed=8))]
    expected = [stock_tokens(model, one) for one in requests]
    put_linears_in_blocks(model)
    engine = engine_of(model, engine="slots", slots=3, step_tokens=23)
    difference, rounding = engine.self_check()
    assert difference < rounding / 100
    assert len(engine._model._fused) == 11
    assert tokens_of(engine, requests) == expected
    attention = model.model.layers[0].self_attn
    one = attention.q_proj.blocks.untyped_storage().data_ptr()
    assert {layer.blocks.untyped_storage().data_ptr() for layer in (attention.k_proj, attention.v_proj)} == {one}


@needs_compiler
def test_the_models_own_weights_are_views_of_those_side_by_side_and_it_computes_as_before() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        before = model(input_ids=ids).logits
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    fused(model)
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=ids).logits, before)
    storages = {parameter.untyped_storage().data_ptr(): parameter.untyped_storage() for parameter in model.parameters()}
    assert sum(storage.nbytes() for storage in storages.values()) == num_bytes
    attention = model.model.layers[0].self_attn
    one = attention.q_proj.weight.untyped_storage().data_ptr()
    assert {layer.weight.untyped_storage().data_ptr() for layer in (attention.k_proj, attention.v_proj)} == {one}


@needs_compiler
def test_a_module_that_computes_something_else_is_left_alone() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    mlp, attention = model.model.layers[0].mlp, model.model.layers[1].self_attn
    own_mlp, own_attention = mlp.forward, attention.forward
    mlp.forward = lambda x: own_mlp(x) * 1.01
    attention.forward = lambda *inputs, position_embeddings, **named: own_attention(
        *inputs, position_embeddings=tuple(reversed(position_embeddings)), **named
    )
    packed = fused(model)
    assert {mlp, attention} < {*fused_forwards(model, packed.cache)}
    assert not {mlp, attention, *model.model.layers} & {*packed._fused}
    assert len(packed._fused) == 7


@needs_compiler
def test_a_layer_is_left_alone_with_a_part_whose_error_is_small_beside_the_residual() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    layer, other = model.model.layers
    mlp, own = layer.mlp, layer.mlp.forward
    with torch.no_grad():
        mlp.down_proj.weight.mul_(1e-4)
    mlp.forward = lambda x: own(x) * 1.01
    packed = fused(model)
    assert not {layer, mlp} & {*packed._fused}
    assert {other, layer.self_attn} < {*packed._fused}


def test_one_that_gives_a_tuple_is_not_replaced_by_one_that_does_not() -> None:
    class Twice(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (2 * x,)

    module, x = Twice(), torch.ones(1, 3)
    assert keep_faithful({module: lambda x: (x + x,)}, lambda: module(x))
    assert not keep_faithful({module: lambda x: x + x}, lambda: module(x))


@needs_compiler
def test_a_layer_that_adds_in_another_way_is_left_alone_and_its_parts_are_not() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    layer = model.model.layers[1]
    own = layer.forward
    layer.forward = lambda hidden_states, **named: hidden_states + own(hidden_states, **named)
    packed = fused(model)
    assert layer in fused_forwards(model, packed.cache)
    assert {type(module).__name__ for module in packed._fused if module in layer.modules()} == {
        *("LlamaRMSNorm", "LlamaMLP", "LlamaAttention")
    }


@needs_compiler
def test_a_module_that_another_library_hooks_is_left_alone() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    model.model.layers[0].mlp.down_proj._hf_hook = object()
    model.model.layers[0].self_attn._hf_hook = object()
    names = {type(module).__name__ for module in fused(model)._fused if module in model.model.layers[0].modules()}
    assert not {"LlamaAttention", "LlamaDecoderLayer"} & names
