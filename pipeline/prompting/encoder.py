"""Prompt to Request: the chat template, the thinking mode, the guard of control tokens, and the length check."""

# pyright: basic
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Literal

from pipeline.errors import Problem, SpecError
from pipeline.prompting.chat_template import ChatTemplate, TemplateRefusal, ThinkingMode, thinking_error
from pipeline.prompting.control_tokens import ControlTokens
from pipeline.prompting.length_limit import LengthLimit, OverLength, PromptRefused
from pipeline.prompting.tokenizer import ThinkingTags, decode_answer, find_thinking, load_tokenizer
from pipeline.records import Message, Prompt, Rejection, Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["BytesEncoder", "OverLength", "PromptEncoder", "ThinkingTags", "find_thinking", "load_tokenizer"]

# Roles that structure a conversation. Any other is a word of the user's, and guarded like his text.
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_NEUTRAL = "x"
_NEUTRAL_ROLE = "unknown"  # a template that knows its roles says so in its refusal
_SURROGATE = "the text holds half of a surrogate pair, which is no character"


class PromptEncoder:
    """Renders prompts as the model's template wants them and encodes them exactly as stock transformers does.

    With a chat template, a `prompt` line is one user turn after its system message, and the answer is always a new
    turn of the assistant. Without one a `prompt` line is raw text, its system text before it with a blank line
    between, and the tokenizer adds its own first token (BOS) where it has one.

    `context_length` counts prompt and answer tokens together. A prompt of that length or more is over length: refused,
    or its content cut (see `LengthLimit`). `.thinking` holds the model's reasoning tags, or None, and
    `.decode` gives the text of an answer's tokens.

    Raises SpecError for a thinking mode or chat template that this model cannot give.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        context_length: int,
        thinking_mode: ThinkingMode = "auto",
        chat_template: Literal["auto", "on", "off"] = "auto",
        over_length: OverLength = "error",
        allow_control_tokens: bool = False,
    ) -> None:
        self.thinking = find_thinking(tokenizer)
        self._template = _choose_template(tokenizer, chat_template)
        self._options: dict[str, bool] = {}
        if self._template is not None:
            self._options = self._template.thinking_options(thinking_mode, self.thinking)
        elif thinking_mode == "on" or (thinking_mode == "off" and self.thinking is not None):
            raise thinking_error(f"{thinking_mode} needs the model's chat template, and none is applied")
        self.takes_conversations = self._template is not None
        self.decode = partial(decode_answer, tokenizer)
        self._tokenizer = tokenizer.backend_tokenizer
        self._tokenizer.no_truncation()  # a tokenizer file can have either baked in
        self._tokenizer.no_padding()
        self._control = ControlTokens(self._tokenizer)
        self._guarded = not allow_control_tokens
        self._limit = LengthLimit(context_length, over_length)
        self._frame = lru_cache(maxsize=1024)(self._encode_frame)
        self._mode = thinking_mode

        def variant(chat_template: Literal["auto", "off"], mode: ThinkingMode) -> PromptEncoder:
            return PromptEncoder(
                tokenizer,
                context_length=context_length,
                thinking_mode=mode,
                chat_template=chat_template,
                over_length=over_length,
                allow_control_tokens=allow_control_tokens,
            )

        self._variant = lru_cache(maxsize=None)(variant)

    def encode(self, prompt: Prompt) -> Request | Rejection:
        """The first sample's request; a Rejection says why this prompt cannot be answered."""
        try:
            if (encoder := self._encoder_for(prompt)) is not self:
                return encoder.encode(replace(prompt, is_text=False, thinking=None))
            ids, settings = self._limit.fit(self._messages(prompt), prompt.settings, self._encode, self._cut)
        except PromptRefused as refused:
            return Rejection(prompt.item, refused.error)
        return Request(prompt.item, 0, tuple(ids), settings, reasoning_open=self._is_reasoning_open(ids))

    def render(self, prompt: Prompt) -> str | Rejection:
        """The text that is encoded, before any cut to length; what the tokenizer adds (BOS) is not shown."""
        try:
            if (encoder := self._encoder_for(prompt)) is not self:
                return encoder.render(replace(prompt, is_text=False, thinking=None))
            return self._render(self._messages(prompt))
        except PromptRefused as refused:
            return Rejection(prompt.item, refused.error)

    def _encoder_for(self, prompt: Prompt) -> PromptEncoder:
        """One that does what this line asks of template and thinking, if that is not what the job asks."""
        is_text = prompt.is_text and self._template is not None
        mode = prompt.thinking or self._mode
        if not is_text and mode == self._mode:
            return self
        try:
            return self._variant("off" if is_text or self._template is None else "auto", mode)
        except SpecError as error:
            reasons = "; ".join(problem.message.partition("; set it")[0] for problem in error.problems)
            raise PromptRefused("thinking_unsupported", f"thinking cannot be {reasons}") from error

    def _messages(self, prompt: Prompt) -> tuple[Message, ...]:
        messages = _as_messages(prompt)
        if self._template is None and not isinstance(prompt.content, str):
            raise PromptRefused(
                "no_chat_template", "a conversation needs the model's chat template, and none is applied"
            )
        if (
            self._template is not None
            and not self._template.shows_system
            and any(message.role == "system" for message in messages)
        ):
            raise PromptRefused("system_unsupported", "the model's chat template drops the system message")
        return messages

    def _render(self, messages: Sequence[Message]) -> str:
        if self._template is None:
            return _as_text(messages, is_conversation=False)
        try:
            return self._template.render(messages, self._options)
        except TemplateRefusal as refusal:
            reason = f"the model's chat template refuses this conversation: {refusal}"
            raise PromptRefused("template_error", reason) from refusal

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        text = self._render(messages)
        ids = self._encode_text(text)
        if not self._guarded:
            return ids
        frame = self._frame(tuple(map(_neutral, messages)))
        if self._control.among(ids) == frame:
            return ids
        return self._encode_forged(messages, text, ids, frame)

    def _encode_text(self, text: str) -> list[int]:
        # A rendered template holds its own BOS; raw text gets the tokenizer's.
        try:
            return self._tokenizer.encode(text, add_special_tokens=self._template is None).ids
        except TypeError:
            raise PromptRefused("invalid_text", _SURROGATE) from None

    def _encode_frame(self, messages: tuple[Message, ...]) -> tuple[int, ...]:
        """Control tokens of a conversation of this shape about nothing."""
        return self._control.among(self._encode_text(self._render(messages)))

    def _encode_forged(
        self, messages: Sequence[Message], text: str, ids: list[int], frame: tuple[int, ...]
    ) -> list[int]:
        """Encode with the contents as plain text.

        Refused where the contents cannot be told from the frame with certainty, which happens when the template
        takes control tokens in them apart, or itself writes others because of what the contents say.
        """
        control = self._control
        try:
            marked = self._render([_marked(message, control) for message in messages])
            plain = control.encode_marked(marked, add_special_tokens=self._template is None)
        except ValueError as error:
            raise _forgery(control.first_difference(ids, frame), str(error)) from error
        # Equal ids: no content spells anything, and the template itself depends on what the contents say.
        is_safe = plain == ids or control.structure(plain) == control.structure(frame)
        if control.unmark(marked) != text or not is_safe:
            raise _forgery(control.first_difference(ids, frame), "and cannot be kept apart from the template's own")
        return plain

    def _is_reasoning_open(self, ids: Sequence[int]) -> bool:
        if self.thinking is not None:
            for id_ in reversed(ids):
                if id_ == self.thinking.open_id:
                    return True
                if id_ == self.thinking.close_id or id_ in self._control.texts:
                    return False
        return False

    def _cut(self, content: str, num_tokens: int, at_start: bool) -> tuple[str, int]:
        encoding = self._tokenizer.encode(content, add_special_tokens=False)
        if self._guarded and self._control.among(encoding.ids):
            encoding = self._control.encode_plain(content)
        spans = encoding.offsets
        if num_tokens >= len(spans):
            return "", len(spans)
        # Several tokens can share one character; it goes with the first of them that is cut.
        if at_start:
            return content[max(1, spans[num_tokens - 1][1]) :], num_tokens
        return content[: min(len(content) - 1, spans[-num_tokens][0])], num_tokens


