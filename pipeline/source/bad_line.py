"""Why a line is rejected, in words for whoever has to mend it: what was wanted, what is there, never what it says.

Types of a rejection: line_too_long, invalid_utf8, invalid_json, not_an_object, missing_field, wrong_type, unknown_role,
empty_messages, unsupported_content, unsupported_field, ambiguous_line, invalid_setting;

and template_error, where the job has a template in Jinja.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.source.json_object import kind_of
from pipeline.spec.wording import nearest


class BadLineError(Exception):
    """`type` becomes that of the ItemError; `field` is dotted, `column` from 1."""

    def __init__(self, type_: str, message: str, *, field: str | None = None, column: int | None = None) -> None:
        where = field if column is None else f"column {column}"
        super().__init__(message if where is None else f"{where}: {message}")
        self.type = type_
        self.message = message
        self.field = field
        self.column = column


def missing(names: Sequence[str], fields: Mapping[str, Any], reason: str) -> BadLineError:
    """None of `names` is among the fields; `reason` says who asks for it."""
    for name in names:
        if name in fields:
            return BadLineError("missing_field", f"is null ({reason})", field=name)
    present = list(fields)[:20]
    near = next((near for name in names if (near := nearest(name, present))), None)
    others = "".join(f", nor {show(name)}" for name in names[1:])
    has = f"a similar one is {show(near)}" if near else "it has " + (", ".join(map(show, present)) or "no field at all")
    return BadLineError("missing_field", f"the line has no such field{others} ({reason}); {has}", field=names[0])


def wrong_type(field: str, wanted: str, value: object, hint: str = "") -> BadLineError:
    return BadLineError("wrong_type", f"must be {wanted}, not {kind_of(value)}{hint}", field=field)


def show(name: str) -> str:
    """A name from the line, in quotes and not too long."""
    return json.dumps(name if len(name) <= 40 else name[:37] + "...", ensure_ascii=False)
