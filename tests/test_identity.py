"""A run goes on only with the job and the input it began with, and the refusal names what changed."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import DataError, SpecError
from pipeline.ledger.identity import Header, Identity, check_input, check_job, is_untouched
from pipeline.source.inputs import InputFile
from pipeline.source.lines import InputDigest, digest_inputs

values = (
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=3).map(tuple)
)
fields = st.dictionaries(st.sampled_from(["model.path", "generation.seed", "generation.stop", "thinking.mode"]), values)


def identity_of(fields, *paths, num_samples=1):
    files = tuple(InputFile(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
    return Identity(fields, num_samples, files, lambda prefix: digest_inputs(files, prefix_bytes=prefix))


def written(identity):
    """The header as a later session reads it."""
    return Header.from_record(json.loads(json.dumps(Header.of(identity).to_record())))


def digest(**changes):
    return replace(InputDigest((InputFile("in", 1, 2),), "abc", 10, 3), **changes)


@given(fields, fields)
def test_every_changed_key_is_named_and_no_other(before, now):
    header = written(Identity(before, 1, (), lambda _: digest()))
    changed = {
        key
        for key in before.keys() | now.keys()
        if (key in before) != (key in now) or json.dumps(before[key]) != json.dumps(now[key])
    }
    # True equals 1 to Python; a key's type never changes.
    changed = {key for key in changed if (key in before) != (key in now) or before[key] != now[key]}
    try:
        check_job(header, Identity(now, 1, (), lambda _: digest()))
        named = set()
    except SpecError as error:
        named = {problem.field for problem in error.problems}
    assert named == changed


def test_the_refusal_gives_both_values_and_the_way_out():
    header = written(Identity({"generation.seed": 0, "model.path": "a"}, 1, (), lambda _: digest()))
    with pytest.raises(SpecError) as caught:
        check_job(header, Identity({"generation.seed": 7, "model.path": "a"}, 2, (), lambda _: digest()))
    first, second = map(str, caught.value.problems)
    assert first.startswith("generation.num_samples: was 1 when the run began and is 2 now")
    assert second.startswith("generation.seed: was 0 when the run began and is 7 now")
    assert "--fresh" in first


def test_a_model_whose_content_changed_is_refused_once_it_was_looked_at():
    job = Identity({"model.path": "dir"}, 1, (), lambda _: digest())
    header = written(replace(job, model="abc"))
    check_job(header, job)
    check_job(header, replace(job, model="abc"))
    with pytest.raises(SpecError, match=r"model\.path: the model's files are not those"):
        check_job(header, replace(job, model="def"))


def test_an_input_is_known_by_its_content(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"a":1}\n{"a":2}\n')
    before = identity_of({}, path)
    header = written(before)
    assert is_untouched(header, before)
    assert check_input(header, before, may_grow=False) is None
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(path.read_bytes())
    assert not is_untouched(header, identity_of({}, copy))
    assert check_input(header, identity_of({}, copy), may_grow=False) is None


@pytest.mark.parametrize(
    ("content", "may_grow", "grew"),
    [
        (b'{"a":1}\n{"a":3}\n', False, False),
        (b'{"a":1}\n{"a":3}\n', True, False),
        (b'{"a":1}\n', True, False),
        (b'{"a":1}\n{"a":2}\n{"a":3}\n', False, False),
        (b'{"a":1}\n{"a":2}\n{"a":3}\n', True, True),
        (b'{"a":0}\n{"a":1}\n{"a":2}\n', True, False),
    ],
)
def test_a_changed_input_is_refused_unless_it_may_grow_and_did(tmp_path, content, may_grow, grew):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"a":1}\n{"a":2}\n')
    header = written(identity_of({}, path))
    path.write_bytes(content)
    now = identity_of({}, path)
    if grew:
        assert check_input(header, now, may_grow=may_grow).num_items == 3
    else:
        with pytest.raises(DataError, match=r"in.jsonl: the input has changed since the run began \(had 2 items"):
            check_input(header, now, may_grow=may_grow)


def test_the_input_is_read_only_when_asked_for():
    def measure(_prefix):
        raise AssertionError

    identity = Identity({"a": 1}, 1, (InputFile("in", 1, 2),), measure)
    header = Header({"a": 1}, 1, digest(), None)
    check_job(header, identity)
    assert is_untouched(header, identity)
