"""Templates in Jinja: what they may say, what a line may do to them, and what they may never reach."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import load_job, run_job
from pipeline.errors import SpecError
from pipeline.spec import jinja_template
from pipeline.spec.fingerprint import fingerprint
from pipeline.spec.jinja_template import JinjaTemplate
from pipeline.spec.template import MissingFieldError, TemplateFailedError
from tests.command import REPOSITORY, overnight, read_output, write_job


def fill(text: str, **fields: Any) -> str:
    return JinjaTemplate(text).fill(fields)


@given(st.dictionaries(st.sampled_from("abc"), st.text(), min_size=3))
def test_fields_stand_where_they_are_named(fields: dict[str, str]) -> None:
    assert fill("<{{ a }}|{{ line['b'] }}|{{ line.c }}>", **fields) == "<{a}|{b}|{c}>".format(**fields)


def test_values_are_written_as_by_the_simple_template() -> None:
    assert fill("{{ x }}{{ y }}{{ z }}", x=[1, "ü"], y=True, z={"a": None}) == '[1, "ü"]true{"a": null}'
    assert fill("{% for t in tags %}\n- {{ t }}\n{% endfor %}\nend\n", tags=["a", "b"]) == "- a\n- b\nend"


@pytest.mark.parametrize(
    ("text", "name"),
    [("{{ title }}", "title"), ("{{ line['odd name'] }}", "odd name"), ("{{ author.name.first }}", "name")],
)
def test_what_a_line_lacks_is_an_error_with_its_name(text: str, name: str) -> None:
    with pytest.raises(MissingFieldError) as error:
        fill(text, author={}, other="x")
    assert error.value.name == name
    assert fill("{% if title is defined %}{{ title }}{% endif %}-", title=None) == "-"  # a null is lacking too


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{{ x", "line 1 of the template: unexpected end of template"),
        ("a\n{% if x %}", "line 2 of the template: "),
        ("{{ x | frobnicate }}", "line 1 of the template: No filter named 'frobnicate'"),
        ("{{ x }}{% include '/etc/passwd' %}", "without others"),
        ("{% extends x %}", "without others"),
        ("the same for all {{ range(3) }}", "names no field"),
    ],
)
def test_what_is_wrong_with_a_template_is_told_at_once(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "prompt.jinja").write_text(text)
    job = write_job(tmp_path, [{"x": "y"}], input={"template": {"file": str(tmp_path / "prompt.jinja")}})
    with pytest.raises(SpecError) as error:
        load_job(job)
    assert problem in str(error.value) and "prompt.jinja: input.template" in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "{{ x.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}{{ x }}",
        "{{ x.format.__globals__ }}",
        "{{ (x | attr('__class__')).__name__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}{{ x }}",
        "{{ '{0.__class__}'.format(x) }}",
        "{% set _ = tags.append(1) %}{{ x }}",
        "{% set _ = line.update(a=1) %}{{ x }}",
    ],
)
def test_neither_python_nor_the_line_is_in_reach(text: str) -> None:
    fields = {"x": "text", "tags": []}
    with pytest.raises((TemplateFailedError, MissingFieldError)):
        JinjaTemplate(text).fill(fields)
    assert fields == {"x": "text", "tags": []}


@pytest.mark.parametrize(
    "text",
    [
        "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}{{ x }}",
        "{% for a in range(90000) %}{{ x * 100000 }}{% endfor %}",
        "{{ x * 10 ** 15 }}",
        "{{ 'x'.center(10 ** 15) }}{{ x }}",
        "{{ range(10 ** 9) }}{{ x }}",
        "{{ 10 ** (10 ** 10) }}{{ x }}",
        "{{ 3 ** 100000000 }}{{ x }}",
        "{{ [x] * 10 ** 9 }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}{{ x }}",
    ],
)
def test_a_bomb_ends(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jinja_template, "_MAX_CPU_S", 0.3)
    began = time.process_time()
    with pytest.raises(TemplateFailedError):
        fill(text, x="x")
    assert time.process_time() - began < 5


def test_a_thread_without_signals_can_fill_too() -> None:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(fill("{{ x }}", x="text")))
    thread.start()
    thread.join()
    assert found == ["text"]


def test_a_line_that_the_template_fails_on_costs_itself(tmp_path: Path) -> None:
    (tmp_path / "prompt.j2").write_text("{{ 12 // n }} times {{ word }}\n")
    lines = [{"n": 3, "word": "a"}, {"n": 0, "word": "b"}, {"n": 4}, {"n": 2, "word": "{{ n }}"}]
    job = write_job(tmp_path, lines, input={"template": {"file": str(tmp_path / "prompt.j2")}})
    assert overnight("validate", job).stderr.count("in.jsonl:") == 2
    assert run_job(load_job(job), quiet=True).exit_code == 3
    answers, _ = read_output(tmp_path / "out.jsonl")
    assert [answer["completion"] for answer in answers] == ["4 times a", None, None, "6 times {{ n }}"]
    assert [answer["error"] and answer["error"]["type"] for answer in answers] == [
        *(None, "template_error", "missing_field", None)
    ]


def test_the_language_of_a_template_is_part_of_the_job(tmp_path: Path) -> None:
    prints = set[str]()
    for name in ("prompt.txt", "prompt.jinja", "other.jinja"):
        (tmp_path / name).write_text("{x} {{ x }}")
        job = write_job(tmp_path, [], input={"template": {"file": str(tmp_path / name)}})
        prints.add(fingerprint(load_job(job)))
    assert len(prints) == 2


def test_the_example_makes_a_prompt_of_each_example_line() -> None:
    template = JinjaTemplate((REPOSITORY / "examples/templates/summarise.jinja").read_text())
    lines = (REPOSITORY / "examples/inputs/prompts-with-fields.jsonl").read_text().splitlines()
    prompts = [template.fill(json.loads(line)) for line in lines]
    assert prompts[0].startswith("Summarise the text in one sentence.\nIt is about fable, animals.\n\nTHE TORTOISE")
