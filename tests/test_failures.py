"""What a model does wrong costs the row at fault its answer, and nobody else."""

import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tiny_models import (
    END,
    ENGINES,
    PAD,
    answers,
    bytes_tokenizer,
    engine_of,
    prompts,
    request,
    tampered,
    texts,
    tiny_model,
)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_row_that_makes_the_model_fail_is_answered_with_the_error_and_its_mates_as_ever(engine: str) -> None:
    poison = 255

    def refuse(input_ids: torch.Tensor) -> None:
        if (input_ids == poison).any():
            raise ValueError("cannot bear it")

    requests = [request(index, prompt) for index, prompt in enumerate(prompts(9, seed=8))]
    requests[5] = request(5, [1, poison, 2])
    found = answers(engine_of(tampered(refuse), engine=engine, slots=9), requests)
    failed = found.pop((5, 0))
    assert failed.finish_reason == "error"
    assert failed.error is not None
    assert failed.error.type == "engine_error"
    assert failed.error.message == "the model failed on this prompt: ValueError: cannot bear it"
    del requests[5]
    assert texts(found) == texts(answers(engine_of(tiny_model("llama"), slots=9), requests))


@pytest.mark.parametrize("engine", ENGINES)
def test_an_answer_whose_text_cannot_be_made_fails_alone(engine: str) -> None:
    requests = [request(index, prompt, max_new_tokens=3 + index) for index, prompt in enumerate(prompts(6))]
    expected = answers(engine_of(tiny_model("llama")), requests)

    def decode(token_ids: Sequence[int], **options: Any) -> str:
        text = bytes_tokenizer().decode(token_ids, **options)
        if text == expected[3, 0].text:
            raise KeyError(text)
        return text

    tokenizer = SimpleNamespace(decode=decode, eos_token_id=END, pad_token_id=PAD)
    found = answers(engine_of(tiny_model("llama"), tokenizer, engine=engine), requests)
    failed = found.pop((3, 0))
    assert failed.error
    assert failed.error.type == "engine_error"
    del expected[3, 0]
    assert texts(found) == texts(expected)


def test_a_failure_in_the_middle_loses_no_token() -> None:
    calls = 0

    def fail_once(input_ids: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:
            time.sleep(0.3)
            raise RuntimeError("once")

    requests = [request(index, prompt, temperature=1.0, ignore_eos=True) for index, prompt in enumerate(prompts(4))]
    expected = texts(answers(engine_of(tiny_model("llama")), requests))
    found = answers(engine_of(tampered(fail_once)), requests)
    assert texts(found) == expected
    for answer in found.values():
        assert answer.timing
        assert answer.timing.time_to_first_token_s < 0.3 <= answer.timing.decode_s
        assert min(answer.timing.queue_s, answer.timing.prefill_s) >= 0
    assert calls == 6 + 2 * 7  # five tokens were there: two halves with seven to come


@pytest.mark.parametrize(
    "exception",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
)
def test_out_of_memory_halves_the_batch_and_says_so(exception: Exception) -> None:
    rows: list[int] = []

    def run_out(input_ids: torch.Tensor) -> None:
        rows.append(len(input_ids))
        if len(input_ids) > 3:
            raise exception

    reports: list[str] = []
    requests = [request(index, prompt) for index, prompt in enumerate(prompts(12))]
    found = answers(engine_of(tampered(run_out), slots=8, report=reports.append), requests)
    assert texts(found) == texts(answers(engine_of(tiny_model("llama")), requests))
    assert reports[0] == "out of memory with 8 rows together; going on with 4"
    assert rows.count(8) == 1  # it learns


def test_the_batch_grows_again_after_memory_ran_out() -> None:
    rows: list[int] = []

    def run_out_at_first(input_ids: torch.Tensor) -> None:
        rows.append(len(input_ids))
        if len(rows) == 1:
            raise MemoryError

    requests = [request(index, [1, 2], max_new_tokens=1) for index in range(60)]
    answers(engine_of(tampered(run_out_at_first), slots=8, report=lambda _: None), requests)
    assert rows[:3] == [8, 4, 4]
    assert max(rows[3:]) == 8


def test_a_row_too_large_alone_is_answered_out_of_memory() -> None:
    def run_out(input_ids: torch.Tensor) -> None:
        if input_ids.shape[1] > 40:
            raise MemoryError

    requests = [request(index, prompt) for index, prompt in enumerate([[1] * 10, [2] * 50, [3] * 20])]
    found = answers(engine_of(tampered(run_out), report=lambda _: None), requests)
    error = found[1, 0].error
    assert error is not None
    assert (error.type, "50 tokens and up to 12 more" in error.message) == ("out_of_memory", True)
    assert [found[index, 0].error for index in (0, 2)] == [None, None]


def test_scores_that_are_no_numbers_fail_their_row_alone() -> None:
    def spoil(output: Any) -> None:
        output.logits[:, :, :] = torch.where(output.logits[:, :, 7:8] > 2.0, float("nan"), output.logits)

    model = tampered(after=spoil)
    requests = [request(index, prompt) for index, prompt in enumerate(prompts(10, seed=3))]
    found = answers(engine_of(model), requests)
    alone = {key: value for one in requests for key, value in answers(engine_of(model, slots=1), [one]).items()}
    assert texts(found) == texts(alone)
    errors = [answer.error.type for answer in found.values() if answer.error]
    assert 0 < len(errors) < 10
    assert set(errors) == {"engine_error"}


@pytest.mark.parametrize("exception", [KeyboardInterrupt(), torch.AcceleratorError("device-side assert")])
def test_what_ends_the_process_is_not_an_answer(exception: BaseException) -> None:
    def end(input_ids: torch.Tensor) -> None:
        raise exception

    with pytest.raises(type(exception)):
        list(engine_of(tampered(end)).generate(iter([request(0, [1, 2])])))
