"""The model's own template decides about reasoning and system messages, and cannot hang or flood the run."""

from __future__ import annotations

import copy
import os
import time
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.errors import SpecError
from pipeline.prompting.chat_template import ChatTemplate, TemplateRefusal, ThinkingMode
from pipeline.prompting.encoder import PromptEncoder
from pipeline.prompting.tokenizer import find_thinking
from pipeline.records import Item, Message, Prompt, Request, Settings
from tests.tokenizer_families import FAMILIES, QWEN3, family

USER = (Message("user", "hello"),)
PROMPT = Prompt(Item(index=0, file="in.jsonl", line=1, offset=0), "hello", None, Settings())


def with_template(template: object, name: str = "qwen") -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(family(name))
    tokenizer.chat_template = template  # type: ignore[assignment]
    return tokenizer


def prompt_text(tokenizer: PreTrainedTokenizerFast, mode: ThinkingMode) -> str:
    template = ChatTemplate(tokenizer)
    return template.render(USER, template.thinking_options(mode, find_thinking(tokenizer)))


@pytest.mark.parametrize("name", [name for name in FAMILIES if family(name).chat_template])
def test_auto_is_what_transformers_renders(name: str) -> None:
    expected = family(name).apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt_text(family(name), "auto") == expected


QUIET = "<think>\n\n</think>\n\n"
# As DeepSeek-V3.1 does: another variable, off unless asked for, one tag at the end either way.
DEEPSEEK_V31 = "{{ messages[0].content }}{{ '<think>' if thinking is defined and thinking else '</think>' }}"


@pytest.mark.parametrize(
    ("template", "mode", "end", "is_open"),
    [
        (QWEN3, "auto", "assistant\n", False),
        (QWEN3, "on", "assistant\n", False),
        (QWEN3, "off", "assistant\n" + QUIET, False),
        (DEEPSEEK_V31, "auto", "hello</think>", False),
        (DEEPSEEK_V31, "on", "hello<think>", True),
        (DEEPSEEK_V31, "off", "hello</think>", False),
        (family("qwen_thinking").chat_template, "auto", "<think>\n", True),
        (family("qwen_thinking").chat_template, "on", "<think>\n", True),
        # The model opens its reasoning itself; the template only takes it out of earlier turns.
        ("{{ messages[0].content.split('</think>')[-1] }}", "on", "hello", False),
    ],
)
def test_the_thinking_mode_goes_through_the_templates_own_switch(
    template: str, mode: ThinkingMode, end: str, is_open: bool
) -> None:
    tokenizer = with_template(template)
    assert prompt_text(tokenizer, mode).endswith(end)
    request = PromptEncoder(tokenizer, context_length=1000, thinking_mode=mode).encode(PROMPT)
    assert isinstance(request, Request)
    assert request.reasoning_open == is_open
    assert tokenizer.decode(request.token_ids).endswith(end)


PLAIN = "{{ '<|im_start|>' + messages[0].content }}"


@pytest.mark.parametrize(
    ("name", "template", "mode", "message"),
    [
        ("smollm2", None, "on", "no reasoning: its vocabulary"),
        ("qwen", PLAIN, "on", "no reasoning: its chat template"),
        ("qwen_thinking", None, "off", "cannot switch reasoning off"),
        ("deepseek", None, "off", "cannot switch reasoning off"),
        ("qwen", "{{ messages[0].content.split('</think>')[-1] }}", "off", "cannot switch reasoning off"),
        ("qwen", PLAIN + "{{ '<think>' if enable_thinking else '<think>\\n' }}", "off", "cannot switch reasoning off"),
    ],
)
def test_a_mode_that_the_model_does_not_have(name: str, template: str | None, mode: ThinkingMode, message: str) -> None:
    tokenizer = with_template(template or family(name).chat_template, name)
    with pytest.raises(SpecError, match=message) as caught:
        PromptEncoder(tokenizer, context_length=1000, thinking_mode=mode)
    assert [problem.field for problem in caught.value.problems] == ["thinking.mode"]


