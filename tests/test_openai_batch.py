"""OpenAI batch lines in and out: what the `openai` client writes is answered, and it reads the answers unchanged."""

from __future__ import annotations

import gzip
import json
import shutil
import typing
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import OpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as TextParams

from pipeline import load_job, run_job
from pipeline.errors import OutputError, SpecError
from pipeline.ledger.files import RunPaths
from pipeline.output import choose_form
from pipeline.records import Message, Prompt, Rejection
from pipeline.source.line_parser import LineParser
from pipeline.source.lines import RawLine
from pipeline.spec.keys import JobSpec
from pipeline.tools.verify import verify_job
from tests.command import finish, is_generating, kill_after, start, wait_until, write_job
from tests.job_values import LEAST, nested

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "hello there"}]}
BATCH = {"input": {"format": "openai-batch"}, "output": {"format": "openai-batch"}}


def request(body: dict[str, Any], url: str = CHAT, custom_id: Any = "a") -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def parse(line: dict[str, Any], **keys: Any) -> Prompt | Rejection:
    spec = JobSpec.model_validate(nested(LEAST | {"input.format": "openai-batch"} | keys))
    return LineParser(spec).parse(RawLine(0, "in.jsonl", 1, 0, json.dumps(line).encode()))


def prompt(line: dict[str, Any], **keys: Any) -> Prompt:
    parsed = parse(line, **keys)
    assert isinstance(parsed, Prompt), parsed
    return parsed


def error(line: dict[str, Any], **keys: Any) -> tuple[str, str]:
    parsed = parse(line, **keys)
    assert isinstance(parsed, Rejection), parsed
    return parsed.error.type, parsed.error.message


def run(directory: Path, lines: list[Any], **sections: Any) -> list[dict[str, Any]]:
    job = write_job(directory, lines, **(BATCH | sections))
    assert finish(job) in (0, 3)
    return [json.loads(line) for line in (directory / "out.jsonl").read_bytes().splitlines()]


# What the client sends for a request, and what it makes of our answer to it.


class Service:
    """Stands for OpenAI's: answers each request of the client with a run over a batch file of that one request."""

    def __init__(self, directory: Path, **sections: Any) -> None:
        self._directory = directory
        self._sections = sections
        transport = httpx2.MockTransport(self._answer)
        self.client = OpenAI(
            api_key="none",
            base_url="http://service/v1",
            max_retries=0,
            http_client=httpx2.Client(transport=transport),
            _strict_response_validation=True,
        )

    def _answer(self, sent: httpx2.Request) -> httpx2.Response:
        directory = self._directory / str(sum(1 for _ in self._directory.iterdir()))
        directory.mkdir()
        (answer,) = run(directory, [request(json.loads(sent.content), sent.url.path)], **self._sections)
        response = answer["response"]
        return httpx2.Response(
            response["status_code"], json=response["body"], headers={"x-request-id": response["request_id"]}
        )


def test_the_client_is_answered_as_by_the_service(tmp_path: Path) -> None:
    client = Service(tmp_path).client
    answer = client.chat.completions.create(
        model="any",
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        ],
        temperature=0,
        max_completion_tokens=500,
        user="somebody",
        stop="nothing says this",
    )
    (choice,) = answer.choices
    assert choice.message.content == "system: be brief\nuser: one\ntwo"
    assert (choice.finish_reason, choice.index, choice.message.role) == ("stop", 0, "assistant")
    assert answer.usage is not None and answer.usage.prompt_tokens == len("system: be brief\nuser: one\ntwo")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    text = client.completions.create(model="any", prompt="Once upon a time", max_tokens=4)
    assert (text.choices[0].text, text.choices[0].finish_reason) == ("Once", "length")


def test_the_client_raises_what_the_service_would(tmp_path: Path) -> None:
    with pytest.raises(openai.BadRequestError, match=r"body\.logprobs: is not supported") as refused:
        Service(tmp_path).client.chat.completions.create(model="any", logprobs=True, messages=HELLO["messages"])  # type: ignore[arg-type]
    assert refused.value.code == "unsupported_field" and refused.value.type == "invalid_request_error"
    failing = Service(tmp_path, model={"engine": "echo", "echo": {"fail_every": 1}})
    with pytest.raises(openai.InternalServerError, match="fail every 1"):
        failing.client.chat.completions.create(model="any", messages=HELLO["messages"])  # type: ignore[arg-type]


def test_samples_are_the_choices_of_one_line(tmp_path: Path) -> None:
    client = Service(tmp_path, generation={"num_samples": 3, "temperature": 1.0}).client
    answer = client.chat.completions.create(model="any", n=3, messages=[{"role": "user", "content": "a b c d e f g"}])
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage is not None and answer.usage.completion_tokens >= 3 * len("user: a b c")
    assert answer.usage.prompt_tokens == len("user: a b c d e f g")  # counted once, as OpenAI does


