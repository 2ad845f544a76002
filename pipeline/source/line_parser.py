"""One line of the input to the Prompt it holds, or to the Rejection that says what is wrong with it.

Strict where a guess would spoil a night: a line that can be read in two ways is rejected, and so is whatever would have
to be dropped (pictures, tool calls). A field that is null counts as absent, as exports from tables write it. The system
prompt is the line's own, as `generation.system` or as a message but not both, else `input.system`.

Types of a rejection: line_too_long, invalid_utf8, invalid_json, not_an_object, missing_field, wrong_type, unknown_role,
empty_messages, unsupported_content, ambiguous_line, invalid_setting.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from pipeline.errors import Problem, SpecError
from pipeline.records import Item, ItemError, Message, Prompt, Rejection, Settings
from pipeline.source.inputs import InputFile
from pipeline.source.json_object import BadJsonError, kind_of, read_object
from pipeline.source.lines import RawLine, read_lines
from pipeline.spec.keys import JobSpec
from pipeline.spec.settings import apply_overrides, default_settings
from pipeline.spec.template import MissingFieldError, Template, check_template
from pipeline.spec.wording import nearest

GENERATION_FIELD = "generation"
ROLES = ("system", "user", "assistant")
# Parts of a message that carry meaning which a text prompt cannot.
_UNSUPPORTED_PARTS = ("tool_calls", "tool_call_id", "function_call", "audio", "images")


class _BadLineError(Exception):
    """Why a line is rejected; `type` becomes that of the ItemError."""

    def __init__(self, type_: str, message: str, *, field: str | None = None, column: int | None = None) -> None:
        where = field if column is None else f"column {column}"
        super().__init__(message if where is None else f"{where}: {message}")
        self.type = type_
        self.message = message
        self.field = field
        self.column = column


class LineParser:
    """Turns lines into prompts as one job asks for them."""

    def __init__(self, spec: JobSpec) -> None:
        """Raises SpecError where the template is wrong, NotFoundError where its file cannot be read."""
        self._input = spec.input
        self._settings = default_settings(spec)
        self._template: Template | None = None
        text = spec.input.template_text()
        if text is not None:
            if problems := check_template(text):
                raise SpecError([Problem(problem, field="input.template") for problem in problems])
            self._template = Template(text)

    def parse(self, raw: RawLine) -> Prompt | Rejection:
        """The prompt of a line; of a bad line, the reason, with as much of the line as could be read."""
        fields: dict[str, Any] | None = None
        try:
            fields = self._read_fields(raw)
            return self._read_prompt(raw, fields)
        except _BadLineError as bad:
            id_ = fields and fields.get(self._input.id_field)
            scalar = None if isinstance(id_, (dict, list)) else id_
            item = Item(raw.index, raw.file, raw.line, raw.offset, scalar, fields)
            return Rejection(item, ItemError(bad.type, str(bad)))

    def check(self, raw: RawLine) -> Problem | None:
        """What is wrong with a line and where, or None if it is good."""
        try:
            self._read_prompt(raw, self._read_fields(raw))
        except _BadLineError as bad:
            return Problem(bad.message, raw.file, raw.line, bad.column, bad.field)
        return None

    def _read_fields(self, raw: RawLine) -> dict[str, Any]:
        if raw.data is None:
            reason = f"the line is longer than the {self._input.max_line} bytes of input.max_line"
            raise _BadLineError("line_too_long", reason)
        try:
            return read_object(raw.data)
        except BadJsonError as error:
            raise _BadLineError(error.type, str(error), column=error.column) from None

    def _read_prompt(self, raw: RawLine, fields: dict[str, Any]) -> Prompt:
        id_ = fields.get(self._input.id_field)
        if isinstance(id_, (dict, list)):
            raise _wrong_type(self._input.id_field, "a string, a number, true, false or null", cast("object", id_))
        item = Item(raw.index, raw.file, raw.line, raw.offset, id_, fields)
        content = self._read_content(fields)
        settings, system = self._read_settings(fields.get(GENERATION_FIELD))
        if isinstance(content, tuple) and any(message.role == "system" for message in content):
            if system != self._input.system:
                reason = "the conversation has a system message of its own; keep one of the two"
                raise _BadLineError("ambiguous_line", reason, field=f"{GENERATION_FIELD}.system")
            system = None
        return Prompt(item, content, system, settings)

    def _read_settings(self, generation: object) -> tuple[Settings, str | None]:
        """Settings and system prompt of a line, from what it says under `generation`."""
        if generation is None:
            return self._settings, self._input.system
        if not isinstance(generation, dict):
            raise _wrong_type(GENERATION_FIELD, "an object of settings", generation)
        own = {key: value for key, value in cast("dict[str, Any]", generation).items() if value is not None}
        try:
            return apply_overrides(self._settings, self._input.system, own)
        except ValueError as error:
            raise _BadLineError("invalid_setting", str(error)) from None

    def _read_content(self, fields: Mapping[str, Any]) -> str | tuple[Message, ...]:
        if self._template is not None:
            try:
                return self._template.fill(fields)
            except MissingFieldError as error:
                raise _missing([error.name], fields, "the template names it") from None
        name = self._choose_field(fields)
        value: object = fields.get(name)
        if name == self._input.prompt_field and isinstance(value, str):
            return value
        if value is None:
            raise _missing([name], fields, f"input.format is {self._input.format}")
        if name == self._input.messages_field:
            return _read_messages(name, value)
        hint = f"; for a conversation, set input.messages_field: {name}" if isinstance(value, list) else ""
        raise _wrong_type(name, "a string", cast("object", value), hint)

    def _choose_field(self, fields: Mapping[str, Any]) -> str:
        """The field that holds the prompt or the messages of this line."""
        prompt, messages = self._input.prompt_field, self._input.messages_field
        if self._input.format != "auto":
            return messages if self._input.format == "messages" else prompt
        if fields.get(messages) is None:
            if fields.get(prompt) is None:
                raise _missing([prompt, messages], fields, "input.prompt_field and input.messages_field name them")
            return prompt
        if fields.get(prompt) is None or prompt == messages:
            return messages
        reason = f"the line has both {_show(prompt)} and {_show(messages)}; set input.format to prompt or to messages"
        raise _BadLineError("ambiguous_line", reason)


def validate_lines(spec: JobSpec, files: Sequence[InputFile]) -> Iterator[Problem]:
    """What is wrong with each bad line of the input, in order, as far as it shows without model and tokenizer."""
    parser = LineParser(spec)
    for raw in read_lines(files, max_line_bytes=spec.input.max_line):
        if problem := parser.check(raw):
            yield problem


def _read_messages(field: str, value: object) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise _wrong_type(field, "a list of messages", value)
    messages = cast("list[object]", value)
    if not messages:
        raise _BadLineError("empty_messages", "the list of messages is empty", field=field)
    return tuple([_read_message(f"{field}.{position}", message) for position, message in enumerate(messages)])


def _read_message(field: str, value: object) -> Message:
    if not isinstance(value, dict):
        raise _wrong_type(field, 'an object such as {"role": "user", "content": "..."}', value)
    message = cast("dict[str, object]", value)
    for part in _UNSUPPORTED_PARTS:
        if message.get(part) is not None:
            raise _BadLineError("unsupported_content", "cannot be given to a model of text", field=f"{field}.{part}")
    role, content = message.get("role"), message.get("content")
    if role is None or content is None:
        absent = "role" if role is None else "content"
        raise _BadLineError("missing_field", "every message needs one", field=f"{field}.{absent}")
    if not isinstance(role, str):
        raise _wrong_type(f"{field}.role", f"one of {', '.join(ROLES)}", role)
    if role not in ROLES:
        reason = f"must be one of {', '.join(ROLES)}, not {_show(role)}"
        raise _BadLineError("unknown_role", reason, field=f"{field}.role")
    return Message(role, content if isinstance(content, str) else _join_parts(f"{field}.content", content))


def _join_parts(field: str, content: object) -> str:
    """Content that is a list of text parts, joined by line ends as vLLM and llama.cpp do."""
    if not isinstance(content, list):
        raise _wrong_type(field, "a string or a list of text parts", content)
    parts = cast("list[object]", content)
    if not parts:
        raise _BadLineError("missing_field", "the list of parts is empty", field=field)
    return "\n".join([_read_part(f"{field}.{position}", part) for position, part in enumerate(parts)])


def _read_part(field: str, value: object) -> str:
    if not isinstance(value, dict):
        raise _wrong_type(field, 'an object such as {"type": "text", "text": "..."}', value)
    part = cast("dict[str, object]", value)
    if part.get("type") != "text":
        reason = "only parts of type text can be given to a model of text"
        raise _BadLineError("unsupported_content", reason, field=f"{field}.type")
    text = part.get("text")
    if not isinstance(text, str):
        raise _wrong_type(f"{field}.text", "a string", text)
    return text


def _missing(names: Sequence[str], fields: Mapping[str, Any], reason: str) -> _BadLineError:
    for name in names:
        if name in fields:
            return _BadLineError("missing_field", f"is null ({reason})", field=name)
    present = list(fields)[:20]
    near = next((near for name in names if (near := nearest(name, present))), None)
    others = "".join(f", nor {_show(name)}" for name in names[1:])
    has = (
        f"a similar one is {_show(near)}" if near else "it has " + (", ".join(map(_show, present)) or "no field at all")
    )
    return _BadLineError("missing_field", f"the line has no such field{others} ({reason}); {has}", field=names[0])


def _wrong_type(field: str, wanted: str, value: object, hint: str = "") -> _BadLineError:
    return _BadLineError("wrong_type", f"must be {wanted}, not {kind_of(value)}{hint}", field=field)


def _show(name: str) -> str:
    return json.dumps(name if len(name) <= 40 else name[:37] + "...", ensure_ascii=False)