@pytest.mark.parametrize(("name", "template"), [("smollm2", None), ("gpt2", None), ("qwen", PLAIN)])
def test_off_is_fine_for_a_model_without_reasoning(name: str, template: str | None) -> None:
    tokenizer = with_template(template or family(name).chat_template, name)
    assert isinstance(PromptEncoder(tokenizer, context_length=1000, thinking_mode="off").encode(PROMPT), Request)


def test_a_template_that_refuses_a_plain_turn_cannot_be_asked_for_thinking() -> None:
    template = ChatTemplate(with_template("{{ raise_exception('two turns or none') }}"))
    with pytest.raises(SpecError, match="refuses a plain user turn: two turns or none"):
        template.thinking_options("on", find_thinking(family("qwen")))


@pytest.mark.parametrize(("name", "shown"), [("qwen", True), ("llama2", True), ("deepseek", False), ("gemma", True)])
def test_whether_a_system_message_is_shown(name: str, shown: bool) -> None:
    assert ChatTemplate(family(name)).shows_system == shown  # gemma's says itself that it takes none


@pytest.mark.parametrize(
    "expression",
    [
        "raise_exception('roles must alternate')",
        "messages[0].content + 1",
        "messages[7].content",
        "messages[0].missing.deeper",
        "'%d' % messages[0].content",
        "1 // 0",
        "messages[0].content.encode('no such codec')",
        "messages[0].__class__.__mro__",
        "range(1000000000)",
    ],
)
def test_whatever_a_template_raises_is_a_refusal(expression: str) -> None:
    with pytest.raises(TemplateRefusal):
        ChatTemplate(with_template("{{ " + expression + " }}")).render(USER)


def test_a_template_that_is_none() -> None:
    with pytest.raises(SpecError, match=r"model\.path: .*no valid template \(its line 2:"):
        ChatTemplate(with_template("{{ messages }}\n{% if %}"))


def test_several_templates_and_none_for_chat() -> None:
    with pytest.raises(SpecError, match=r"no one chat template: .*'rag', 'tool_use'"):
        ChatTemplate(with_template({"rag": PLAIN, "tool_use": PLAIN}))
    assert ChatTemplate(with_template({"default": PLAIN, "rag": "{{ x }}"})).render(USER) == "<|im_start|>hello"


NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
BOMBS = {
    "loops": NESTED + "{% endfor %}",
    "loops for a system message": "{% if messages[0].role == 'system' %}" + NESTED + "{% endfor %}{% endif %}",
    "loops when asked to think": "{% if enable_thinking %}" + NESTED + "{% endfor %}{% endif %}",
    "memory": "{% if thinking and messages[0].role == 'system' %}"
    "{{ ('a' * (messages | length) * 650000000) | length }}{% endif %}",
    "memory that is folded when compiled": "{{ 'a' * 10 ** 10 }}",
    "a power": "{{ 7 ** (10 ** 9) % 10 }}",
    "a power of its input": "{{ (messages | length + 6) ** (10 ** 9) % 10 }}",
    "doubling": "{% set ns = namespace(t='aaaaaaaaaa') %}"
    "{% for i in range(60) %}{% set ns.t = ns.t + ns.t %}{% endfor %}{{ ns.t | length }}",
    "calls": "{% macro m(n) %}{% for i in range(9) %}{{ m(n + 1) if n < 30 }}{% endfor %}{% endmacro %}{{ m(0) }}",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_template_bomb_is_refused_soon(bomb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if bomb != "loops":  # one waits as long as a user would, and one must end by its memory
        monkeypatch.setattr("pipeline.prompting.chat_template._TRIAL_CPU_S", 4.5 if bomb == "memory" else 0.2)
    tokenizer = with_template(BOMBS[bomb])
    before = os.times()
    began = time.monotonic()
    with pytest.raises(SpecError, match="does not end"):
        ChatTemplate(tokenizer)
    after = os.times()
    cpu_s = sum(after[:4]) - sum(before[:4])
    assert cpu_s < 5
    assert time.monotonic() - began < 30  # on a busy machine


def test_a_trial_leaves_nothing_behind() -> None:
    before = children()  # other tests may have some that stay, such as a fork server
    template = ChatTemplate(family("qwen"))
    assert template.render(USER)
    assert children() == before


def children() -> set[str]:
    return {child for task in Path("/proc/self/task").iterdir() for child in (task / "children").read_text().split()}
