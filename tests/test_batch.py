"""A left-padded batch computes each row as if it were alone, and drops rows where that is safe."""

import copy
from typing import Any

import pytest
import torch
import transformers

from pipeline.engines.batch import Batch, CausalModel
from pipeline.errors import SpecError
from tests.tiny_models import PAD, answers, engine_of, prompts, request, tampered, texts, tiny_model


def test_a_batch_continues_each_row_as_if_it_were_alone() -> None:
    """The scores themselves, beyond the best of them, through a drop of rows."""
    model = CausalModel(tiny_model("gemma3"))
    rows = prompts(4, seed=5)
    with torch.inference_mode():
        batch = Batch(model, rows, 3, PAD)
        batch.prefill()
        batch.step(torch.tensor([1, 2, 3, 4]))
        assert batch.keep(torch.tensor([1, 3]))
        together = batch.step(torch.tensor([5, 6]))
        for place, row in enumerate([[*rows[1], 2, 5], [*rows[3], 4, 6]]):
            alone = Batch(model, [row], 0, PAD).prefill()
            torch.testing.assert_close(together[place], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3-next"])
def test_rows_that_cannot_be_dropped_do_no_harm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [request(index, prompt, max_new_tokens=3 + 4 * index) for index, prompt in enumerate(prompts(5))]
    expected = texts(answers(engine_of(tiny_model(name), slots=5), requests))
    monkeypatch.setattr("pipeline.engines.batch._can_select", lambda _: False)
    assert texts(answers(engine_of(tiny_model(name), slots=5), requests)) == expected


def test_a_cache_that_the_model_brings_itself_is_not_cut() -> None:
    class OwnLayer(transformers.cache_utils.DynamicLayer):
        """May hold more than reordering knows of."""

    def own_cache(output: Any) -> None:
        for layer in output.past_key_values.layers:
            layer.__class__ = OwnLayer

    rows: list[int] = []
    model = tampered(lambda ids: rows.append(len(ids)), own_cache)
    requests = [request(index, prompt, max_new_tokens=3 + 4 * index) for index, prompt in enumerate(prompts(4))]
    assert texts(answers(engine_of(model), requests)) == texts(answers(engine_of(tiny_model("llama")), requests))
    assert set(rows) == {4}


def test_a_model_whose_context_cannot_be_carried_is_refused() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    model.forward = lambda input_ids: input_ids
    with pytest.raises(SpecError, match="LlamaForCausalLM cannot carry its context"):
        engine_of(model)
