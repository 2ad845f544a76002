"""The slot engine refills its slots at once, keeps sequences apart, and tells which models it cannot serve."""

import copy
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from pipeline.engines.packed_model import PackedModel
from pipeline.engines.padded import PaddedEngine
from pipeline.engines.slot_cache import NotServedError
from pipeline.engines.slots import SlotEngine
from pipeline.engines.transformers import open_engine
from pipeline.records import Request
from tests.tiny_models import (
    PACKED,
    answers,
    bytes_tokenizer,
    engine_of,
    prompts,
    request,
    tampered,
    texts,
    tiny_model,
)


def slots_of(model: Any, **changes: Any) -> SlotEngine:
    return engine_of(model, engine="slots", **changes)


@pytest.mark.parametrize("name", PACKED)
def test_prompts_in_small_parts_beside_others_give_the_same_answers(name: str) -> None:
    requests = [request(index, prompt) for index, prompt in enumerate(prompts(14, seed=3, longest=60))]
    whole = texts(answers(engine_of(tiny_model(name), slots=1), requests))
    for slots, step_tokens in ((3, 5), (14, 17), (7, 512)):
        engine = slots_of(tiny_model(name), slots=slots, step_tokens=step_tokens)
        assert texts(answers(engine, requests)) == whole


def test_steps_are_as_few_as_the_tokens_allow_and_never_larger_than_said() -> None:
    sizes: list[int] = []
    model = tampered(lambda ids: sizes.append(ids.shape[1]))
    requests = [request(index, [1 + index] * 20, max_new_tokens=10, ignore_eos=True) for index in range(8)]
    answers(slots_of(model, slots=4, step_tokens=44), requests)
    assert sum(sizes) == 8 * (20 + 9)
    assert max(sizes) <= 44
    assert len(sizes) <= 28


def test_a_longer_sequence_than_the_cache_holds_runs_alone_and_the_others_go_on() -> None:
    requests = [request(index, prompt) for index, prompt in enumerate(prompts(9, seed=5))]
    requests[4] = request(4, [7] * 90, max_new_tokens=40, ignore_eos=True)
    found = texts(answers(slots_of(tiny_model("llama"), cache_tokens=80), requests))
    assert found == texts(answers(engine_of(tiny_model("llama")), requests))


def test_requests_are_taken_as_slots_and_window_allow_and_each_step_gives_control_back() -> None:
    taken: list[int] = []

    def pull() -> Iterator[Request]:
        for index, prompt in enumerate(prompts(20)):
            taken.append(index)
            yield request(index, prompt, max_new_tokens=4, ignore_eos=True)

    answered = 0
    for answer in slots_of(tiny_model("llama"), slots=2, window=3).generate(pull()):
        assert len(taken) <= answered + 2 + 2 + 3
        assert not torch.is_inference_mode_enabled()  # ours, not the caller's
        answered += answer is not None
    assert answered == 20


def test_a_finished_sequence_is_replaced_at_once() -> None:
    sizes: list[int] = []
    model = tampered(lambda ids: sizes.append(ids.shape[1]))
    requests = [request(index, [1], max_new_tokens=4 + index % 5, ignore_eos=True) for index in range(40)]
    answers(slots_of(model, slots=4), requests)
    assert sum(size == 4 for size in sizes) >= len(sizes) - 9


def test_an_abandoned_iterator_leaves_nothing_in_flight_and_the_engine_usable() -> None:
    engine = slots_of(tiny_model("qwen3-next"))
    requests = [request(index, prompt, ignore_eos=True) for index, prompt in enumerate(prompts(6))]
    running = engine.generate(iter(requests))
    for _ in range(4):
        next(running)
    assert [(state.index, state.sample) for state in engine.unfinished()] == [
        (one.item.index, 0) for one in requests[: len(engine.unfinished())]
    ] or engine.unfinished()
    running.close()
    assert engine.unfinished() == []
    assert texts(answers(engine, requests)) == texts(answers(engine_of(tiny_model("qwen3-next")), requests))


def test_times_add_up_and_waiting_is_told_apart() -> None:
    model = tampered(lambda _: time.sleep(0.01))
    before, start = time.time(), time.perf_counter()
    requests = [request(index, [1, 2, 3], max_new_tokens=4, ignore_eos=True) for index in range(4)]
    found = answers(slots_of(model, slots=2), requests)
    elapsed = time.perf_counter() - start
    timings = sorted((answer.timing for answer in found.values() if answer.timing), key=lambda timing: timing.queue_s)
    for timing in timings:
        assert before <= timing.started_at <= time.time()
        assert timing.prefill_s >= 0.01
        assert timing.decode_s >= 0.03
        assert timing.total_s <= elapsed
    assert timings[2].queue_s >= 0.04 > timings[1].queue_s


# What goes wrong


