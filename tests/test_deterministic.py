"""Deterministic mode: scores and answers are the same bits in any company, order, slot and after any interruption.

Each comparison is also made in the normal mode, where it must find a difference: then it would find one here too.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engines import row_invariant as module
from pipeline.engines.packed_model import PackedModel
from pipeline.engines.row_invariant import row_invariant
from pipeline.engines.slot_cache import NotServedError, Span
from pipeline.engines.transformers import open_deterministic_engine
from pipeline.errors import MachineError, SpecError
from pipeline.kernels import plain
from pipeline.kernels.native import Native
from pipeline.loading.builtin import prepare_builtin
from pipeline.loading.packed_modules import put_linears_in_blocks
from pipeline.records import Request
from tests.tiny_models import PACKED, answers, bytes_tokenizer, engine_of, prompts, request, tampered, texts, tiny_model

pytestmark = pytest.mark.skipif(not plain.is_served(), reason="no C compiler")
CPU = torch.device("cpu")


# Functions of torch


def functions() -> dict[str, Any]:
    from torch.nn import functional

    weight = torch.randn(24, 33, generator=torch.Generator().manual_seed(2))
    bias = torch.randn(24, generator=torch.Generator().manual_seed(3))
    return {
        "linear": lambda x: functional.linear(x, weight, bias),
        "matmul": lambda x: x @ weight.T,
        "addmm": lambda x: torch.addmm(bias, x, weight.T),
        "gelu, another form": lambda x: functional.gelu(x, approximate="tanh"),
        "sigmoid of a tensor": lambda x: x.sigmoid(),
        "cos of many turns": lambda x: (x * 100).cos(),
        "exp, in place, in double precision": lambda x: x.double().exp_(),
        "silu of a part": lambda x: functional.silu(x[:, 3:20]),
        "silu in place": lambda x: functional.silu(x.clone(), inplace=True),
        "norm": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
        "softmax": lambda x: torch.softmax(x, dim=-1),
        **{name: getattr(functional, name, None) or getattr(torch, name) for name in module._POINTWISE},
    }


@pytest.mark.parametrize("name", functions())
def test_a_function_treats_all_rows_alike(name: str) -> None:
    function = functions()[name]
    x = torch.randn(1, 33, generator=torch.Generator().manual_seed(4)).repeat(2011, 1)
    torch.set_num_threads(3)
    try:
        with row_invariant():
            many, one, few = function(x), function(x[:1]), function(x[:7])
    finally:
        torch.set_num_threads(1)
    many, one, few = (numbers.nan_to_num(7.0) for numbers in (many, one, few))  # of logarithms
    assert torch.equal(many, many[:1].expand_as(many)), "each row of many"
    assert torch.equal(one, many[:1])
    assert torch.equal(few, many[:7])
    torch.testing.assert_close(many, function(x).nan_to_num(7.0), rtol=1e-5, atol=1e-5)


def test_torch_itself_does_not_treat_them_alike() -> None:
    differ = []
    for function in functions().values():
        x = torch.randn(1, 33, generator=torch.Generator().manual_seed(4)).repeat(2011, 1)
        many = function(x)
        differ.append(not torch.equal(many, function(x[:1]).expand_as(many)))
    assert sum(differ) >= 3, "else the tests above show nothing"


def test_a_long_row_is_summed_alone_as_beside_others() -> None:
    x = torch.rand(1, 100_003, generator=torch.Generator().manual_seed(5)).double()
    torch.set_num_threads(2)
    try:
        with row_invariant():
            assert torch.equal(x.sum(dim=-1, keepdim=True), x.repeat(3, 1).sum(dim=-1, keepdim=True)[:1])
    finally:
        torch.set_num_threads(1)


def test_what_is_not_row_by_row_is_refused_and_outer_products_pass() -> None:
    x = torch.randn(3, 4, 5)
    with row_invariant():
        assert (x[..., :1] @ x[:, :1]).shape == (3, 4, 5)
        for refused in (
            lambda: torch.bmm(x, x.transpose(1, 2)),
            lambda: x @ x.transpose(1, 2),
            lambda: torch.einsum("abc,abc->ab", x, x),
            lambda: torch.nn.functional.scaled_dot_product_attention(x, x, x),
            lambda: torch.addmm(x[0, 0], x[0, :, :4], x[1, :4], beta=2),
        ):
            with pytest.raises(NotServedError):
                refused()


# Scores of whole models


def scores(
    model: PackedModel, plan: Sequence[Sequence[tuple[int, Sequence[int], int, int]]]
) -> dict[int, torch.Tensor]:
    """Scores after all tokens of each slot, from steps that consist of (slot, prompt, begin, end)."""
    found: dict[int, list[torch.Tensor]] = {}
    model.resize(64 * 8)
    for step in plan:
        ordered = sorted(step, key=lambda part: not (part[2] and part[3] - part[2] == 1))
        token_ids = [token for _, prompt, begin, end in ordered for token in prompt[begin:end]]
        spans, first = [], 0
        for slot, _, begin, end in ordered:
            spans.append(Span(slot, first, end - begin, 64 * slot, begin))
            first += end - begin
        num_single = sum(part[2] > 0 and part[3] - part[2] == 1 for part in ordered)
        with torch.inference_mode():
            out = model.forward(token_ids, spans[:num_single], spans[num_single:], range(first))
        for (slot, *_), span in zip(ordered, spans, strict=True):
            found.setdefault(slot, []).append(out[span.first : span.first + span.num_tokens])
    return {slot: torch.cat(parts) for slot, parts in found.items()}


def in_company(prompt: Sequence[int], others: Sequence[Sequence[int]], cuts: Sequence[int], slot: int) -> Any:
    """Steps in which the prompt is cut at `cuts` and has other prompts beside it, in parts of their own."""
    ends = [*sorted({*cuts} - {0, len(prompt)}), len(prompt)]
    plan = []
    for number, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        step = [(slot, prompt, begin, end)]
        for place, other in enumerate(others):
            parts = len(other) * number // len(ends), len(other) * (number + 1) // len(ends)
            if parts[0] < parts[1]:
                step.append(((slot + 1 + place) % 8, other, *parts))
        plan.append(step)
    return plan


def fused(model: Any, prompt: Sequence[int], *, row_by_row: bool = True) -> PackedModel:
    packed = PackedModel(model, 8, row_by_row=row_by_row)
    with torch.inference_mode():
        packed.fuse(prompt)
    return packed


cut_places = st.lists(st.integers(1, 39), max_size=5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*PACKED, "qwen3.5-moe"])
def test_scores_are_the_same_bits_in_any_company(name: str, dtype: torch.dtype) -> None:
    prompt, others = list(range(10, 50)), prompts(6, seed=7)
    own: Any = copy.deepcopy(tiny_model(name)).to(dtype)
    in_blocks = copy.deepcopy(own)
    put_linears_in_blocks(in_blocks)
    models = [fused(one, prompt) for one in (own, in_blocks)]
    alone = [scores(model, [[(0, prompt, 0, 40)]])[0] for model in models]
    if dtype == torch.float32:  # in bfloat16 what follows a product in blocks is rounded once, with it
        assert torch.equal(*alone), "whatever the layout of its weights"

    @settings(max_examples=6)
    @given(
        *(st.lists(st.sampled_from(others), max_size=6), cut_places, st.integers(0, 7), st.integers(1, 3)),
        st.sampled_from([0, 1]),
    )
    def check(neighbours: list[list[int]], cuts: list[int], slot: int, threads: int, which: int) -> None:
        torch.set_num_threads(threads)
        try:
            found = scores(models[which], in_company(prompt, neighbours, cuts, slot))[slot]
            assert torch.equal(found, alone[which])
        finally:
            torch.set_num_threads(1)

    check()


@pytest.mark.parametrize("name", PACKED)
def test_in_the_normal_mode_they_are_not(name: str) -> None:
    model = PackedModel(tiny_model(name), 8)
    prompt, others = list(range(10, 50)), prompts(6, seed=7)
    alone = scores(model, [[(0, prompt, 0, 40)]])[0]
    assert any(not torch.equal(scores(model, in_company(prompt, others, [cut], 3))[3], alone) for cut in (7, 20, 39))


# Answers


def requests() -> list[Request]:
    """Greedy and sampled, with shared beginnings."""
    kinds: list[dict[str, Any]] = [{}, {"temperature": 1.2, "top_p": 0.9}, {"temperature": 0.8, "top_k": 9}]
    shared = list(range(40, 70))
    return [
        request(index, (shared if index % 3 == 0 else []) + prompt, max_new_tokens=5 + index % 11, **kinds[index % 3])
        for index, prompt in enumerate(prompts(18, seed=8))
    ]


@pytest.mark.parametrize("name", ["llama", "qwen3-next"])
def test_answers_do_not_mind_order_slots_or_the_size_of_steps(name: str) -> None:
    found = [
        texts(answers(engine_of(tiny_model(name), engine="slots", deterministic=True, **options), order))
        for options, order in (
            ({"slots": 1}, requests()),
            ({"slots": 3, "step_tokens": 8}, requests()[::-1]),
            ({"slots": 16, "cache_tokens": 400}, requests()[5:] + requests()[:5]),
        )
    ]
    assert found[0] == found[1] == found[2]
    assert found[0] == texts(answers(engine_of(tiny_model(name)), requests())), "and are those of the model itself"


@pytest.mark.parametrize("name", ["llama", "qwen3-next"])
def test_an_answer_that_is_taken_up_goes_on_as_if_it_had_never_stopped(name: str) -> None:
    engine = engine_of(tiny_model(name), engine="slots", deterministic=True)
    whole = answers(engine, requests())
    running = engine.generate(iter(requests()))
    taken: dict[tuple[int, int], tuple[int, ...]] = {}
    for _ in range(9):
        next(running)
        taken |= {(state.index, state.sample): state.token_ids for state in engine.unfinished()}
    running.close()
    assert taken
    resumed = [replace(one, generated=taken.get((one.item.index, 0), ())) for one in requests()]
    assert texts(answers(engine_of(tiny_model(name), engine="slots", deterministic=True, slots=7), resumed)) == texts(
        whole
    )


def test_a_greedy_answer_does_not_mind_its_place_in_the_input() -> None:
    lines = prompts(12, seed=9)
    engine = engine_of(tiny_model("qwen3-next"), engine="slots", deterministic=True)
    found = []
    for order in (range(12), [5, 2, 11, 0, 7, 1, 10, 3, 8, 4, 9, 6]):
        given = answers(engine, [request(place, lines[line]) for place, line in enumerate(order)])
        found.append({line: given[place, 0].text for place, line in enumerate(order)})
    assert found[0] == found[1]


# Opening


def opened(model: Any) -> Any:
    return open_deterministic_engine(
        model, bytes_tokenizer(), thinking=None, slots=4, cache_tokens=400, report=pytest.fail
    )


def test_a_model_is_tried_before_anything_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    opened(tiny_model("qwen3-moe"))
    monkeypatch.setattr(module, "matrix_linear", torch.ops.aten.linear)
    module._replacements.cache_clear()
    try:
        with pytest.raises(SpecError, match="its scores changed with the prompts beside them"):
            opened(tiny_model("qwen3"))
    finally:
        monkeypatch.undo()
        module._replacements.cache_clear()


@pytest.mark.parametrize("name", ["bloom", "mamba"])
def test_a_model_that_cannot_be_packed_is_refused(name: str) -> None:
    with pytest.raises(SpecError, match=r"cannot be promised for this model .positions are not an input") as caught:
        opened(tiny_model(name))
    assert caught.value.problems[0].field == "generation.deterministic"


def test_a_product_that_we_do_not_know_is_refused() -> None:
    def attend(output: Any) -> None:
        output.logits += torch.bmm(output.logits, output.logits.transpose(1, 2)).mean() * 0

    with pytest.raises(SpecError, match="computes bmm in a way that is not row by row"):
        opened(tampered(after=attend))


def test_without_a_compiler_the_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "is_served", lambda: False)
    monkeypatch.setattr("pipeline.engines.transformers.native", lambda _: Native(None, "there is no C compiler"))
    with pytest.raises(MachineError, match="there is no C compiler; install gcc"):
        opened(tiny_model("llama"))


@pytest.mark.slow
def test_the_real_model_gives_the_same_bits_in_any_company() -> None:
    import transformers

    directory = prepare_builtin("smollm2-135m-bf16")
    real = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    prompt, others = list(range(1000, 1040)), [list(range(500 + 7 * place, 520 + 9 * place)) for place in range(6)]
    found = []
    for row_by_row in (True, False):
        model = fused(real, prompt, row_by_row=row_by_row)
        alone = scores(model, [[(0, prompt, 0, 40)]])[0]
        again = [scores(model, in_company(prompt, others, cuts, 3))[3] for cuts in ([], [7], [11, 39])]
        found.append(all(torch.equal(one, alone) for one in again))
    assert found == [True, False]
