"""The messages of a conversation, read strictly: what a model of text cannot be given is refused, not dropped."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import cast

from pipeline.records import Message
from pipeline.source.bad_line import BadLineError, show, wrong_type

ROLES = ("system", "user", "assistant")
# Parts of a message that carry meaning which a text prompt cannot.
_UNSUPPORTED_PARTS = ("tool_calls", "tool_call_id", "function_call", "audio", "images")
_NO_ALIASES: Mapping[str, str] = MappingProxyType({})


def read_messages(field: str, value: object, aliases: Mapping[str, str] = _NO_ALIASES) -> tuple[Message, ...]:
    """The list of messages under `field`; `aliases` are other names of roles. Raises BadLineError."""
    if not isinstance(value, list):
        raise wrong_type(field, "a list of messages", value)
    messages = cast("list[object]", value)
    if not messages:
        raise BadLineError("empty_messages", "the list of messages is empty", field=field)
    return tuple([_read_message(f"{field}.{position}", message, aliases) for position, message in enumerate(messages)])


def _read_message(field: str, value: object, aliases: Mapping[str, str]) -> Message:
    if not isinstance(value, dict):
        raise wrong_type(field, 'an object such as {"role": "user", "content": "..."}', value)
    message = cast("dict[str, object]", value)
    for part in _UNSUPPORTED_PARTS:
        if message.get(part) is not None:
            raise BadLineError("unsupported_content", "cannot be given to a model of text", field=f"{field}.{part}")
    role, content = message.get("role"), message.get("content")
    if role is None or content is None:
        absent = "role" if role is None else "content"
        raise BadLineError("missing_field", "every message needs one", field=f"{field}.{absent}")
    if not isinstance(role, str):
        raise wrong_type(f"{field}.role", f"one of {', '.join(ROLES)}", role)
    role = aliases.get(role, role)
    if role not in ROLES:
        reason = f"must be one of {', '.join(ROLES)}, not {show(role)}"
        raise BadLineError("unknown_role", reason, field=f"{field}.role")
    return Message(role, content if isinstance(content, str) else _join_parts(f"{field}.content", content))


def _join_parts(field: str, content: object) -> str:
    """Content that is a list of text parts, joined by line ends as vLLM and llama.cpp do."""
    if not isinstance(content, list):
        raise wrong_type(field, "a string or a list of text parts", content)
    parts = cast("list[object]", content)
    if not parts:
        raise BadLineError("missing_field", "the list of parts is empty", field=field)
    return "\n".join([_read_part(f"{field}.{position}", part) for position, part in enumerate(parts)])


def _read_part(field: str, value: object) -> str:
    if not isinstance(value, dict):
        raise wrong_type(field, 'an object such as {"type": "text", "text": "..."}', value)
    part = cast("dict[str, object]", value)
    if part.get("type") != "text":
        reason = "only parts of type text can be given to a model of text"
        raise BadLineError("unsupported_content", reason, field=f"{field}.type")
    text = part.get("text")
    if not isinstance(text, str):
        raise wrong_type(f"{field}.text", "a string", text)
    return text