def test_a_failure_in_the_middle_loses_no_token() -> None:
    calls = 0

    def fail_once(_: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise RuntimeError("once")

    requests = [request(index, prompt, temperature=1.0, ignore_eos=True) for index, prompt in enumerate(prompts(4))]
    expected = texts(answers(engine_of(tiny_model("llama")), requests))
    assert texts(answers(slots_of(tampered(fail_once)), requests)) == expected
    assert calls < 6 + 4 + 12


@pytest.mark.parametrize("name", ["llama", "qwen3-next"])
def test_out_of_memory_takes_fewer_together_loses_nothing_and_grows_again(name: str) -> None:
    sizes: list[int] = []

    def run_out(input_ids: torch.Tensor) -> None:
        sizes.append(input_ids.shape[1])
        if len(sizes) == 5:
            raise MemoryError

    reports: list[str] = []
    requests = [
        request(index, [1 + index], max_new_tokens=3 + index % 4, ignore_eos=True, temperature=0.5)
        for index in range(80)
    ]
    found = answers(slots_of(tampered(run_out, name=name), slots=8, report=reports.append), requests)
    assert texts(found) == texts(answers(slots_of(tiny_model(name)), requests))
    assert reports == ["out of memory with 8 rows and 8 tokens in a step; going on with 4 and 16"]
    assert sizes[:5] == [8] * 5
    assert sizes[5] <= 16, "what is computed again keeps within the new limit too"
    assert sizes.count(8) > 8, "it grows again"


def test_a_request_that_runs_out_of_memory_alone_is_answered_with_that() -> None:
    def run_out(input_ids: torch.Tensor) -> None:
        if (input_ids == 9).any():
            raise MemoryError

    requests = [request(index, prompt) for index, prompt in enumerate([[1], [2, 9], [3]])]
    found = answers(slots_of(tampered(run_out), report=lambda _: None), requests)
    assert [found[index, 0].error is not None for index in range(3)] == [False, True, False]
    error = found[1, 0].error
    assert error
    assert error.type == "out_of_memory"


def test_a_long_prompt_that_runs_out_of_memory_is_taken_in_smaller_parts() -> None:
    def run_out(input_ids: torch.Tensor) -> None:
        if input_ids.shape[1] > 40:
            raise MemoryError

    reports: list[str] = []
    requests = [request(0, [index % 90 for index in range(150)])]
    found = answers(slots_of(tampered(run_out), report=reports.append), requests)
    assert texts(found) == texts(answers(engine_of(tiny_model("llama")), requests))
    assert len(reports) == 2


def test_scores_that_are_no_numbers_cost_their_row_alone() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    with torch.no_grad():
        model.get_input_embeddings().weight[9] = float("nan")
    requests = [request(index, prompt) for index, prompt in enumerate(prompts(8))]
    clean = [replace(one, token_ids=tuple(token if token != 9 else 8 for token in one.token_ids)) for one in requests]
    clean[2] = replace(clean[2], token_ids=(5, 9, 5))
    found = answers(slots_of(model, slots=8), clean)
    failed = found.pop((2, 0))
    assert failed.error
    assert "not numbers" in failed.error.message
    del clean[2]
    again = answers(slots_of(model, slots=8), clean)
    assert texts(found) == texts(again)


# Which models


@pytest.mark.parametrize("name", ["bloom", "mamba"])
def test_a_model_without_positions_is_answered_in_padded_batches(name: str) -> None:
    with pytest.raises(NotServedError):
        PackedModel(tiny_model(name), 2)
    reports: list[str] = []
    engine = opened(tiny_model(name), reports)
    assert isinstance(engine, PaddedEngine)
    assert "padded batches, which is slower: it cannot be packed (positions are not an input)" in reports[0]


@pytest.mark.parametrize("name", PACKED)
def test_packed_scores_are_the_models_own(name: str) -> None:
    assert isinstance(opened(tiny_model(name), []), SlotEngine)


def test_a_model_that_minds_its_neighbours_is_answered_in_padded_batches() -> None:
    def mix(output: Any) -> None:
        output.logits += output.logits.mean(dim=1, keepdim=True) * 0.1

    reports: list[str] = []
    assert isinstance(opened(tampered(after=mix), reports), PaddedEngine)
    assert "its scores differ from its own" in reports[0]


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("qwen3-next")
    before = model.config._attn_implementation
    answers(slots_of(model), [request(0, [1, 2, 3])])
    assert model.config._attn_implementation == before
    assert not any("forward" in vars(module) for module in model.modules())


def opened(model: Any, reports: list[str]) -> Any:
    return open_engine(model, bytes_tokenizer(), thinking=None, slots=4, cache_tokens=400, report=reports.append)


@pytest.mark.parametrize("name", ["llama", "qwen3-next"])
def test_one_slot_is_enough(name: str) -> None:
    engine = open_engine(
        tiny_model(name), bytes_tokenizer(), thinking=None, slots=1, cache_tokens=100, report=pytest.fail
    )
    requests = [request(index, prompt) for index, prompt in enumerate(prompts(3))]
    assert texts(answers(engine, requests)) == texts(answers(engine_of(tiny_model(name)), requests))
