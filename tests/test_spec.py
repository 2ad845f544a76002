"""JobSpec: the keys, their defaults and bounds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from pydantic import ValidationError

from pipeline.errors import NotFoundError
from pipeline.spec.keys import JobSpec, TemplateFile, job_keys, job_sections, value_of
from tests.job_values import LEAST, VALUES, job_values, nested


def job(**values: Any) -> JobSpec:
    return JobSpec.model_validate(nested(LEAST | {key.replace("__", "."): value for key, value in values.items()}))


def test_the_keys_are_those_of_the_sections() -> None:
    assert list(job_sections()) == [
        *("", "model", "model.echo", "thinking", "input", "generation", "batch", "output", "run"),
    ]
    assert list(job_keys())[:3] == ["name", "model.path", "model.revision"]
    assert set(job_keys()) == set(VALUES), "a new key belongs in the values that the properties are tried with"


def test_every_key_is_described() -> None:
    for key, field in job_keys().items():
        assert field.description, key
        assert field.description.endswith("."), key


def test_defaults() -> None:
    spec = job()
    defaults = {key: value_of(spec, key) for key in job_keys() if key not in LEAST}
    assert defaults == {
        "name": "job",
        "model.revision": None,
        "model.load_strategy": "min-gpu",
        "model.gpu_memory": None,
        "model.cpu_memory": None,
        "model.engine": "auto",
        "model.trust_remote_code": False,
        "model.strict": False,
        "model.activation": "exact",
        "model.repack_cache": "auto",
        "model.echo.delay": 0.0,
        "model.echo.fail_every": None,
        "model.echo.crash_at": None,
        "model.echo.oom_at": None,
        "model.echo.hang_at": None,
        "thinking.mode": "auto",
        "thinking.budget": None,
        "input.format": "auto",
        "input.prompt_field": "prompt",
        "input.messages_field": "messages",
        "input.id_field": "id",
        "input.template": None,
        "input.system": None,
        "input.chat_template": "auto",
        "input.over_length": "error",
        "input.max_line": 64 * 2**20,
        "input.max_bytes": None,
        "input.allow_control_tokens": False,
        "generation.max_new_tokens": 256,
        "generation.temperature": 0.0,
        "generation.top_p": 1.0,
        "generation.top_k": 0,
        "generation.min_p": 0.0,
        "generation.repetition_penalty": 1.0,
        "generation.stop": (),
        "generation.seed": 0,
        "generation.ignore_eos": False,
        "generation.num_samples": 1,
        "generation.deterministic": False,
        "batch.slots": "auto",
        "batch.cache_tokens": "auto",
        "output.local_directory": "runs",
        "output.format": "native",
        "output.keep_fields": "all",
        "output.summary_line": True,
        "run.time_limit": None,
        "run.resume": "if-unchanged",
        "run.max_attempts": 3,
        "run.stall_timeout": 1800.0,
        "run.save_unfinished": 60.0,
        "run.metrics": None,
        "run.on_finish": None,
    }


@given(job_values())
def test_a_job_holds_what_it_was_given(values: dict[str, Any]) -> None:
    spec = JobSpec.model_validate(nested(values))
    for key, value in values.items():
        found = value_of(spec, key)
        assert found == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("model.gpu_memory", "14GiB", 14 * 2**30),
        ("model.gpu_memory", 1024, 1024),
        ("input.max_line", "1MB", 10**6),
        ("run.time_limit", "3h", 10800.0),
        ("run.time_limit", 90, 90.0),
        ("model.echo.delay", "100us", 0.0001),
        ("thinking.mode", False, "off"),
        ("input.chat_template", True, "on"),
        ("model.repack_cache", False, "off"),
        ("generation.temperature", 1, 1.0),
        ("input.path", "one.jsonl", ("one.jsonl",)),
        ("input.template", {"file": "t.txt"}, TemplateFile(file="t.txt")),
        ("output.keep_fields", ["a"], ("a",)),
        ("generation.seed", 2**63 - 1, 2**63 - 1),
        ("generation.top_p", 1, 1.0),
        ("input.system", "", ""),
    ],
)
def test_notations(key: str, written: object, value: object) -> None:
    found = value_of(job(**{key: written}), key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("name", ["", "a\nb", "\x1b[31m", 5, None]),
        ("model.path", ["", "a\0b", 5, ["m"], "\ud800"]),
        ("model.load_strategy", ["gpu", None, True]),
        ("model.gpu_memory", [0, -1, "0B", "14G", 1.5, True, "1025TiB", 2**50 + 1]),
        ("model.engine", ["vllm", ""]),
        ("model.trust_remote_code", ["true", 1, None]),
        ("model.repack_cache", [True, "", 5]),
        ("model.echo.delay", [-1, "1", True, math.inf]),
        ("model.echo.fail_every", [0, "2"]),
        ("model.echo.crash_at", [-1]),
        ("thinking.mode", ["maybe", 1]),
        ("thinking.budget", [0, -1, 1.0]),
        ("input.path", ["", [], ["a", ""], None, {"a": 1}, 5, [["a"]]]),
        ("input.prompt_field", ["", 5]),
        ("input.template", ["", {}, {"file": ""}, {"file": "a", "mode": "b"}, {"path": "a"}, []]),
        ("input.max_line", [0, None]),
        ("generation.max_new_tokens", [0, -1, 1.5, 256.0, "256", True, None]),
        ("generation.temperature", [-0.1, math.nan, math.inf, "0.5", True]),
        ("generation.top_p", [0, 0.0, 1.5, -1, math.nan]),
        ("generation.top_k", [-1, 1.0]),
        ("generation.min_p", [-0.1, 1.1]),
        ("generation.repetition_penalty", [0, -1]),
        ("generation.stop", ["END", [""], [1], None, {"a": 1}]),
        ("generation.seed", [-1, 2**63, 1.0]),
        ("generation.num_samples", [0]),
        ("batch.slots", [0, "all", 1.0]),
        ("output.path", ["", None, ["a"]]),
        ("output.keep_fields", ["some", [""], None]),
        ("run.time_limit", [0, "0s", -5, "3:00", "3651d", True]),
        ("run.resume", ["yes", True]),
        ("run.max_attempts", [0]),
        ("run.on_finish", [[], "mail", [""]]),
        ("generation.top_pp", [1]),
        ("model", [None, 5, []]),
    ],
)
def test_bounds(key: str, values: list[object]) -> None:
    for value in values:
        values_of_job = {known: held for known, held in LEAST.items() if not known.startswith(key)}
        with pytest.raises(ValidationError):
            JobSpec.model_validate(nested(values_of_job | {key: value}))


def test_a_job_cannot_be_changed() -> None:
    spec = job()
    with pytest.raises(ValidationError):
        spec.generation.seed = 5  # pyright: ignore[reportAttributeAccessIssue]


def test_the_text_of_a_template(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_bytes("Übersetze: {text}\n".encode())
    assert job().input.template_text() is None
    assert job(input__template="{text}").input.template_text() == "{text}"
    assert job(input__template={"file": str(file)}).input.template_text() == "Übersetze: {text}\n"


@pytest.mark.parametrize(("content", "reason"), [(None, "No such file or directory"), (b"\xff", "it is not UTF-8")])
def test_a_template_that_cannot_be_read(tmp_path: Path, content: bytes | None, reason: str) -> None:
    file = tmp_path / "t.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(NotFoundError) as caught:
        job(input__template={"file": str(file)}).input.template_text()
    assert str(caught.value) == f"{file}: input.template: cannot read: {reason}"
