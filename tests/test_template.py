"""Templates: what may stand in one, and that a line's text never becomes part of the template."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.spec.template import MissingFieldError, Template, check_template


def test_fields_are_put_in_their_places_and_doubled_braces_are_braces() -> None:
    template = Template('{{"{title}"}}: {text}\n{title}{{}}')
    assert template.names == ["title", "text", "title"]
    assert template.fill({"title": "A", "text": "b", "more": 1}) == '{"A"}: b\nA{}'


def test_a_name_may_be_any_key_of_an_object() -> None:
    assert Template("{a b}{été}{meta.lang}{0}").fill({"a b": "1", "été": "2", "meta.lang": "3", "0": "4"}) == "1234"


JSON_VALUES = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(JSON_VALUES, st.text())
def test_values_go_in_as_they_are(value: object, literal: str) -> None:
    template = Template(literal.replace("{", "{{").replace("}", "}}") + "{x}|{x}")
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    assert template.fill({"x": value}) == f"{literal}{text}|{text}"


@pytest.mark.parametrize("fields", [{}, {"text": None}])
def test_a_field_that_is_absent_or_null_is_missing(fields: dict[str, object]) -> None:
    with pytest.raises(MissingFieldError) as caught:
        Template("{title}: {text}").fill({"title": "A", **fields})
    assert caught.value.name == "text"


@pytest.mark.parametrize(
    "name", ["", " ", " text", "text ", "text[0]", "text!r", "text:>10", "text.__class__:x", "text[__init__]"]
)
def test_what_str_format_would_evaluate_is_refused(name: str) -> None:
    (problem,) = check_template(f"ab\n {{{name}}} {{fine}}")
    assert problem.startswith("line 2, column 2 of the template: ")


def test_every_problem_is_reported_with_its_place() -> None:
    problems = check_template("{ {fine}\n}\n  {}{x!r}")
    places = [problem.partition(" of the template")[0] for problem in problems]
    assert places == ["line 1, column 1", "line 2, column 1", "line 3, column 3", "line 3, column 5"]
    with pytest.raises(ValueError, match="single"):
        Template("{")


@pytest.mark.parametrize("text", ["no field", "{{text}}", ""])
def test_a_template_without_a_field_is_refused(text: str) -> None:
    (problem,) = check_template(text)
    assert "names no field" in problem
    assert ("not {{text}}" in problem) == ("{{" in text)


@given(st.text(alphabet="{}a :!\n"))
def test_any_text_is_either_refused_or_filled(text: str) -> None:
    if not check_template(text):
        template = Template(text)
        filled = template.fill(dict.fromkeys(template.names, "{a}"))
        assert filled == text.format(**dict.fromkeys(template.names, "{a}"))