EVERY_FIELD = {
    **{name: (CHAT, HELLO) for name in typing.get_type_hints(ChatParams)},
    **{name: (TEXT, {"prompt": "x"}) for name in typing.get_type_hints(TextParams)},
}
ACCEPTED = {
    **{"model": "any", "messages": HELLO["messages"], "prompt": "x", "max_tokens": 5, "max_completion_tokens": 5},
    **{"temperature": 0.5, "top_p": 0.5, "seed": 3, "stop": ["a", "b"], "user": "u", "metadata": {"a": "b"}, "n": 1},
    **{"safety_identifier": "s", "prompt_cache_key": "k", "prompt_cache_retention": "24h", "stream": False},
    **{"store": False, "logprobs": False, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}},
    **{"response_format": {"type": "text"}, "modalities": ["text"], "tools": [], "tool_choice": "none"},
    **{"parallel_tool_calls": True, "service_tier": "auto", "verbosity": "medium", "best_of": 1, "echo": False},
    **{"suffix": "", "reasoning_effort": "none"},
}


@pytest.mark.parametrize("name", sorted(EVERY_FIELD))
def test_every_published_field_is_taken_or_refused_by_name(name: str) -> None:
    url, body = EVERY_FIELD[name]
    assert isinstance(parse(request({**body, name: None} if name not in body else body, url)), Prompt)
    if name in ACCEPTED:
        assert isinstance(parse(request({**body, name: ACCEPTED[name]}, url)), Prompt)
    labels = {"model", "user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
    if name not in labels | {"parallel_tool_calls"}:
        kind, message = error(request({**body, name: {"odd": ["value"]}}, url))
        assert kind in ("unsupported_field", "invalid_setting", "wrong_type") and f"body.{name}" in message


def test_there_are_fields_to_test() -> None:
    assert len(EVERY_FIELD) > 40 and EVERY_FIELD.keys() >= ACCEPTED.keys()


def test_a_body_sets_what_it_names_and_the_job_the_rest() -> None:
    keys = {"generation.max_new_tokens": 99, "generation.top_p": 0.25, "input.system": "the job's"}
    body = {**HELLO, "temperature": 1, "max_tokens": 7, "max_completion_tokens": 7, "stop": "end", "top_k": 4}
    parsed = prompt(request(body), **keys)
    settings = parsed.settings
    assert (settings.temperature, settings.max_new_tokens, settings.top_p) == (1, 7, 0.25)
    assert (settings.stop, settings.top_k, parsed.system) == (("end",), 4, "the job's")
    assert (parsed.item.id, parsed.is_text, parsed.thinking) == ("a", False, None)
    assert prompt(request({"messages": [{"role": "developer", "content": "x"}]}), **keys).system is None
    assert prompt(request({"prompt": ["once"]}, TEXT)).content == "once"


@pytest.mark.parametrize(
    ("line", "kind", "field"),
    [
        (request(HELLO, "/v1/embeddings"), "unsupported_field", "url"),
        (request(HELLO) | {"method": "GET"}, "unsupported_field", "method"),
        (request(HELLO, custom_id=7), "wrong_type", "custom_id"),
        (request(HELLO, custom_id=None), "missing_field", "custom_id"),
        ({"custom_id": "a", "body": HELLO}, "missing_field", "url"),
        (request([]), "wrong_type", "body"),
        (request({}), "missing_field", "body.messages"),
        (request({"messages": []}), "empty_messages", "body.messages"),
        (request({"messages": [{"role": "robot", "content": ""}]}), "unknown_role", "body.messages.0.role"),
        (request(HELLO) | {"generation": {"seed": 1}}, "ambiguous_line", "generation"),
        (
            request({**HELLO, "max_tokens": 7, "max_completion_tokens": 8}),
            "ambiguous_line",
            "body.max_completion_tokens",
        ),
        (request({**HELLO, "n": 2}), "unsupported_field", "body.n"),
        (request({**HELLO, "n": True}), "unsupported_field", "body.n"),
        (request({**HELLO, "stream": True}), "unsupported_field", "body.stream"),
        (request({**HELLO, "frequency_penalty": False}), "unsupported_field", "body.frequency_penalty"),
        (request({**HELLO, "made_up": 1}), "unsupported_field", "body.made_up"),
        (request({**HELLO, "max_tokens": 0}), "invalid_setting", "body.max_tokens"),
        (request({**HELLO, "reasoning_effort": "high"}), "unsupported_field", "body.reasoning_effort"),
        (request({**HELLO, "chat_template_kwargs": {"x": 1}}), "unsupported_field", "body.chat_template_kwargs.x"),
        (request({"prompt": ["a", "b"]}, TEXT), "unsupported_field", "body.prompt"),
        (request({"prompt": [1, 2]}, TEXT), "unsupported_field", "body.prompt"),
        (request({"prompt": 5}, TEXT), "wrong_type", "body.prompt"),
        ({"prompt": "a line of another kind"}, "missing_field", "custom_id"),
    ],
)
def test_what_cannot_be_answered_as_asked_is_refused(line: dict[str, Any], kind: str, field: str) -> None:
    found, message = error(line)
    assert found == kind and message.lstrip("`").startswith(field)


@pytest.mark.parametrize(
    ("body", "mode"),
    [
        ({"chat_template_kwargs": {"enable_thinking": True}}, "on"),
        ({"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "none"}, "off"),
        ({"reasoning_effort": "none"}, "off"),
        ({"chat_template_kwargs": {}}, None),
    ],
)
def test_a_line_may_switch_thinking(body: dict[str, Any], mode: str | None) -> None:
    assert prompt(request({**HELLO, **body})).thinking == mode
    contrary = {"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "none"}
    assert error(request({**HELLO, **contrary}))[0] == "ambiguous_line"


def test_the_format_is_found_line_by_line() -> None:
    auto = {"input.format": "auto"}
    assert prompt(request(HELLO), **auto).item.id == "a"
    crawl = {"id": 3, "url": "http://example.org", "body": {"x": 1}, "prompt": "an own prompt wins"}
    assert prompt(crawl, **auto).content == "an own prompt wins"
    assert prompt(request(HELLO) | {"id": 1}, **auto).content == (Message("user", "hello there"),)
    templated = {"input.format": "auto", "input.template": "{url}"}
    assert prompt(request(HELLO), **templated).content == CHAT


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from([*EVERY_FIELD, "chat_template_kwargs", "top_k", "other"])


@given(st.dictionaries(NAMES, JSON | st.sampled_from(list(ACCEPTED.values())), max_size=4), JSON, st.booleans())
def test_whatever_a_line_holds_it_is_read_or_refused(body: dict[str, Any], odd: Any, is_text: bool) -> None:
    content = {"prompt": "x"} if is_text else HELLO
    parsed = parse(request({**content, **body}, TEXT if is_text else CHAT))
    assert isinstance(parsed, Prompt | Rejection)
    for name in ("custom_id", "method", "url", "body", "generation"):
        changed = parse({**request(HELLO), name: odd})
        assert isinstance(changed, Rejection) or odd in (None, "POST", CHAT) or name == "custom_id"
    assert isinstance(parse(request({**HELLO, "messages": odd})), Prompt | Rejection)


LINES: list[Any] = [
    *(request({"messages": [{"role": "user", "content": f"say {n} " * n}]}, custom_id=f"r{n}") for n in range(1, 30)),
    b"{not json",
    request({"prompt": "text"}, TEXT, "text"),
    request({**HELLO, "stream": True}, custom_id="refused"),
    {"prompt": "of another kind"},
]


def test_the_output_is_what_the_published_shapes_say(tmp_path: Path) -> None:
    answers = run(tmp_path, LINES)
    assert [answer["custom_id"] for answer in answers] == [
        *(f"r{n}" for n in range(1, 30)),
        None,
        "text",
        "refused",
        None,
    ]
    assert len({answer["id"] for answer in answers}) == len(LINES)
    for answer in answers:
        assert answer.keys() == {"id", "custom_id", "response", "error"}
        body, status = answer["response"]["body"], answer["response"]["status_code"]
        assert (status == 200) == (answer["error"] is None)
        if status == 200:
            model = Completion if answer["custom_id"] == "text" else ChatCompletion
            assert model.model_validate(body, strict=True).model_dump(exclude_unset=True) == body
        else:
            assert status == 400 and body["error"]["code"] == answer["error"]["code"]
            assert answer["error"]["line"] in (30, 32, 33)


def test_timing_and_summary_stand_beside_the_output(tmp_path: Path) -> None:
    run(tmp_path, LINES, generation={"num_samples": 2})
    timings = [json.loads(line) for line in (tmp_path / "out.jsonl.timing.jsonl").read_bytes().splitlines()]
    assert [(each["index"], each["sample"]) for each in timings] == [(i, s) for i in range(len(LINES)) for s in (0, 1)]
    assert all((each["timing"] is None) == (each["error"] is not None) for each in timings)
    summary = json.loads((tmp_path / "out.jsonl.summary.json").read_bytes())
    assert (summary["completed"], summary["failed"]) == (60, 6)


def test_prompts_of_our_own_may_be_answered_in_their_shape(tmp_path: Path) -> None:
    answers = run(tmp_path, [{"id": 7, "prompt": "x"}, {"prompt": "y"}], input={"format": "auto"})
    assert [answer["custom_id"] for answer in answers] == ["7", None]


def test_a_choice_that_failed_is_told_beside_the_others(tmp_path: Path) -> None:
    job = load_job(write_job(tmp_path, [request(HELLO)], **BATCH, generation={"num_samples": 2}))
    assert run_job(job, quiet=True).exit_code == 0
    good, other = (tmp_path / "out.jsonl.partial").read_bytes().splitlines(keepends=True)
    bad = {**json.loads(other), "completion": None, "usage": None, "timing": None, "finish_reason": "error"}
    bad["error"] = {
        "type": "out_of_memory",
        "message": "too large",
        "file": "in",
        "line": 1,
        "offset": 0,
        "attempts": 1,
    }
    (line,) = choose_form(job, Path(job.output.path)).encode(
        [good, json.dumps(bad).encode() + b"\n"], lambda _: b"", summary_line=False
    )
    answer = json.loads(line)
    assert [choice["index"] for choice in answer["response"]["body"]["choices"]] == [0]
    assert answer["error"]["code"] == "out_of_memory" and "1 of 2 choices are missing" in answer["error"]["message"]


def without_times(path: Path) -> list[Any]:
    answers = [json.loads(line) for line in path.read_bytes().splitlines()]
    for answer in answers:
        answer["response"]["body"].pop("created", None)
    return answers


def test_a_killed_run_over_gzip_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    sections = {**BATCH, "model": {"engine": "echo", "echo": {"delay": "10ms"}}, "batch": {"slots": 2}}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for directory in (whole, killed):
        directory.mkdir()
        packed = directory / "in.jsonl.gz"
        job = write_job(directory, LINES * 4, **sections)
        packed.write_bytes(gzip.compress((directory / "in.jsonl").read_bytes()))
        job.write_text(job.read_text().replace("in.jsonl", "in.jsonl.gz"))
        if directory is killed:
            process = start("run", job, "--quiet")
            wait_until(lambda: is_generating(killed))
            assert kill_after(process, 0) == -9
            assert not (directory / "out.jsonl").exists()
        assert finish(job) == 3
    expected = without_times(whole / "out.jsonl")
    for one, other in zip(expected, without_times(killed / "out.jsonl"), strict=True):
        one_error, other_error = (each["error"] and each["error"]["code"] for each in (one, other))
        assert one_error == other_error
        if not one_error:
            assert one["response"]["body"]["choices"] == other["response"]["body"]["choices"]
            assert one["response"]["body"]["usage"] == other["response"]["body"]["usage"]
    assert len(json.loads((killed / "out.jsonl.summary.json").read_bytes())["sessions"]) == 2


# What goes beside the output is published, guarded and missed as the output itself.


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    run(tmp_path, LINES)
    return tmp_path / "job.yaml"


def problems_of(job: Path) -> list[str]:
    problems: list[Any] = []
    verify_job(load_job(job), problems.append)
    return [str(problem) for problem in problems]


def test_a_missing_companion_is_told_and_published_again(finished: Path) -> None:
    timing = RunPaths(finished.parent / "out.jsonl").companion(".timing.jsonl")
    before = timing.read_bytes()
    timing.unlink()
    (told,) = problems_of(finished)
    assert "timing.jsonl: is missing" in told
    assert finish(finished) == 3
    assert timing.read_bytes() == before
    timing.write_bytes(before.replace(b"r1", b"r9", 1))
    (told,) = problems_of(finished)
    assert "timing.jsonl: is not what was published" in told


def test_a_changed_byte_of_the_output_is_told_with_its_line(finished: Path) -> None:
    output = finished.parent / "out.jsonl"
    output.write_bytes(output.read_bytes().replace(b"say 3", b"say 4", 1))
    (told,) = problems_of(finished)
    assert "out.jsonl:3: differs from the run's answers" in told


def test_a_strangers_companion_is_refused_and_moved_by_fresh(finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("job.yaml", "in.jsonl"):
        shutil.copy(finished.parent / name, other)
    job = other / "job.yaml"
    job.write_text(job.read_text().replace(str(finished.parent), str(other)))
    stranger = other / "out.jsonl.timing.jsonl"
    stranger.write_text("somebody's")
    with pytest.raises(OutputError, match=r"timing\.jsonl: exists and is not of this run"):
        run_job(load_job(job), quiet=True)
    assert run_job(load_job(job), fresh=True, quiet=True).exit_code == 3
    assert (other / "out.jsonl.timing.jsonl.old-1").read_text() == "somebody's"
    assert problems_of(job) == []


def test_fields_of_the_input_have_no_place_in_their_shape(tmp_path: Path) -> None:
    job = write_job(tmp_path, LINES, **BATCH)
    with pytest.raises(SpecError) as refused:
        load_job(job, overrides=["output.keep_fields=none", "input.template=x {x}"])
    assert "output.keep_fields: has no place in OpenAI's shape" in str(refused.value)
    assert "input.template: has no meaning with input.format messages or openai-batch" in str(refused.value)
