"""The bytes of one line to the JSON object they hold: strictly, and with a plain reason where they hold none.

The parser is pydantic's: on short lines about three times as fast as `json`, and strict by itself about UTF-8, lone
surrogates, NaN, numbers of thousands of digits and nesting (200 levels), without recursion of the interpreter. Of a key
that comes twice in an object the last value counts, as in `json` and in `jq`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import isinf
from typing import Any, cast

from pydantic_core import from_json

_PARSER_MESSAGE = re.compile(r"(.*) at line \d+ column (\d+)")
# What the parser's words, known by their beginning, mean to somebody with a file to mend.
_HINTS = {
    "EOF": "each line must hold a whole object",
    "key must be": 'JSON quotes with "',
    "recursion limit": "it is nested more than 200 levels deep",
    "number out of range": "it has thousands of digits",
    "unexpected end of hex escape": "half of a surrogate pair stands alone",
    "lone ": "half of a surrogate pair stands alone",
}


class BadJsonError(Exception):
    """Bytes that are no JSON object. `type`: invalid_utf8, invalid_json or not_an_object; `column` from 1."""

    def __init__(self, type_: str, message: str, column: int | None = None) -> None:
        super().__init__(message)
        self.type = type_
        self.column = column


def read_object(data: bytes) -> dict[str, Any]:
    """The object in `data`; whatever it holds can be written again as strict UTF-8 JSON. Raises BadJsonError."""
    try:
        value = from_json(data, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise _explain(data, error) from None
    if type(value) is not dict:
        message = f'a line must be a JSON object such as {{"prompt": "..."}}, not {kind_of(value)}'
        raise BadJsonError("not_an_object", message)
    fields = cast("dict[str, Any]", value)
    if _has_infinity(fields.values()):
        raise BadJsonError("invalid_json", "a number is too large for a 64-bit float")
    return fields


def kind_of(value: object) -> str:
    """What a JSON value is, not what it says: prompts stay out of messages."""
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case str():
            return "a string"
        case int() | float():
            return "a number"
        case list():
            return "an array"
        case _:
            return "an object"


def _has_infinity(values: Iterable[object]) -> bool:
    """Whether a number such as 1e999 was read as infinite, which no JSON can repeat."""
    for value in values:
        if isinstance(value, str):
            continue
        if isinstance(value, float):
            if isinf(value):
                return True
        elif isinstance(value, list):
            if _has_infinity(cast("list[object]", value)):
                return True
        elif isinstance(value, dict) and _has_infinity(cast("dict[str, object]", value).values()):
            return True
    return False


def _explain(data: bytes, error: ValueError) -> BadJsonError:
    try:
        data.decode()
    except UnicodeDecodeError as damage:
        hint = "; it looks like UTF-16" if b"\0" in data else ""
        message = f"byte {damage.start + 1} of the line is not UTF-8; save the file as UTF-8{hint}"
        return BadJsonError("invalid_utf8", message)
    if b"\0" in data:
        message = f"{data.count(0)} of {len(data)} bytes are NUL, as after a crash or in UTF-16 text"
        return BadJsonError("invalid_json", message)
    match = _PARSER_MESSAGE.fullmatch(str(error))
    reason, byte = (match[1], int(match[2])) if match else (str(error), 1)
    # The parser counts bytes; an editor shows characters.
    column = len(data[: max(byte - 1, 0)].decode(errors="ignore")) + 1
    hint = next((f"; {hint}" for start, hint in _HINTS.items() if reason.startswith(start)), "")
    if data.startswith(b"\xef\xbb\xbf"):
        hint = "; a byte order mark may only begin the file"
    return BadJsonError("invalid_json", f"not JSON: {reason}{hint}", column)