class BytesEncoder:
    """For engines without a tokenizer: the token ids are the UTF-8 bytes of the text.

    A conversation is written as lines of `role: content`; a `prompt` line as the raw text it is.
    """

    thinking: ThinkingTags | None = None
    takes_conversations = True

    def __init__(self, *, context_length: int, over_length: OverLength = "error") -> None:
        self._limit = LengthLimit(context_length, over_length)

    def encode(self, prompt: Prompt) -> Request | Rejection:
        """The first sample's request; a Rejection says why this prompt cannot be answered."""
        template = isinstance(prompt.content, tuple)
        try:
            ids, settings = self._limit.fit(
                _as_messages(prompt), prompt.settings, lambda messages: _utf8(_as_text(messages, template)), _cut_utf8
            )
        except PromptRefused as refused:
            return Rejection(prompt.item, refused.error)
        return Request(prompt.item, 0, tuple(ids), settings)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of these bytes."""
        return bytes(token_ids).decode(errors="replace")

    def render(self, prompt: Prompt) -> str | Rejection:
        """The text that is encoded, before any cut to length."""
        return _as_text(_as_messages(prompt), isinstance(prompt.content, tuple))


def _choose_template(tokenizer: PreTrainedTokenizerFast, chat_template: str) -> ChatTemplate | None:
    if chat_template == "off":
        return None
    if not tokenizer.chat_template:
        if chat_template == "on":
            message = (
                "on, but this model has no chat template; set it to auto or off, and the prompts go in as they are"
            )
            raise SpecError(Problem(message, field="input.chat_template"))
        return None
    return ChatTemplate(tokenizer)


def _as_messages(prompt: Prompt) -> tuple[Message, ...]:
    """The conversation of a prompt; one that begins with its own system message keeps that and not the job's."""
    messages = (Message("user", prompt.content),) if isinstance(prompt.content, str) else prompt.content
    if prompt.system is None or (messages and messages[0].role == "system"):
        return messages
    return (Message("system", prompt.system), *messages)


