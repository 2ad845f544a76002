"""The settings of one answer: the job's, and a line's own over them."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.records import Settings
from pipeline.spec.keys import JobSpec
from pipeline.spec.settings import apply_overrides, default_settings
from tests.job_values import LEAST, VALUES, nested

LINE_KEYS = [field.name for field in fields(Settings) if field.name != "thinking_budget"]
LINE_VALUES: dict[str, st.SearchStrategy[Any]] = {name: VALUES[f"generation.{name}"] for name in LINE_KEYS}


def test_settings_of_a_job() -> None:
    generation = {
        **{"max_new_tokens": 9, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1},
        **{"stop": ["x"], "seed": 4, "ignore_eos": True, "num_samples": 7},
    }
    spec = JobSpec.model_validate(nested(LEAST | {"generation": generation, "thinking.budget": 5}))
    assert default_settings(spec) == Settings(9, 0.5, 0.9, 3, 0.1, 1.1, ("x",), 4, True, 5)


def test_the_defaults_of_job_and_records_agree() -> None:
    assert default_settings(JobSpec.model_validate(nested(LEAST))) == Settings()


@given(st.fixed_dictionaries({}, optional=LINE_VALUES))
def test_a_line_changes_what_it_names_and_nothing_else(overrides: dict[str, Any]) -> None:
    job = Settings(77, 0.7, 0.7, 7, 0.7, 0.7, ("7",), 7, True, 7)
    settings, system = apply_overrides(job, "be brief", overrides)
    expected = {name: tuple(value) if name == "stop" else value for name, value in overrides.items()}
    assert settings == replace(job, **expected)
    assert system == "be brief"


@pytest.mark.parametrize(
    ("overrides", "system"), [({}, "job's"), ({"system": "own"}, "own"), ({"system": None}, None), ({"system": ""}, "")]
)
def test_a_line_may_have_its_own_system_message(overrides: dict[str, Any], system: str | None) -> None:
    assert apply_overrides(Settings(), "job's", overrides) == (Settings(), system)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"top_p": 1.5}, "`generation.top_p` must be a number above 0 and at most 1, not 1.5"),
        ({"top_p": True}, "`generation.top_p` must be a number above 0 and at most 1, not true"),
        ({"temperature": math.nan}, "`generation.temperature` must be a number of at least 0, not NaN"),
        (
            {"max_new_tokens": "9"},
            '`generation.max_new_tokens` must be a whole number of at least 1, not the text "9"; '
            "write it without quotes",
        ),
        ({"stop": [1, "", 2]}, '`generation.stop` must be a list of non-empty texts, not [1, "", 2]'),
        ({"num_samples": 2}, "`generation.num_samples` is for the whole job; a line cannot set it"),
        ({"deterministic": True}, "`generation.deterministic` is for the whole job; a line cannot set it"),
        ({"max_tokens": 5}, "`generation.max_tokens` is unknown; did you mean `max_new_tokens`?"),
        ({"zzz": 5}, "`generation.zzz` is unknown"),
        ({"\x1b[31m": 5}, r"`generation.\u001b[31m` is unknown"),
        ({"\ud800": 5}, "`generation` has a name that is not valid Unicode"),
        ({"system": 5}, '`generation.system` must be null or text, not 5; put it in quotes: "5"'),
        (
            {"top_k": 0.5, "seed": -1},
            "`generation.top_k` must be a whole number of at least 0, not 0.5; "
            "`generation.seed` must be a whole number of at least 0 and at most 9223372036854775807, not -1",
        ),
    ],
)
def test_a_line_is_held_to_the_bounds_of_the_job_file(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="generation") as caught:
        apply_overrides(Settings(), None, overrides)
    assert str(caught.value) == message
