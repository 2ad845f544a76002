"""Jobs whose keys are right each by itself and cannot be had together, or not yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from pipeline.spec.keys import JobSpec, job_keys
from pipeline.spec.rules import RULES, broken_rules
from tests.job_values import LEAST, jobs, nested


def broken(values: dict[str, Any]) -> list[tuple[str, str]]:
    spec = JobSpec.model_validate(nested(LEAST | values))
    return [(rule.key, rule.message) for rule in broken_rules(spec)]


def test_the_least_job_breaks_nothing() -> None:
    assert broken({}) == []


@pytest.mark.parametrize(
    ("values", "key", "part"),
    [
        ({"model.path": None}, "model.path", "only `engine: echo` needs no model"),
        ({"model.echo.delay": "1s"}, "model.echo", "for the echo engine only"),
        ({"thinking.mode": "off", "thinking.budget": 5}, "thinking.budget", "no meaning with thinking.mode off"),
        ({"thinking.budget": 256}, "thinking.budget", "leaves no room for an answer"),
        ({"thinking.mode": "on", "input.chat_template": "off"}, "thinking.mode", "cannot be on"),
        ({"input.template": "{a}", "input.format": "messages"}, "input.template", "no meaning with input.format"),
        (
            {"input.template": "{a}", "input.prompt_field": "a"},
            "input.prompt_field",
            "no meaning beside input.template",
        ),
        ({"input.chat_template": "off", "input.format": "messages"}, "input.chat_template", "cannot be off"),
        ({"input.chat_template": "off", "input.system": "x"}, "input.system", "no place without a chat template"),
        ({"output.path": "runs/"}, "output.path", "is a directory"),
        ({"output.path": "."}, "output.path", "is a directory"),
        ({"input.template": "{a"}, "input.template", "line 1, column 1 of the template"),
        ({"output.path": "a.arrow"}, "output.path", "not written"),
        ({"output.path": "a.PARQUET", "output.format": "openai-batch"}, "output.path", "is a table"),
        ({"output.keep_fields": "none", "output.format": "openai-batch"}, "output.keep_fields", "no place"),
    ],
)
def test_contradictions(values: dict[str, Any], key: str, part: str) -> None:
    ((found, message),) = broken(values)
    assert found == key
    assert part in message


@pytest.mark.parametrize(
    "values",
    [
        {"model.path": None, "model.engine": "echo", "model.echo.crash_at": 5},
        {"thinking.budget": 255},
        {"thinking.mode": "on", "thinking.budget": 5},
        {"input.template": "{a}", "input.format": "prompt"},
        {"input.chat_template": "off", "thinking.mode": "off"},
        {"input.path": ["a.jsonl", "b.jsonl.gz"]},
    ],
)
def test_no_contradictions(values: dict[str, Any]) -> None:
    assert broken(values) == []


@pytest.mark.parametrize(
    ("output", "inputs", "among"),
    [
        ("out.jsonl", ["in.jsonl", "out.jsonl"], True),
        ("./data/../out.jsonl", ["out.jsonl"], True),
        ("data/out.jsonl", ["data/*.jsonl"], True),
        ("data/very/deep/out.jsonl", ["data/**/*.jsonl"], True),
        ("data/out.jsonl", ["data/**/*.jsonl"], True),
        ("out.jsonl", ["data/**/*.jsonl"], False),
        ("data/out.jsonl", ["link/*.jsonl"], True),
        ("link/out.jsonl", ["data/out.jsonl"], True),
        ("data/deep/out.jsonl", ["data/*.jsonl"], False),
        ("out.jsonl", ["data/*.jsonl"], False),
        ("data/out.jsonl", ["*.jsonl"], False),
        ("data/out.txt", ["data/*.jsonl"], False),
    ],
)
def test_the_output_is_no_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, inputs: list[str], among: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data")
    found = broken({"output.path": output, "input.path": inputs})
    assert [key for key, message in found if "would overwrite" in message] == ["output.path"] * among


def test_a_library_that_is_missing_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.spec.rules.find_spec", lambda _name: None)
    assert broken({"run.metrics": "x.prom"}) == [("run.metrics", "needs `pip install 'overnight[metrics]'`")]
    assert broken({}) == []


def test_rules_speak_of_keys_and_sections_that_exist() -> None:
    known = [*job_keys(), "model.echo"]
    assert {key for rule in RULES for key in rule.keys} <= set(known)


@given(jobs())
def test_any_job_can_be_judged(spec: JobSpec) -> None:
    for rule in broken_rules(spec):
        assert rule.key in rule.keys
        assert rule.message