def _neutral(message: Message) -> Message:
    """The same turn about nothing; blank stays blank, since templates leave empty turns out."""
    role = message.role if message.role in _ROLES else _NEUTRAL_ROLE
    return Message(role, _NEUTRAL if message.content.strip() else message.content)


def _marked(message: Message, control: ControlTokens) -> Message:
    role = message.role if message.role in _ROLES else control.mark(message.role)
    return Message(role, control.mark(message.content))


def _forgery(token: str, reason: str) -> PromptRefused:
    return PromptRefused(
        "control_token",
        f"the text spells the control token {token!r}, {reason}; "
        "input.allow_control_tokens: true lets texts write control tokens",
    )


def _as_text(messages: Sequence[Message], is_conversation: bool) -> str:
    if is_conversation:
        return "\n".join(f"{message.role}: {message.content}" for message in messages)
    return "\n\n".join(message.content for message in messages)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise PromptRefused("invalid_text", _SURROGATE) from None


def _cut_utf8(content: str, num_tokens: int, at_start: bool) -> tuple[str, int]:
    data = content.encode()
    # A character that is cut in two goes as a whole.
    rest = (data[num_tokens:] if at_start else data[: max(0, len(data) - num_tokens)]).decode(errors="ignore")
    return rest, len(data) - len(rest.encode())
