"""Lines to prompts and rejections: formats, precedence, every way a line can be bad."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jsonlines
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import SpecError
from pipeline.records import Message, Prompt, Rejection, Settings
from pipeline.source import bad_line
from pipeline.source.inputs import expand_inputs
from pipeline.source.line_parser import LineParser, validate_lines
from pipeline.source.lines import RawLine, digest_inputs, read_lines
from pipeline.spec.keys import JobSpec

EXAMPLES = Path(__file__).parent.parent / "examples" / "inputs"


def spec(path: Path | str = "in.jsonl", *, generation: dict[str, Any] | None = None, **input_keys: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "model": {"engine": "echo"},
            "input": {"path": str(path), **input_keys},
            "generation": generation or {},
            "output": {"path": "out.jsonl"},
        }
    )


def parse(line: object, **input_keys: Any) -> Prompt | Rejection:
    data = line if isinstance(line, bytes) else json.dumps(line).encode()
    return LineParser(spec(**input_keys)).parse(RawLine(3, "in.jsonl", 5, 70, data))


def prompt(line: object, **input_keys: Any) -> Prompt:
    parsed = parse(line, **input_keys)
    assert isinstance(parsed, Prompt), parsed
    return parsed


def rejection(line: object, **input_keys: Any) -> Rejection:
    parsed = parse(line, **input_keys)
    assert isinstance(parsed, Rejection), parsed
    return parsed


def user(*contents: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": content} for content in contents]


def test_a_prompt_line_keeps_its_place_its_id_and_all_its_fields() -> None:
    line = {"id": 7, "prompt": "Hi", "more": {"a": [1]}}
    got = prompt(line)
    assert (got.content, got.system, got.settings) == ("Hi", None, Settings())
    item = got.item
    assert (item.index, item.file, item.line, item.offset, item.id) == (3, "in.jsonl", 5, 70, 7)
    assert item.fields == line


def test_fields_may_have_other_names() -> None:
    names = {"prompt_field": "question", "messages_field": "chat", "id_field": "key"}
    got = prompt({"question": "Hi", "key": "k", "prompt": 1, "messages": 2, "id": [3]}, **names)
    assert (got.content, got.item.id) == ("Hi", "k")
    assert prompt({"chat": user("Hi")}, **names).content == (Message("user", "Hi"),)


def test_auto_decides_line_by_line_and_null_is_absent() -> None:
    assert prompt({"prompt": "Hi", "messages": None}).content == "Hi"
    assert prompt({"prompt": None, "messages": user("Hi")}).content == (Message("user", "Hi"),)
    assert rejection({"prompt": "Hi", "messages": user("Hi")}).error.type == "ambiguous_line"
    assert prompt({"prompt": "Hi", "messages": user("Ho")}, format="prompt").content == "Hi"
    assert prompt({"prompt": "Hi", "messages": user("Ho")}, format="messages").content == (Message("user", "Ho"),)


def test_one_field_may_hold_either() -> None:
    same = {"prompt_field": "prompt", "messages_field": "prompt"}
    assert prompt({"prompt": "Hi"}, **same).content == "Hi"
    assert prompt({"prompt": user("Hi")}, **same).content == (Message("user", "Hi"),)
    assert rejection({"prompt": 1}, **same).error.type == "wrong_type"


def test_text_parts_are_joined_by_line_ends() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert prompt({"messages": user(parts, "c")}).content == (Message("user", "a\nb"), Message("user", "c"))


def test_a_template_is_filled_from_the_line_and_its_text_stays_text(tmp_path: Path) -> None:
    line = {"text": "{title} {0.__class__}", "title": "T", "messages": user("ignored"), "n": [1]}
    assert prompt(line, template="{title}: {text} {n}").content == "T: {title} {0.__class__} [1]"
    (tmp_path / "template.txt").write_text("Über {title}")
    assert prompt(line, template={"file": str(tmp_path / "template.txt")}).content == "Über T"
    refused = rejection({"text": "a", "tittle": "b"}, template="{title}: {text}")
    assert refused.error.type == "missing_field"
    assert refused.error.message.startswith("title: ")
    assert '"tittle"' in refused.error.message


def test_all_that_is_wrong_with_a_template_is_one_error_of_the_job() -> None:
    with pytest.raises(SpecError) as caught:
        LineParser(spec(template="{a!r} {"))
    assert [problem.field for problem in caught.value.problems] == ["input.template"] * 2


SYSTEM = {"role": "system", "content": "own"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"prompt": "Hi"}, "job"),
        ({"prompt": "Hi", "generation": {"system": "line"}}, "line"),
        ({"prompt": "Hi", "generation": {"system": ""}}, ""),
        ({"prompt": "Hi", "generation": {"system": None}}, "job"),
        ({"messages": user("Hi")}, "job"),
        ({"messages": user("Hi"), "generation": {"system": "line"}}, "line"),
        ({"messages": [SYSTEM, *user("Hi")]}, None),
    ],
)
def test_the_nearest_system_prompt_counts(line: dict[str, object], expected: str | None) -> None:
    got = prompt(line, system="job")
    assert got.system == expected
    assert isinstance(got.content, str) or (Message("system", "own") in got.content) == (expected is None)


def test_two_system_prompts_on_one_line_are_one_too_many() -> None:
    line = {"messages": [SYSTEM, *user("Hi")], "generation": {"system": "line"}}
    refused = rejection(line, system="job")
    assert (refused.error.type, "generation.system" in refused.error.message) == ("ambiguous_line", True)


def test_a_line_overrides_the_settings_of_the_job_and_null_leaves_them() -> None:
    job = spec(generation={"temperature": 0.5, "seed": 1, "stop": ["x"]})
    line = {"prompt": "Hi", "generation": {"seed": 9, "stop": ["a", "b"], "temperature": None, "top_k": None}}
    got = LineParser(job).parse(RawLine(0, "in.jsonl", 1, 0, json.dumps(line).encode()))
    assert isinstance(got, Prompt)
    assert got.settings == Settings(temperature=0.5, seed=9, stop=("a", "b"))


@pytest.mark.parametrize(
    ("generation", "type_", "words"),
    [
        ({"top_p": 1.5}, "invalid_setting", "top_p"),
        ({"temprature": 1}, "invalid_setting", "temperature"),
        ({"num_samples": 2}, "invalid_setting", "num_samples"),
        ({"seed": "7", "top_k": -1}, "invalid_setting", "top_k"),
        ({"system": 5}, "invalid_setting", "system"),
        ("an earlier answer", "wrong_type", "generation: "),
        ([], "wrong_type", "generation: "),
    ],
)
def test_bad_settings_of_a_line_are_that_lines_error(generation: object, type_: str, words: str) -> None:
    refused = rejection({"id": "a", "prompt": "Hi", "generation": generation})
    assert refused.error.type == type_
    assert words in refused.error.message
    assert (refused.item.id, refused.item.fields) == ("a", {"id": "a", "prompt": "Hi", "generation": generation})


@pytest.mark.parametrize(
    ("line", "type_", "words"),
    [
        ({}, "missing_field", 'prompt: the line has no such field, nor "messages"'),
        ({"Prompt": "Hi"}, "missing_field", 'a similar one is "Prompt"'),
        ({"text": "Hi", "n": 1}, "missing_field", 'it has "text", "n"'),
        ({"prompt": None}, "missing_field", "prompt: is null"),
        ({"prompt": 1}, "wrong_type", "prompt: must be a string, not a number"),
        ({"prompt": user("Hi")}, "wrong_type", "set input.messages_field: prompt"),
        ({"prompt": ""}, None, ""),
        ({"messages": []}, "empty_messages", "messages: "),
        ({"messages": {}}, "wrong_type", "not an object"),
        ({"messages": ["Hi"]}, "wrong_type", "messages.0: "),
        ({"messages": [{"content": "Hi"}]}, "missing_field", "messages.0.role: "),
        ({"messages": [{"role": ["user"], "content": "Hi"}]}, "wrong_type", "messages.0.role: "),
        ({"messages": [*user("Hi"), {"role": "User", "content": "Hi"}]}, "unknown_role", 'not "User"'),
        ({"messages": [{"role": "tool", "content": "Hi"}]}, "unknown_role", "system, user, assistant"),
        ({"messages": [{"role": "user", "content": None}]}, "missing_field", "messages.0.content: "),
        ({"messages": user(7)}, "wrong_type", "messages.0.content: "),
        ({"messages": user([])}, "missing_field", "messages.0.content: "),
        ({"messages": user(["Hi"])}, "wrong_type", "messages.0.content.0: "),
        ({"messages": user([{"type": "text"}])}, "wrong_type", "messages.0.content.0.text: "),
        ({"messages": user([{"type": "image_url", "image_url": {}}])}, "unsupported_content", "content.0.type: "),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
            "unsupported_content",
            "messages.0.tool_calls: ",
        ),
        ({"id": ["a"], "prompt": "Hi"}, "wrong_type", "id: "),
        ({"id": {}, "prompt": "Hi"}, "wrong_type", "id: "),
        (["Hi"], "not_an_object", "not an array"),
        (b'{"prompt": }', "invalid_json", "column 12: "),
        (b'{"prompt": "\xff"}', "invalid_utf8", "byte 13"),
    ],
)
def test_every_way_to_be_wrong(line: object, type_: str | None, words: str) -> None:
    parsed = parse(line)
    assert (parsed.error.type if isinstance(parsed, Rejection) else None) == type_
    if isinstance(parsed, Rejection):
        assert words in parsed.error.message
        assert parsed.error.attempts == 1
        assert (parsed.item.index, parsed.item.line, parsed.item.offset) == (3, 5, 70)


@pytest.mark.parametrize("id_", ["a", 1, 1.5, True, None])
def test_the_id_of_a_bad_line_is_kept_where_it_is_one(id_: object) -> None:
    assert rejection({"id": id_}).item.id == id_
    assert rejection({"id": [id_]}).item.id is None
    assert rejection(b"{").item.fields is None


def test_a_line_too_long_says_what_the_limit_is() -> None:
    parsed = LineParser(spec(max_line="1KiB")).parse(RawLine(0, "in.jsonl", 1, 0, None))
    assert isinstance(parsed, Rejection)
    assert (parsed.error.type, "1024 bytes of input.max_line" in parsed.error.message) == ("line_too_long", True)


def test_what_a_prompt_says_is_in_no_message() -> None:
    secret = "sesame"
    lines: list[object] = [{"text": secret}, {"prompt": [secret]}, {"messages": secret}, [secret], secret]
    lines += [{"messages": user([secret])}, {"messages": user([{"type": secret}])}, {"id": [secret], "prompt": ""}]
    lines += [b'{"prompt": "sesame', b'{"prompt": "sesame\xff"}', b'{"prompt": sesame}']
    assert not [line for line in lines if secret in rejection(line).error.message]


def test_long_names_are_cut_short() -> None:
    refused = rejection({name * 100_000: 1 for name in "abcdefgh"})
    assert len(refused.error.message) < 1000


ATOMS = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["user", "text", "system"])
KEYS = st.sampled_from(["prompt", "messages", "id", "generation", "role", "content", "type", "text", "seed", "system"])
LINES = st.dictionaries(
    KEYS,
    st.recursive(ATOMS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4)),
    max_size=4,
)


@given(st.binary() | LINES | LINES.map(lambda line: json.dumps(line).encode()[:-1]))
def test_any_line_is_a_prompt_or_a_rejection_and_validate_agrees(line: object) -> None:
    data = line if isinstance(line, bytes) else json.dumps(line).encode()
    parser = LineParser(spec(template=None))
    raw = RawLine(3, "in.jsonl", 5, 70, data)
    parsed, problem = parser.parse(raw), parser.check(raw)
    if isinstance(parsed, Prompt):
        assert problem is None
        assert isinstance(parsed.content, str) or all(isinstance(each, Message) for each in parsed.content)
    else:
        assert problem is not None
        assert problem.message in parsed.error.message
        assert (problem.file, problem.line) == ("in.jsonl", 5)


def test_one_bad_line_costs_one_line(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    good = [{"prompt": f"question {number}"} for number in range(50)]
    bad = (EXAMPLES / "dirty.jsonl").read_bytes().split(b"\n")[1:-2]
    with path.open("wb") as file, jsonlines.Writer(file) as writer:
        for number, line in enumerate(good):
            writer.write(line)
            file.write(bad[number % len(bad)] + b"\n")
    parser, files = LineParser(spec(path)), expand_inputs([str(path)])
    parsed = [parser.parse(raw) for raw in read_lines(files, max_line_bytes=1 << 20)]
    assert [each.item.fields for each in parsed if isinstance(each, Prompt)] == good
    assert [each.item.index for each in parsed] == list(range(len(parsed)))
    assert len(parsed) == digest_inputs(files).num_items


def test_the_dirty_example_shows_every_type_of_rejection() -> None:
    job = spec(EXAMPLES / "dirty.jsonl", max_line="4KiB")
    parser, files = LineParser(job), expand_inputs(job.input.path)
    parsed = [parser.parse(raw) for raw in read_lines(files, max_line_bytes=job.input.max_line)]
    types = Counter(each.error.type for each in parsed if isinstance(each, Rejection))
    documented = (bad_line.__doc__ or "").partition("Types of a rejection:")[2]
    assert sorted(types) == sorted(re.findall(r"\w+_\w+", documented.partition("\n\n")[0]))
    assert [each.item.id for each in parsed if isinstance(each, Prompt)] == ["good-first", "good-crlf", "good-last"]
    problems = list(validate_lines(job, files))
    assert [problem.line for problem in problems] == [each.item.line for each in parsed if isinstance(each, Rejection)]
    assert [problem.field for problem in problems if problem.line == 9] == ["prompt"]


GOOD_EXAMPLES = sorted(set(EXAMPLES.glob("*.jsonl*")) - {EXAMPLES / "dirty.jsonl"})


@pytest.mark.parametrize("path", GOOD_EXAMPLES, ids=lambda path: path.name)
def test_the_other_examples_are_clean(path: Path) -> None:
    template = "{title}: {text}" if "fields" in path.name else None
    told: list[str] = []
    assert not list(validate_lines(spec(path, template=template), expand_inputs([str(path)]), told.append))
    assert not told


def test_settings_beside_the_prompt_are_told_once_unless_the_job_says_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    lines = [{"prompt": "a", "seed": 7, "source": "x"}, {"prompt": "b", "seed": 8, "system": "Be brief."}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def told(**changes: Any) -> list[str]:
        found: list[str] = []
        assert not list(validate_lines(spec(path, **changes), expand_inputs([str(path)]), found.append))
        return found

    end = 'beside the prompt changes no answer; settings of a line stand under "generation"'
    assert told() == [f'{path}, line 1: "seed" {end}', f'{path}, line 2: "system" {end}']
    assert [note.count("system") for note in told(id_field="seed")] == [1]
    assert told(template="{prompt}") == []


def test_the_compressed_example_is_the_plain_one() -> None:
    plain, packed = (digest_inputs(expand_inputs([str(EXAMPLES / name)])) for name in ("hello.jsonl", "hello.jsonl.gz"))
    assert plain.sha256 == packed.sha256
    assert plain.num_items >= 12
