"""The native record, byte for byte, and its way back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import DataError, NotFoundError
from pipeline.output.native import render
from pipeline.output.results import read_results
from pipeline.records import Completion, Item, ItemError, Timing, Usage
from pipeline.source.json_object import read_object

FIELDS = {"id": "a1", "prompt": "Hi", "tags": ["ä"]}
TIMING = Timing(started_at=1767225600.0004, queue_s=0.01, prefill_s=0.01, decode_s=0.4)


def item(fields: Mapping[str, object] | None = FIELDS, id: str | int | float | bool | None = "a1") -> Item:
    return Item(index=7, file="in.jsonl", line=9, offset=120, id=id, fields=fields)


def completion(text: str = "Hello", *, of: Item | None = None, timing: Timing = TIMING) -> Completion:
    return Completion(of or item(), 1, "stop", text, None, Usage(12, 34, 5), timing)


def test_the_line_is_the_documented_one() -> None:
    assert render(completion("Grüß\n😀\u2028")).decode() == (
        '{"object":"completion","index":7,"id":"a1","sample":1,"completion":"Grüß\\n😀\u2028","reasoning":null,'
        '"finish_reason":"stop","usage":{"prompt_tokens":12,"completion_tokens":34,"reasoning_tokens":5},'
        '"timing":{"started_at":"2026-01-01T00:00:00.000Z","queue_s":0.01,"prefill_s":0.01,'
        '"time_to_first_token_s":0.02,"decode_s":0.4,"total_s":0.42,"tokens_per_second":80.952381},'
        '"error":null,"input":{"id":"a1","prompt":"Hi","tags":["ä"]}}\n'
    )


def test_an_error_says_where_the_line_is() -> None:
    bad = Item(index=7, file="in.jsonl", line=9, offset=120)
    record = json.loads(render(Completion.failed(bad, 0, ItemError("invalid_json", "not JSON", attempts=2))))
    assert record["error"] == {
        "type": "invalid_json",
        "message": "not JSON",
        "file": "in.jsonl",
        "line": 9,
        "offset": 120,
        "attempts": 2,
    }
    assert record["finish_reason"] == "error"
    assert {record[name] for name in ("completion", "reasoning", "usage", "timing", "id", "input")} == {None}


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ("all", FIELDS),
        ("none", None),
        (["tags", "absent", "id"], {"tags": ["ä"], "id": "a1"}),
        ((), {}),
    ],
)
def test_the_fields_that_are_kept(keep, kept: object) -> None:
    assert json.loads(render(completion(), keep_fields=keep))["input"] == kept
    assert json.loads(render(completion(of=item(None)), keep_fields=keep))["input"] is None


@pytest.mark.parametrize("id_", ["a1", 7, 1.5, True, None, 2**70])
def test_an_id_keeps_its_type(id_: str | float | bool | None) -> None:
    got = json.loads(render(completion(of=item({"id": id_}, id_))))
    assert (got["id"], type(got["id"])) == (id_, type(id_))
    assert got["input"] == {"id": id_}


SECONDS = st.floats(0, 1e6)


@given(SECONDS, SECONDS, SECONDS, st.integers(0, 10**6))
def test_the_parts_of_the_time_add_up_as_printed(
    queue_s: float, prefill_s: float, decode_s: float, tokens: int
) -> None:
    answer = Completion(item(), 0, "length", "", None, Usage(1, tokens), Timing(0.0, queue_s, prefill_s, decode_s))
    timing = json.loads(render(answer))["timing"]
    assert timing["time_to_first_token_s"] == pytest.approx(timing["queue_s"] + timing["prefill_s"], abs=1e-9)
    assert timing["total_s"] == pytest.approx(timing["time_to_first_token_s"] + timing["decode_s"], abs=1e-9)
    assert timing["decode_s"] == pytest.approx(decode_s, abs=1e-6)
    rate = tokens / timing["total_s"] if timing["total_s"] else 0.0
    assert timing["tokens_per_second"] == pytest.approx(rate, abs=1e-6)
    assert timing["started_at"] == "1970-01-01T00:00:00.000Z"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), VALUES, max_size=4), st.text())
def test_whatever_was_read_is_repeated(fields: dict[str, object], text: str) -> None:
    data = json.dumps(fields).encode()
    line = render(completion(text, of=item(read_object(data))))
    assert line.count(b"\n") == 1
    record = json.loads(line.decode())
    assert (record["input"], record["completion"]) == (fields, text)


@given(st.text(alphabet=st.characters(categories=["Cs", "Ll"]), min_size=1))
def test_half_a_surrogate_pair_becomes_the_replacement_character(text: str) -> None:
    fields = MappingProxyType({"a": [{text: text}], "b": 1})
    record = json.loads(render(completion(text, of=item(fields))).decode())
    expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert record["completion"] == expected
    assert record["input"] == {"a": [{expected: expected}], "b": 1}


def test_a_number_that_is_not_finite_becomes_null() -> None:
    record = json.loads(render(completion(of=item({"a": [float("inf"), float("nan")]}))))
    assert record["input"] == {"a": [None, None]}


def test_depth_that_can_be_read_can_be_written() -> None:
    fields = read_object(b'{"a": ' + b"[" * 199 + b"]" * 199 + b"}")
    assert json.loads(render(completion("\ud800", of=item(fields))))["input"] == fields


def test_results_are_read_without_the_summary(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    # A paragraph separator ends a line for some readers, and does not for JSON Lines.
    path.write_bytes(
        render(completion("a\u2028b\x85c")) + render(completion("d")) + b'{"object":"summary","job":"x"}\n'
    )
    assert [record["completion"] for record in read_results(path)] == ["a\u2028b\x85c", "d"]
    assert len(list(read_results(str(path)))) == 2


@pytest.mark.parametrize("damage", [b'{"object":"comple', b"[1]\n", b"\0\0\0", b'{"a":"\xff"}\n', b"null\n"])
def test_a_damaged_file_of_results_is_refused_with_the_line(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(render(completion()) + damage)
    results = read_results(path)
    assert next(results)["index"] == 7
    with pytest.raises(DataError, match=r"out\.jsonl:2: this is no record of an output"):
        next(results)


def test_a_file_of_results_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"none\.jsonl: cannot be read"):
        list(read_results(tmp_path / "none.jsonl"))
