"""One line of the input to the Prompt it holds, or to the Rejection that says what is wrong with it.

Strict where a guess would spoil a night: a line that can be read in two ways is rejected, and so is whatever would have
to be dropped (pictures, tool calls). A field that is null counts as absent, as exports from tables write it. The system
prompt is the line's own, as `generation.system` or as a message but not both, else `input.system`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from pipeline.errors import Problem, SpecError
from pipeline.records import Item, ItemError, Message, Prompt, Rejection, Settings
from pipeline.source import openai_batch
from pipeline.source.bad_line import BadLineError, missing, show, wrong_type
from pipeline.source.inputs import InputFile
from pipeline.source.json_object import BadJsonError, read_object
from pipeline.source.lines import RawLine, read_lines
from pipeline.source.messages import read_messages
from pipeline.spec.keys import JobSpec, LineGeneration
from pipeline.spec.settings import apply_overrides, default_settings
from pipeline.spec.template import MissingFieldError, TemplateFailedError, read_template

GENERATION_FIELD = "generation"
_SETTINGS = frozenset(LineGeneration.model_fields)


class LineParser:
    """Turns lines into prompts as one job asks for them, and tells `say` once of what looks like a mistake in them."""

    def __init__(self, spec: JobSpec, say: Callable[[str], object] = str) -> None:
        """Raises SpecError where the template is wrong, NotFoundError where its file cannot be read."""
        self._say = say
        self._told = {spec.input.prompt_field, spec.input.messages_field, spec.input.id_field}
        self._input = spec.input
        self._settings = default_settings(spec)
        self._num_samples = spec.generation.num_samples
        try:
            self._template = read_template(spec.input)
        except ValueError as error:
            raise SpecError([Problem(str(problem), field="input.template") for problem in error.args]) from None

    def parse(self, raw: RawLine) -> Prompt | Rejection:
        """The prompt of a line; of a bad line, the reason, with as much of the line as could be read."""
        fields: dict[str, Any] | None = None
        try:
            fields = self._read_fields(raw)
            return self._read_prompt(raw, fields)
        except BadLineError as bad:
            id_ = fields and fields.get(self._id_field(fields))
            scalar = None if isinstance(id_, (dict, list)) else id_
            item = Item(raw.index, raw.file, raw.line, raw.offset, scalar, fields)
            return Rejection(item, ItemError(bad.type, str(bad)))

    def check(self, raw: RawLine) -> Problem | None:
        """What is wrong with a line and where, or None if it is good."""
        try:
            self._read_prompt(raw, self._read_fields(raw))
        except BadLineError as bad:
            return Problem(bad.message, raw.file, raw.line, bad.column, bad.field)
        return None

    def _read_fields(self, raw: RawLine) -> dict[str, Any]:
        if raw.data is None:
            reason = f"the line is longer than the {self._input.max_line} bytes of input.max_line"
            raise BadLineError("line_too_long", reason)
        try:
            return read_object(raw.data)
        except BadJsonError as error:
            raise BadLineError(error.type, str(error), column=error.column) from None

    def _id_field(self, fields: Mapping[str, Any]) -> str:
        return openai_batch.ID_FIELD if self._is_request(fields) else self._input.id_field

    def _is_request(self, fields: Mapping[str, Any]) -> bool:
        """Whether the line is one of an OpenAI batch file. A line with a prompt or messages of its own is none."""
        if self._input.format != "auto" or self._template is not None:
            return self._input.format == "openai-batch"
        own = (self._input.prompt_field, self._input.messages_field)
        return openai_batch.looks_like_request(fields) and all(fields.get(name) is None for name in own)

    def _read_prompt(self, raw: RawLine, fields: dict[str, Any]) -> Prompt:
        if self._is_request(fields):
            return self._read_request(raw, fields)
        id_ = fields.get(self._input.id_field)
        if isinstance(id_, (dict, list)):
            raise wrong_type(self._input.id_field, "a string, a number, true, false or null", cast("object", id_))
        item = Item(raw.index, raw.file, raw.line, raw.offset, id_, fields)
        content = self._read_content(fields)
        if self._template is None and not _SETTINGS.isdisjoint(fields):
            self._tell_misplaced(raw, fields)
        settings, system = self._read_settings(fields.get(GENERATION_FIELD))
        if isinstance(content, tuple) and any(message.role == "system" for message in content):
            if system != self._input.system:
                reason = "the conversation has a system message of its own; keep one of the two"
                raise BadLineError("ambiguous_line", reason, field=f"{GENERATION_FIELD}.system")
            system = None
        return Prompt(item, content, system, settings)

    def _tell_misplaced(self, raw: RawLine, fields: Mapping[str, Any]) -> None:
        """Of settings that stand beside the prompt: other data may have such names, and so they are no error."""
        for name in sorted(_SETTINGS.intersection(fields) - self._told):
            self._told.add(name)
            self._say(
                f"{raw.file}, line {raw.line}: {show(name)} beside the prompt changes no answer; settings of a line "
                f"stand under {show(GENERATION_FIELD)}"
            )

    def _read_request(self, raw: RawLine, fields: dict[str, Any]) -> Prompt:
        request = openai_batch.read_request(fields, num_samples=self._num_samples)
        settings, system = self._apply(request.settings, request.written)
        content = request.content
        if isinstance(content, tuple) and any(message.role == "system" for message in content):
            system = None
        item = Item(raw.index, raw.file, raw.line, raw.offset, fields[openai_batch.ID_FIELD], fields)
        return Prompt(item, content, system, settings, is_text=request.is_text, thinking=request.thinking)

    def _read_settings(self, generation: object) -> tuple[Settings, str | None]:
        """Settings and system prompt of a line, from what it says under `generation`."""
        if generation is None:
            return self._settings, self._input.system
        if not isinstance(generation, dict):
            raise wrong_type(GENERATION_FIELD, "an object of settings", generation)
        own = cast("dict[str, Any]", generation).items()
        return self._apply({key: value for key, value in own if value is not None}, {})

    def _apply(self, own: Mapping[str, Any], written: Mapping[str, str]) -> tuple[Settings, str | None]:
        try:
            return apply_overrides(self._settings, self._input.system, own, written)
        except ValueError as error:
            raise BadLineError("invalid_setting", str(error)) from None

    def _read_content(self, fields: Mapping[str, Any]) -> str | tuple[Message, ...]:
        if self._template is not None:
            try:
                return self._template.fill(fields)
            except MissingFieldError as error:
                raise missing([error.name], fields, "the template names it") from None
            except TemplateFailedError as error:
                raise BadLineError("template_error", f"the template {error}") from None
        name = self._choose_field(fields)
        value: object = fields.get(name)
        if name == self._input.prompt_field and isinstance(value, str):
            return value
        if value is None:
            raise missing([name], fields, f"input.format is {self._input.format}")
        if name == self._input.messages_field:
            return read_messages(name, value)
        hint = f"; for a conversation, set input.messages_field: {name}" if isinstance(value, list) else ""
        raise wrong_type(name, "a string", cast("object", value), hint)

    def _choose_field(self, fields: Mapping[str, Any]) -> str:
        """The field that holds the prompt or the messages of this line."""
        prompt, messages = self._input.prompt_field, self._input.messages_field
        if self._input.format != "auto":
            return messages if self._input.format == "messages" else prompt
        if fields.get(messages) is None:
            if fields.get(prompt) is None:
                raise missing([prompt, messages], fields, "input.prompt_field and input.messages_field name them")
            return prompt
        if fields.get(prompt) is None or prompt == messages:
            return messages
        reason = f"the line has both {show(prompt)} and {show(messages)}; set input.format to prompt or to messages"
        raise BadLineError("ambiguous_line", reason)


def validate_lines(spec: JobSpec, files: Sequence[InputFile], say: Callable[[str], object] = str) -> Iterator[Problem]:
    """What is wrong with each bad line of the input, in order, as far as it shows without model and tokenizer.

    `say` is told of what looks like a mistake in good ones.
    """
    parser = LineParser(spec, say)
    for raw in read_lines(files, max_line_bytes=spec.input.max_line):
        if problem := parser.check(raw):
            yield problem
