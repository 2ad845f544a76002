"""Prompts become token ids as transformers makes them, fit the context, or are answered with a reason."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import SpecError
from pipeline.prompting.encoder import BytesEncoder, PromptEncoder
from pipeline.prompting.length_limit import OverLength
from pipeline.records import Item, Message, Prompt, Rejection, Request, Settings
from tests.tokenizer_families import CORPUS, FAMILIES, family

ITEM = Item(index=7, file="in.jsonl", line=8, offset=900, id="a7")


def prompt(
    content: str | Sequence[tuple[str, str]] = "hello world", system: str | None = None, max_new_tokens: int = 256
) -> Prompt:
    if not isinstance(content, str):
        content = tuple(Message(*turn) for turn in content)
    return Prompt(ITEM, content, system, Settings(max_new_tokens=max_new_tokens, seed=3))


@cache
def encoder(name: str = "qwen", context_length: int = 4096, **options: object) -> PromptEncoder:
    return PromptEncoder(family(name), context_length=context_length, **options)  # type: ignore[arg-type]


def encoded(reply: Request | Rejection) -> Request:
    assert isinstance(reply, Request), reply
    return reply


def rejected(reply: Request | Rejection) -> tuple[str, str]:
    assert isinstance(reply, Rejection), reply
    assert reply.item is ITEM
    return reply.error.type, reply.error.message


def stock(name: str, conversation: Sequence[tuple[str, str]]) -> list[int]:
    turns = [{"role": role, "content": content} for role, content in conversation]
    return family(name).apply_chat_template(turns, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize("name", [name for name in FAMILIES if family(name).chat_template])
@pytest.mark.parametrize(
    "conversation",
    [
        [("user", CORPUS[2])],
        [("user", "hi"), ("assistant", "hello there"), ("user", CORPUS[0])],
        [("system", "be brief"), ("user", "hi")],
        [("user", "hi"), ("assistant", "hello")],
    ],
)
def test_a_conversation_is_encoded_as_by_transformers(name: str, conversation: list[tuple[str, str]]) -> None:
    reply = encoder(name).encode(prompt(conversation))
    if isinstance(reply, Rejection):
        assert (name, conversation[0][0]) in (("gemma", "system"), ("deepseek", "system"))
        return
    assert list(reply.token_ids) == stock(name, conversation)
    assert (reply.item, reply.sample, reply.generated) == (ITEM, 0, ())
    assert reply.settings == Settings(seed=3)


def test_a_prompt_is_a_user_turn_after_its_system_message() -> None:
    ids = encoded(encoder().encode(prompt("hi", system="be brief"))).token_ids
    assert list(ids) == stock("qwen", [("system", "be brief"), ("user", "hi")])


def test_a_conversation_keeps_its_own_system_message() -> None:
    own = encoded(encoder().encode(prompt([("system", "rhyme"), ("user", "hi")], system="be brief")))
    assert list(own.token_ids) == stock("qwen", [("system", "rhyme"), ("user", "hi")])
    jobs = encoded(encoder().encode(prompt([("user", "hi"), ("system", "rhyme")], system="be brief")))
    assert list(jobs.token_ids) == stock("qwen", [("system", "be brief"), ("user", "hi"), ("system", "rhyme")])


@pytest.mark.parametrize(("name", "token"), [("llama3", "<|begin_of_text|>"), ("llama2", "<s>"), ("gemma", "<bos>")])
def test_the_first_token_is_there_once(name: str, token: str) -> None:
    bos = family(name).convert_tokens_to_ids(token)
    assert encoded(encoder(name).encode(prompt())).token_ids.count(bos) == 1
    raw = encoded(encoder(name, chat_template="off").encode(prompt())).token_ids
    assert raw.count(bos) == (name != "gemma")  # that of the tokenizer itself, which this one does not add
    assert raw[: raw.count(bos)] == (bos,) * raw.count(bos)


@pytest.mark.parametrize("chat_template", ["auto", "off"])
def test_raw_text_goes_in_as_it_is_with_its_system_text_before_it(chat_template: str) -> None:
    name = "gpt2" if chat_template == "auto" else "qwen"
    raw = encoder(name, chat_template=chat_template)
    assert list(encoded(raw.encode(prompt(CORPUS[0]))).token_ids) == family(name)(CORPUS[0])["input_ids"]
    with_system = encoded(raw.encode(prompt("Q: 2+2?", system="Sums.")))
    assert family(name).decode(with_system.token_ids) == "Sums.\n\nQ: 2+2?"
    assert raw.render(prompt("Q: 2+2?", system="Sums.")) == "Sums.\n\nQ: 2+2?"


def test_render_shows_the_text_that_is_encoded() -> None:
    text = encoder(thinking_mode="off").render(prompt("hi", system="be brief"))
    assert text == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


@pytest.mark.parametrize(
    ("name", "options", "line", "type_", "message"),
    [
        ("gpt2", {}, [("user", "hi")], "no_chat_template", "needs the model's chat template"),
        ("qwen", {"chat_template": "off"}, [("user", "hi")], "no_chat_template", "none is applied"),
        ("llama2", {}, [("user", "a"), ("user", "b")], "template_error", "roles must alternate"),
        ("gemma", {}, [("system", "s"), ("user", "b")], "template_error", "System role not supported"),
        ("deepseek", {}, [("system", "s"), ("user", "b")], "system_unsupported", "drops the system message"),
        ("qwen", {}, (), "template_error", "empty conversation"),
        ("llama2", {}, [("narrator", "hi")], "template_error", "roles must alternate"),
        ("gpt2", {}, "", "empty_prompt", "no token"),
        ("qwen", {}, "half \ud83d of a pair", "invalid_text", "surrogate"),
        ("gpt2", {}, "half \ud83d of a pair", "invalid_text", "surrogate"),
        ("qwen", {"context_length": 10}, "hello world", "prompt_too_long", "context of 10 "),
    ],
)
def test_a_line_that_cannot_be_encoded_is_answered_with_the_reason(
    name: str, options: dict[str, object], line: str | Sequence[tuple[str, str]], type_: str, message: str
) -> None:
    found_type, found_message = rejected(encoder(name, **options).encode(prompt(line)))
    assert found_type == type_
    assert message in found_message
    if type_ in ("no_chat_template", "template_error", "system_unsupported"):
        assert rejected(encoder(name, **options).render(prompt(line))) == (found_type, found_message)


def test_the_jobs_system_text_needs_a_template_that_shows_it() -> None:
    assert rejected(encoder("deepseek").encode(prompt("hi", system="be brief")))[0] == "system_unsupported"
    assert encoded(encoder("deepseek").encode(prompt("hi")))


def test_a_chat_template_that_is_asked_for_must_be_there() -> None:
    with pytest.raises(SpecError, match=r"input\.chat_template: on, but this model has no chat template"):
        encoder("gpt2", chat_template="on")
    assert encoded(encoder("qwen", chat_template="on").encode(prompt()))


@pytest.mark.parametrize("mode", ["on", "off"])
def test_thinking_is_switched_by_the_chat_template_alone(mode: str) -> None:
    with pytest.raises(SpecError, match=r"thinking\.mode: .* needs the model's chat template"):
        encoder("qwen", chat_template="off", thinking_mode=mode)


@pytest.mark.parametrize(
    ("text", "is_open"),
    [
        ("2+2? <think>", True),
        ("2+2? <think>\nadd the", True),
        ("2+2? <think>add</think>4", False),
        ("<think>a</think>b<think>", True),
        ("<think> is a tag<|im_end|>\n<|im_start|>assistant\n", False),
        ("2+2?", False),
    ],
)
def test_reasoning_is_open_where_the_prompt_ends_inside_a_tag(text: str, is_open: bool) -> None:
    raw = encoder("qwen", chat_template="off", allow_control_tokens=True)
    assert encoded(raw.encode(prompt(text))).reasoning_open == is_open
    assert not encoded(encoder("qwen", chat_template="off").encode(prompt(text))).reasoning_open


CONVERSATION = [("system", "be brief"), ("user", CORPUS[0]), ("assistant", CORPUS[1]), ("user", CORPUS[2])]
LENGTH_CASES = [
    ("qwen", CORPUS[3]),
    ("qwen", CONVERSATION),
    ("llama3", CORPUS[2]),
    ("t5", CORPUS[0]),
    ("gpt2", CORPUS[0]),
]


@pytest.mark.parametrize("case", range(len(LENGTH_CASES)))
def test_the_context_length_is_kept_to_the_token(case: int) -> None:
    name, line = LENGTH_CASES[case]
    whole = encoded(encoder(name, 100_000).encode(prompt(line))).token_ids
    for context_length in (len(whole) - 9, len(whole) - 1, len(whole), len(whole) + 1, len(whole) + 7, len(whole) + 9):
        reply = encoder(name, context_length).encode(prompt(line, max_new_tokens=8))
        if len(whole) >= context_length:
            assert rejected(reply)[0] == "prompt_too_long"
            assert f"{len(whole)} tokens" in rejected(reply)[1]
        else:
            request = encoded(reply)
            assert request.token_ids == whole
            assert request.settings.max_new_tokens == min(8, context_length - len(whole))


@pytest.mark.parametrize("over_length", ["truncate-start", "truncate-end"])
@pytest.mark.parametrize("case", range(len(LENGTH_CASES)))
def test_a_prompt_is_cut_in_its_content_and_nowhere_else(case: int, over_length: OverLength) -> None:
    name, line = LENGTH_CASES[case]
    tokenizer = family(name)
    whole = encoded(encoder(name, 100_000).encode(prompt(line))).token_ids
    empty = "" if isinstance(line, str) else [(role, text if role == "system" else "") for role, text in line]
    frame = 0 if name == "gpt2" else len(encoded(encoder(name, 100_000).encode(prompt(empty))).token_ids)
    controls = [id_ for id_ in whole if id_ in tokenizer.added_tokens_decoder and id_ != tokenizer.unk_token_id]
    for context_length in (frame + 12, (frame + len(whole)) // 2, len(whole) - 8, len(whole)):
        request = encoded(encoder(name, context_length, over_length=over_length).encode(prompt(line, max_new_tokens=4)))
        assert context_length - 9 < len(request.token_ids) <= context_length - 4
        assert request.settings.max_new_tokens == 4
        left = [id_ for id_ in request.token_ids if id_ in tokenizer.added_tokens_decoder]
        assert [id_ for id_ in left if id_ != tokenizer.unk_token_id] == controls
        first, last = (line, line) if isinstance(line, str) else (line[1][1], line[-1][1])
        text = tokenizer.decode(request.token_ids)
        if name == "t5":
            text = text.replace(" ", "").replace("▁", " ")
        if over_length == "truncate-start":
            assert last[-5:] in text
            assert first[:12] not in text
        else:
            assert first[:5] in text
            assert last[-12:] not in text
        if not isinstance(line, str):
            assert "system\nbe brief<|im_end|>" in text


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["qwen", "llama3", "llama2", "gemma", "t5", "bert", "phi3"]),
    text=st.text(st.sampled_from("ab é日🙂\n<|im_end|>\u0301"), min_size=40, max_size=120),
    context_length=st.sampled_from([30, 45]),
    over_length=st.sampled_from(["truncate-start", "truncate-end"]),
)
def test_any_text_can_be_cut(name: str, text: str, context_length: int, over_length: OverLength) -> None:
    reply = encoder(name, context_length, over_length=over_length).encode(prompt(text, max_new_tokens=5))
    if isinstance(reply, Rejection):
        assert reply.error.type == "prompt_too_long"
        return
    assert len(reply.token_ids) + reply.settings.max_new_tokens <= context_length
    whole = encoded(encoder(name, 100_000).encode(prompt(text)))
    # Cut, it leaves the answer all it asked for; whole, it may leave less.
    assert reply.token_ids == whole.token_ids or reply.settings.max_new_tokens == 5


def test_text_that_is_cut_is_guarded_still() -> None:
    request = encoded(
        encoder("qwen", 60, over_length="truncate-start").encode(prompt("<|im_end|>" * 50, max_new_tokens=4))
    )
    end = family("qwen").convert_tokens_to_ids("<|im_end|>")
    assert request.token_ids.count(end) == 1
    assert len(request.token_ids) <= 56


def test_a_system_text_that_fills_the_context_is_refused_however_long_the_prompt() -> None:
    reply = encoder("qwen", 60, over_length="truncate-end").encode(prompt("hi " * 50, system="rule " * 60))
    assert "without any content it has" in rejected(reply)[1]


class TestBytesEncoder:
    def test_ids_are_bytes(self) -> None:
        request = encoded(BytesEncoder(context_length=4096).encode(prompt("naïve 🙂", system="be brief")))
        assert bytes(request.token_ids).decode() == "be brief\n\nnaïve 🙂"
        assert request.settings == Settings(seed=3)
        assert BytesEncoder.thinking is None

    def test_a_conversation_is_lines(self) -> None:
        line = prompt([("user", "hi"), ("assistant", "ho")], system="be brief")
        request = encoded(BytesEncoder(context_length=4096).encode(line))
        assert bytes(request.token_ids).decode() == "system: be brief\nuser: hi\nassistant: ho"
        assert BytesEncoder(context_length=4096).render(line) == bytes(request.token_ids).decode()

    def test_lines_without_an_answer(self) -> None:
        tight = BytesEncoder(context_length=5)
        assert rejected(tight.encode(prompt("hello")))[0] == "prompt_too_long"
        assert rejected(tight.encode(prompt("")))[0] == "empty_prompt"
        assert rejected(tight.encode(prompt("\udc80")))[0] == "invalid_text"
        assert encoded(tight.encode(prompt("hell"))).settings.max_new_tokens == 1

    @given(
        text=st.text(min_size=1, max_size=40),
        context_length=st.integers(2, 60),
        over_length=st.sampled_from(["truncate-start", "truncate-end"]),
    )
    def test_a_cut_leaves_whole_characters(self, text: str, context_length: int, over_length: OverLength) -> None:
        data = text.encode()
        line = replace(prompt(text), settings=Settings(max_new_tokens=3))
        reply = BytesEncoder(context_length=context_length, over_length=over_length).encode(line)
        if isinstance(reply, Rejection):
            assert context_length - min(3, context_length // 2) < 4  # no room for one character of four bytes
            return
        rest = bytes(reply.token_ids)
        rest.decode()
        assert data.endswith(rest) if over_length == "truncate-start" else data.startswith(rest)
        room = context_length - min(3, context_length // 2)
        assert len(rest) == len(data) < context_length or room - 4 < len(rest) <= room

    def test_it_needs_no_heavy_library(self) -> None:
        code = (
            "import sys; from pipeline.prompting.encoder import BytesEncoder; BytesEncoder(context_length=9);"
            "sys.exit(bool({'torch', 'transformers', 'tokenizers', 'jinja2'} & set(sys.modules)))"
        )
        root = Path(__file__).parent.parent
        assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_text_to_go_on_with_gets_no_template_whatever_the_job_says() -> None:
    text = replace(prompt("once upon a time"), is_text=True)
    alone = encoder("qwen", chat_template="off")
    assert encoded(encoder().encode(text)).token_ids == encoded(alone.encode(prompt("once upon a time"))).token_ids
    assert encoder().render(text) == "once upon a time"
    assert encoded(alone.encode(text)) == encoded(alone.encode(prompt("once upon a time")))
    kind, message = rejected(encoder(thinking_mode="on").encode(text))
    assert kind == "thinking_unsupported" and "needs the model's chat template" in message


@pytest.mark.parametrize("mode", ["on", "off"])
def test_a_line_switches_thinking_as_the_job_would(mode: str) -> None:
    line = replace(prompt("hi"), thinking=mode)
    assert encoder().encode(line) == encoder(thinking_mode=mode).encode(prompt("hi"))
    assert encoder().encode(line) != encoder().encode(prompt("hi")) or mode == "on"  # qwen reasons by itself
    other = "off" if mode == "on" else "on"
    assert encoder(thinking_mode=other).render(line) == encoder(thinking_mode=mode).render(prompt("hi"))


def test_a_line_cannot_switch_on_what_the_model_has_not() -> None:
    name = next(name for name in FAMILIES if family(name).chat_template and encoder(name).thinking is None)
    kind, message = rejected(encoder(name).encode(replace(prompt("hi"), thinking="on")))
    assert kind == "thinking_unsupported" and "no reasoning" in message
