"""Strict JSON, with Python's own parser as the judge."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.source.json_object import BadJsonError, kind_of, read_object

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.text(), VALUES, max_size=4)


def judge(data: bytes) -> object:
    """What the standard parser reads, or None where strictness must refuse."""

    def refuse(_: str) -> object:
        raise ValueError

    try:
        value = json.loads(data.decode(), parse_constant=refuse)
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


@given(OBJECTS, st.booleans())
def test_whatever_an_object_holds_is_read_as_it_is(value: dict[str, object], ascii_only: bool) -> None:
    data = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert read_object(data) == value


@given(OBJECTS, st.data())
def test_a_mutated_object_is_read_as_the_standard_parser_does_or_refused(value: dict[str, object], data) -> None:
    text = bytearray(json.dumps(value).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(text)))
        text[place : place + data.draw(st.integers(0, 2))] = data.draw(
            st.binary(max_size=2)
            | st.sampled_from([b'"', b"{", b"}", b"[", b",", b":", b"\\u", b"d800", b"e999", b"-"])
        )
    expected = judge(bytes(text))
    try:
        assert read_object(bytes(text)) == expected
    except BadJsonError as error:
        assert expected is None, text
        assert error.type in ("invalid_json", "invalid_utf8", "not_an_object")


@pytest.mark.parametrize(
    ("data", "type_", "column", "words"),
    [
        (b'{"a": NaN}', "invalid_json", 7, "expected value"),
        (b'{"a": -Infinity}', "invalid_json", None, ""),
        (b'{"a": 1e999}', "invalid_json", None, "too large"),
        (b'{"a": [{"b": -1e400}]}', "invalid_json", None, "too large"),
        (b'{"a": ' + b"7" * 5000 + b"}", "invalid_json", None, "thousands of digits"),
        (b'{"a": ' + b"[" * 100_000, "invalid_json", None, "nested"),
        (b'{"a": "\\ud83d"}', "invalid_json", None, "surrogate"),
        (b'{"a": "\\ud83d\\u0041"}', "invalid_json", None, "surrogate"),
        (b'{"a": "\\ude00"}', "invalid_json", None, ""),
        (b'{"a": "\xed\xa0\x80"}', "invalid_utf8", None, "byte 8"),
        (b'{"a": "\xff"}', "invalid_utf8", None, "byte 8"),
        ('{"a": 1}'.encode("utf-16"), "invalid_utf8", None, "UTF-16"),
        ('{"a": 1}'.encode("utf-16-le"), "invalid_json", None, "UTF-16"),
        (b"\0" * 64, "invalid_json", None, "64 of 64 bytes are NUL"),
        (b"\xef\xbb\xbf{}", "invalid_json", 1, "byte order mark"),
        (b'{"a": 1', "invalid_json", 7, "whole object"),
        (b"{'a': 1}", "invalid_json", 2, 'quotes with "'),
        ('{"ä": 1,}'.encode(), "invalid_json", 9, "trailing comma"),  # a column of characters, not of bytes
        (b'{"a": 1} {"b": 2}', "invalid_json", 10, "trailing characters"),
        (b"[1]", "not_an_object", None, "not an array"),
        (b'"a"', "not_an_object", None, "not a string"),
        (b"null", "not_an_object", None, "not null"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, type_: str, column: int | None, words: str) -> None:
    with pytest.raises(BadJsonError) as caught:
        read_object(data)
    assert caught.value.type == type_
    assert words in str(caught.value)
    if column is not None:
        assert caught.value.column == column


def test_large_numbers_and_the_last_of_two_keys_are_kept() -> None:
    fields = read_object(b'{"a": 1, "a": 123456789012345678901234567890, "b": 1e308, "c": "\\u0000"}')
    assert fields == {"a": 123456789012345678901234567890, "b": 1e308, "c": "\0"}


def test_depth_that_is_read_can_be_written_again() -> None:
    fields = read_object(b'{"a": ' + b"[" * 199 + b"]" * 199 + b"}")
    assert json.loads(json.dumps(fields)) == fields


def test_kinds_are_told_apart() -> None:
    values = [None, True, 1, math.pi, "x", [], {}]
    names = ["null", "true or false", "a number", "a number", "a string", "an array", "an object"]
    assert [kind_of(value) for value in values] == names
