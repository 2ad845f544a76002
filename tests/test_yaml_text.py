"""YAML as a job file may use it: plain values with places; what it has no use for is refused, quickly."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import SpecError
from pipeline.spec.yaml_text import MAX_FILE_BYTES, MAX_NODES, Place, plain_value, read_document, read_value

NAMES = st.text("ab_", min_size=1, max_size=5)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=20,
)


def refusal(text: str) -> str:
    with pytest.raises(SpecError) as caught:
        read_document(text, "job.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("No", "No"),
        ("y", "y"),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("none", "none"),
        ("1e-3", 0.001),
        ("1E5", 1e5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-7", -7),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("3:00", "3:00"),
        ("190:20:30", "190:20:30"),
        ("1_000", "1_000"),
        ("2026-01-01", "2026-01-01"),
        ("=", "="),
        ("<<", "<<"),
        ("1.2.3", "1.2.3"),
        ("0b11", "0b11"),
        (".inf", math.inf),
        ("-.Inf", -math.inf),
        ("1e999", math.inf),
        ("7" * 5000, "7" * 5000),
    ],
)
def test_words_mean_what_yaml_1_2_says(word: str, value: object) -> None:
    for found in (plain_value(word), read_document(f"key: {word}\n", "f").values["key"]):
        assert found == value
        assert type(found) is type(value)


def test_not_a_number_is_a_number() -> None:
    assert math.isnan(plain_value(".nan"))


@pytest.mark.parametrize("text", ["'on'", '"1e-3"', "'null'", "'5'"])
def test_quoted_words_are_text(text: str) -> None:
    assert read_document(f"key: {text}\n", "f").values["key"] == text[1:-1] == read_value(text)


@settings(max_examples=50)
@given(st.dictionaries(NAMES, JSON_VALUES, min_size=1, max_size=4))
def test_json_is_read_as_json(values: dict[str, Any]) -> None:
    # JSON is YAML as long as it escapes what YAML does not print; surrogate pairs are the one thing YAML lacks.
    text = "".join(
        f"\\U{ord(character):08x}" if ord(character) > 0xFFFF or 0x7F <= ord(character) < 0xA0 else character
        for character in json.dumps(values, ensure_ascii=False)
    )
    text = text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").replace("\ufeff", "\\ufeff")
    text = text.replace("\ufffe", "\\ufffe").replace("\uffff", "\\uffff")
    assert read_document(text, "f").values == values


def test_places_are_those_of_the_text() -> None:
    document = read_document("# a job\ninput:\n  path: [a,\n    b]\n  system: >\n    long\nname: x\n", "job.yaml")
    assert document.values == {"input": {"path": ["a", "b"], "system": "long\n"}, "name": "x"}
    assert document.place(("input", "path")) == Place("job.yaml", 3, 9)
    assert document.place(("input", "path", 1)) == Place("job.yaml", 4, 5)
    assert document.place(("input", "path"), of_key=True) == Place("job.yaml", 3, 3)
    assert document.place(("name",)) == Place("job.yaml", 7, 7)
    assert document.place(("input", "format")) == Place("job.yaml", 2, 1), "what is missing is missing in its section"
    assert document.place(("model", "path")) == Place("job.yaml")


@pytest.mark.parametrize(
    ("text", "place", "part"),
    [
        ("a: &x 1\n", "1:4", "anchors"),
        ("a: 1\nb: *x\n", "2:4", "aliases"),
        ("a: !!python/object:os.system 1\n", "1:4", "tags"),
        ("a: 1\nb: 2\na: 3\n", "3:1", "given twice; first in line 1"),
        ("a: 1\n? [b]\n: 2\n", "2:3", "a key must be a plain name"),
        ("!b a: 1\n", "1:1", "a key must be a plain name"),
        ("a.b: 1\n", "1:1", "'a.b' is no key"),
        ('"\\e[31m": 1\n', "1:1", "'\\x1b[31m' is no key"),
        ("a: 1\n---\nb: 2\n", "2:1", "a second document begins here"),
    ],
)
def test_what_a_job_file_has_no_use_for(text: str, place: str, part: str) -> None:
    (problem,) = read_document(text, "job.yaml").problems
    assert str(problem).startswith(f"job.yaml:{place}: ")
    assert part in str(problem)


def test_of_a_key_given_twice_the_first_counts() -> None:
    document = read_document("a: 1\na: {deep: [2]}\nb: 3\n", "f")
    assert document.values == {"a": 1, "b": 3}
    assert document.place(("a",)) == Place("f", 1, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "job.yaml: the file is empty; it needs at least model, input and output"),
        ("# only a comment\n", "job.yaml: the file is empty; it needs at least model, input and output"),
        ("- a\n", "job.yaml:1: the file must hold keys and values, such as `input:` on a line of its own"),
        ("a: x\0", r"job.yaml:1:5: the control character '\x00' has no place here"),
        ("a: 1\nb: \x1b[31m", r"job.yaml:2:4: the control character '\x1b' has no place here"),
    ],
)
def test_what_is_no_job_file(text: str, message: str) -> None:
    assert refusal(text) == message


@pytest.mark.parametrize(
    ("text", "place", "hint"),
    [
        ("input:\n  path: *.jsonl\n", "2:10", "put text that begins with * in quotes"),
        ("a:\n\tb: 1\n", "2:1", "indent with spaces"),
        ("a: b: c\n", "1:5", "put text that holds a colon and a space in quotes"),
        ("name: 'x\nb: 1\n", "1:7", "a quote is opened here and never closed"),
        ("a: 1\nb:2\nc: 3\n", "3:1", "a key is followed by a colon and a space"),
        ("a: [1, 2\nb: 3\n", "2:2", "a bracket is not closed"),
        ("a: {text} please\n", "1:11", "check the indentation and the quotes"),
        ('a: "\\d"\n', "1:5", "a backslash in double quotes begins an escape"),
    ],
)
def test_broken_syntax_is_placed_and_explained(text: str, place: str, hint: str) -> None:
    message = refusal(text)
    assert message.startswith(f"job.yaml:{place}: not valid YAML: ")
    assert hint in message


HOSTILE = {
    "open brackets": "[" * MAX_FILE_BYTES,
    "open braces": "{" * MAX_FILE_BYTES,
    "nested lists": "- " * (MAX_FILE_BYTES // 2),
    "nested keys": "? " * (MAX_FILE_BYTES // 2),
    "nested value of a key given twice": "a: 1\na: " + "[" * MAX_FILE_BYTES,
    "a million laughs": "a: &a [x, x]\n" + "".join(f"a{n}: [*a, *a, *a, *a, *a, *a]\n" for n in range(10_000)),
    "keys": "".join(f"k{n}: {n}\n" for n in range(80_000)),
    "the same key": "a: 1\n" * 200_000,
    "a long list": "a: [" + "x," * 400_000 + "]",
    "a long list under a key given twice": "a: 1\na: [" + "x," * 400_000 + "]",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_text_is_refused_in_under_a_second(what: str) -> None:
    began = time.process_time()
    message = refusal(HOSTILE[what])
    assert time.process_time() - began < 1
    assert "nested deeper" in message or f"more than {MAX_NODES} values" in message


@given(st.text(alphabet=st.sampled_from("ab:-?[]{},&*!|>'\"%@`#~ \n\t01.e\\"), max_size=60) | st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        document = read_document(text, "f")
    except SpecError as error:
        assert error.problems
    else:
        assert isinstance(document.values, dict)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        (" on ", "on"),
        ("", None),
        ("Summarise: {text}", "Summarise: {text}"),
        ("*.jsonl", "*.jsonl"),
        ("a # b", "a # b"),
        ("- x", "- x"),
        ("[a, 1]", ["a", 1]),
        ("{file: t.txt}", {"file": "t.txt"}),
        ('"{text}\\n"', "{text}\n"),
    ],
)
def test_a_value_on_the_command_line(text: str, value: object) -> None:
    assert read_value(text) == value


@pytest.mark.parametrize("text", ["[", "{text} please", '"a" b', "[*x]", "[!!str a]", '"\0"'])
def test_what_is_no_value_on_the_command_line(text: str) -> None:
    with pytest.raises(SpecError):
        read_value(text)
