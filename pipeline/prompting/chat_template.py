"""Render conversations with a model's own chat template, and find out what the template can do."""

# pyright: basic
from __future__ import annotations

import os
import resource
import signal
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import psutil

from pipeline.errors import Problem, SpecError
from pipeline.prompting.tokenizer import ThinkingTags
from pipeline.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ThinkingMode = Literal["on", "off", "auto"]

# Variables by which templates switch reasoning: Qwen3, GLM-4.5, SmolLM3 | DeepSeek-V3.1, Granite.
_SWITCHES = ("enable_thinking", "thinking")
_TRIAL = (Message("user", "Hello"),)
_SYSTEM_TEXT = "Answer in verse."
_SYSTEM_TRIAL = (Message("system", _SYSTEM_TEXT), *_TRIAL)
_TRIAL_CPU_S = 1.0  # a trial of an honest template takes a hundredth
_TRIAL_MEMORY_BYTES = 1 << 30


class TemplateRefusal(Exception):  # noqa: N818 - it is the template's answer to a conversation, not a fault
    """The template cannot render this conversation; the text says why."""


class ChatTemplate:
    """The chat template of a tokenizer, rendered as transformers does, with a generation prompt at the end.

    Raises SpecError where the template is no valid Jinja, is one of several with none for chat, or does not come to an
    end on a trial conversation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        import jinja2

        self._tokenizer = tokenizer
        try:
            self._source = tokenizer.get_chat_template()
            if not _ends(self._try_out):
                message = "the model's chat template does not end: a trial took over 1 s or 1 GiB"
                raise _template_error(message)
            self._try_out()
        except jinja2.TemplateSyntaxError as error:
            message = f"the model's chat template is no valid template (its line {error.lineno}: {error.message})"
            raise _template_error(message) from error
        except ValueError as error:  # several templates, none of them named default
            raise _template_error(f"the model has no one chat template: {error}") from error

    def render(self, messages: Sequence[Message], options: Mapping[str, Any] | None = None) -> str:
        """The conversation as text, up to where the answer begins. Raises TemplateRefusal."""
        import jinja2

        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=True, **(options or {})
                )
            )
        except jinja2.TemplateSyntaxError:
            raise
        # What a template's own code can raise: raise_exception, and what its expressions do with unexpected turns.
        except (
            jinja2.TemplateError,
            AttributeError,
            TypeError,
            ValueError,
            LookupError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise TemplateRefusal(str(error)) from error

    @cached_property
    def shows_system(self) -> bool:
        """Whether the text of a system message reaches the model at all."""
        try:
            return _SYSTEM_TEXT in self.render(_SYSTEM_TRIAL)
        except TemplateRefusal:
            return True  # it says so itself, for each conversation

    def thinking_options(self, mode: ThinkingMode, tags: ThinkingTags | None) -> dict[str, bool]:
        """What to call the template with for `thinking.mode`. Raises SpecError where the model cannot do it."""
        if mode == "auto" or (mode == "off" and tags is None):
            return {}
        if tags is None:
            raise thinking_error("on, but this model has no reasoning: its vocabulary has no known reasoning tags")
        switch = self._thinking_switch
        options = {switch: mode == "on"} if switch else {}
        text = self._trial(options)
        is_open = text.rfind(tags.open_text) > text.rfind(tags.close_text)
        reasons = is_open or switch is not None or tags.close_text in self._source
        if mode == "on" and not reasons:
            raise thinking_error("on, but this model has no reasoning: its chat template knows of none")
        if mode == "off" and (is_open or (reasons and switch is None)):
            raise thinking_error("off, but this model's chat template cannot switch reasoning off")
        return options

    @cached_property
    def _thinking_switch(self) -> str | None:
        """The variable of the template that switches reasoning, found by trying."""
        for name in _SWITCHES:
            if name in self._source and self._trial({name: True}) != self._trial({name: False}):
                return name
        return None

    def _trial(self, options: Mapping[str, bool]) -> str:
        try:
            return self.render(_TRIAL, options)
        except TemplateRefusal as error:
            raise _template_error(f"the model's chat template refuses a plain user turn: {error}") from error

    def _try_out(self) -> None:
        """Every render that this class makes on its own account."""
        options = [{}, *({name: value} for name in _SWITCHES for value in (True, False))]
        for messages in (_TRIAL, _SYSTEM_TRIAL):
            for option in options:
                with suppress(TemplateRefusal):
                    self.render(messages, option)


def thinking_error(message: str) -> SpecError:
    return SpecError(Problem(message + "; set it to auto", field="thinking.mode"))


def _template_error(message: str) -> SpecError:
    return SpecError(Problem(message + "; set input.chat_template: off to do without", field="model.path"))


def _ends(work: Callable[[], object]) -> bool:
    """Whether `work` comes to an end, in whatever way, in a forked child with little time and memory.

    A template is a program from a stranger. Jinja's sandbox keeps it from files and Python, not from nested loops or
    `'a' * 10**10`, and neither can be interrupted in-process.
    """
    if not hasattr(os, "fork"):
        return True
    memory_bytes = psutil.Process().memory_info().vms + _TRIAL_MEMORY_BYTES
    _, allowed_bytes = resource.getrlimit(resource.RLIMIT_AS)
    if allowed_bytes != resource.RLIM_INFINITY:
        memory_bytes = min(memory_bytes, allowed_bytes)
    with warnings.catch_warnings():
        # Python 3.12 warns that other threads' locks stay taken in the child; it renders text and takes none of them.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    code = 0
    try:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, _TRIAL_CPU_S)  # CPU time: a busy machine condemns no template
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, allowed_bytes))
        work()
    except MemoryError:
        code = 1
    finally:  # any other exception is an end too, and the parent will meet it
        os._exit(code)
