"""The fingerprint: every key has a class, and the class decides whether a change shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.spec.fingerprint import KEY_CLASSES, fingerprint, fingerprint_fields
from pipeline.spec.keys import JobSpec, job_keys
from tests.job_values import LEAST, VALUES, job_values, nested


def test_every_key_has_a_class_and_every_class_a_key() -> None:
    assert set(KEY_CLASSES) == set(job_keys()), "say in KEY_CLASSES what a change of a new key does to a resumed run"


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("model.path", "answers"),
        ("model.engine", "answers"),
        ("thinking.mode", "answers"),
        ("input.template", "answers"),
        ("generation.seed", "answers"),
        ("input.path", "presentation"),
        ("output.keep_fields", "presentation"),
        ("output.summary_line", "presentation"),
        ("name", "operational"),
        ("model.load_strategy", "operational"),
        ("batch.slots", "operational"),
        ("run.time_limit", "operational"),
        ("output.path", "operational"),
    ],
)
def test_classes_that_the_ledger_promises(key: str, kind: str) -> None:
    assert KEY_CLASSES[key] == kind


@settings(max_examples=60)
@given(job_values(), st.data())
def test_a_change_shows_unless_the_key_is_operational(values: dict[str, Any], data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(VALUES)))
    before = JobSpec.model_validate(nested(values))
    after = JobSpec.model_validate(nested(values | {key: data.draw(VALUES[key])}))
    assume(before != after)
    changed = {key for key, value in fingerprint_fields(after).items() if value != fingerprint_fields(before)[key]}
    if KEY_CLASSES[key] == "operational":
        assert not changed
        assert fingerprint(before) == fingerprint(after)
    else:
        assert changed == {key}
        assert fingerprint(before) != fingerprint(after)


@settings(max_examples=30)
@given(job_values())
def test_fields_survive_json(values: dict[str, Any]) -> None:
    fields = fingerprint_fields(JobSpec.model_validate(nested(values)))
    assert json.loads(json.dumps(fields, allow_nan=False)) == fields


def test_the_fingerprint_stays_from_version_to_version() -> None:
    # Another value here means that runs of an earlier version cannot be resumed: that needs a line in CHANGELOG.md.
    spec = JobSpec.model_validate(nested(LEAST))
    assert fingerprint(spec) == "31c6d26d5b98b0575668effa366b781db9668552e6d23c5ecbcb70c84fdfff71"


def test_equal_ways_to_write_a_job_have_one_fingerprint() -> None:
    one = nested(LEAST | {"input.path": "in.jsonl", "generation.temperature": 1, "thinking.mode": "off"})
    two = nested(LEAST | {"input.path": ["in.jsonl"], "generation.temperature": 1.0, "thinking.mode": False})
    assert fingerprint(JobSpec.model_validate(one)) == fingerprint(JobSpec.model_validate(two))


def test_a_template_counts_by_its_text(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_text("Say {text}")
    written = JobSpec.model_validate(nested(LEAST | {"input.template": "Say {text}"}))
    kept = JobSpec.model_validate(nested(LEAST | {"input.template": {"file": str(file)}}))
    assert fingerprint(written) == fingerprint(kept)
    file.write_text("Tell {text}")
    assert fingerprint(written) != fingerprint(kept)
