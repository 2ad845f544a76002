"""The JSON Schema: fresh, valid, and never stricter than the program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from jsonschema import Draft202012Validator

from pipeline.spec.job_reference import job_reference
from pipeline.spec.job_schema import json_schema
from pipeline.spec.keys import job_keys, job_sections
from pipeline.spec.yaml_text import read_document
from tests.job_values import LEAST, job_values, nested

ROOT = Path(__file__).parent.parent
SCHEMA = json_schema()
VALIDATOR = Draft202012Validator(SCHEMA)


def entry(key: str) -> dict[str, Any]:
    """What the schema says of a key."""
    node = SCHEMA
    for name in key.split("."):
        node = node["properties"][name]
        node = SCHEMA["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node
    return node


def test_the_schema_beside_the_jobs_is_fresh() -> None:
    written = (ROOT / "jobs" / "job.schema.json").read_text(encoding="utf-8")
    fresh = json.dumps(SCHEMA, indent=2, ensure_ascii=False) + "\n"
    assert written == fresh, "run: overnight schema > jobs/job.schema.json"


def test_the_reference_is_fresh_and_names_each_key_with_its_default() -> None:
    reference = (ROOT / "docs" / "job-reference.md").read_text(encoding="utf-8")
    assert reference == job_reference(), "run: make docs"
    for key in job_keys():
        assert f"| `{key}` |" in reference
    assert "| `run.stall_timeout` | a duration above 0s and at most" in reference and "| `30m` |" in reference


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)


def test_the_schema_knows_each_key_and_no_other() -> None:
    for name in filter(None, job_sections()):
        assert entry(name)["additionalProperties"] is False
        assert list(entry(name)["properties"]) == list(job_sections()[name].model_fields)
    for key in job_keys():
        assert entry(key)["description"].startswith(str(job_keys()[key].description))


def test_defaults_read_as_people_write_them() -> None:
    assert entry("input.max_line")["default"] == "64MiB"
    assert entry("run.stall_timeout")["default"] == "30m"
    assert entry("generation.top_p")["default"] == 1.0
    assert entry("generation.stop")["default"] == []
    assert "default" not in entry("name")


@given(job_values())
def test_the_schema_accepts_what_the_program_accepts(values: dict[str, Any]) -> None:
    if values["model.path"] is None:
        values["model.engine"] = "echo"
    VALIDATOR.validate(nested(values))


def test_there_are_jobs_and_the_schema_accepts_them() -> None:
    jobs = sorted((ROOT / "jobs").glob("*.yaml"))
    assert len(jobs) >= 7
    for job in jobs:
        VALIDATOR.validate(read_document(job.read_text(encoding="utf-8"), job.name).values)


@pytest.mark.parametrize(
    "values",
    [
        {"thinking": {"mode": True}, "input.chat_template": False},  # how YAML 1.1 reads on and off
        {"model.gpu_memory": "14GiB", "run.time_limit": "1h30m", "input.max_bytes": 5},
        {"input.template": {"file": "t.txt"}, "output.keep_fields": ["a"]},
        {"model.repack_cache": False},
    ],
)
def test_what_the_schema_accepts(values: dict[str, Any]) -> None:
    VALIDATOR.validate(nested(LEAST | values))


@pytest.mark.parametrize(
    "values",
    [
        {"model.path": None},
        {"generation.top_pp": 1},
        {"generation.top_p": 0},
        {"generation.seed": 2**63},
        {"model.gpu_memory": "14G"},
        {"run.time_limit": "3:00"},
        {"model.repack_cache": True},
        {"input.path": []},
        {"model.engine": "vllm"},
        {"input.template": {"files": "x"}},
    ],
)
def test_what_the_schema_refuses(values: dict[str, Any]) -> None:
    assert not VALIDATOR.is_valid(nested(LEAST | values))


@pytest.mark.parametrize("key", sorted(LEAST))
def test_the_schema_asks_for_what_is_required(key: str) -> None:
    without = {known: value for known, value in LEAST.items() if known != key}
    assert not VALIDATOR.is_valid(nested(without))
    assert VALIDATOR.is_valid(nested({"model.engine": "echo", **without})) == (key == "model.path")
