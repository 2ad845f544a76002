"""The self-check passes honest models and tells of those whose rows see each other."""

import copy
import functools
from typing import Any

import pytest
import torch

from tests.tiny_models import CONFIGS, engine_of, tiny_model


@pytest.mark.parametrize("name", CONFIGS)
def test_the_self_check_passes_honest_models(name: str) -> None:
    assert engine_of(tiny_model(name)).self_check()


@pytest.mark.parametrize("flaw", ["sees padding", "wrong positions", "mixes rows", "broken cache", "no numbers"])
def test_the_self_check_tells_of_a_model_whose_rows_are_not_alone(flaw: str) -> None:
    model = copy.deepcopy(tiny_model("gpt2"))
    original = model.forward

    @functools.wraps(original)
    def forward(**inputs: Any) -> Any:
        if flaw == "sees padding":
            inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
        if flaw == "wrong positions":
            seen = inputs["attention_mask"].shape[1]
            inputs["position_ids"] = torch.arange(seen)[-inputs["input_ids"].shape[1] :].expand_as(inputs["input_ids"])
        output = original(**inputs)
        if flaw == "mixes rows" and len(output.logits) > 1:
            output.logits += output.logits.mean(dim=0) * 0.1
        if flaw == "broken cache" and inputs["past_key_values"] and len(output.logits) > 1:
            output.logits = output.logits.flip(0)
        if flaw == "no numbers":
            output.logits *= float("nan")
        return output

    model.forward = forward
    reports: list[str] = []
    assert not engine_of(model, report=reports.append).self_check()
    (sentence,) = reports
    assert "GPT2LMHeadModel scores the next token otherwise in a batch than alone" in sentence
