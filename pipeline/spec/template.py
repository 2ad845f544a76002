"""A prompt template: text with `{field}` where a field of the input line goes.

Far less than `str.format`: no attributes, indexes, conversions or format specs, so that a template can read nothing but
the line, and text of the line that looks like a placeholder stays text. `{{` and `}}` are literal braces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.spec.jinja_template import JinjaTemplate
    from pipeline.spec.keys import InputSpec

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_NAME = re.compile(r"[^\s\[\]!:]([^\[\]!:]*[^\s\[\]!:])?")


class MissingFieldError(Exception):
    """The line lacks a field that the template names; a null counts as lacking."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class TemplateFailedError(Exception):
    """The template makes no prompt of this line; the text says why."""


class Template:
    """A template whose syntax `check_template` found right (ValueError otherwise), taken apart once."""

    def __init__(self, text: str) -> None:
        self.names: list[str] = []
        self._texts = [""]  # before, between and after the fields: always one more than there are names
        problems: list[str] = []
        end = 0
        for piece in _PIECE.finditer(text):
            self._texts[-1] += text[end : piece.start()]
            end = piece.end()
            name: str | None = piece[1]
            if name is not None and _NAME.fullmatch(name):
                self.names.append(name)
                self._texts.append("")
            elif piece[0] in ("{{", "}}"):
                self._texts[-1] += piece[0][0]
            else:
                problems.append(_place(text, piece.start()) + _explain(piece[0]))
        self._texts[-1] += text[end:]
        if not problems and not self.names:
            hint = "; write {text}, not {{text}}" if "{{" in text else ""
            problems.append(f"names no field of the line, so that every prompt would be the same{hint}")
        if problems:
            raise ValueError(*problems)

    def fill(self, fields: Mapping[str, Any]) -> str:
        """The prompt of one line: strings as they are, other values as JSON. Raises MissingFieldError."""
        pieces = [self._texts[0]]
        for name, text in zip(self.names, self._texts[1:], strict=True):
            value = fields.get(name)
            if value is None:
                raise MissingFieldError(name)
            pieces += (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), text)
        return "".join(pieces)


def check_template(text: str) -> list[str]:
    """Everything that is wrong with the syntax of a template, each with its place in it."""
    try:
        Template(text)
    except ValueError as error:
        return [str(problem) for problem in error.args]
    return []


def read_template(spec: InputSpec) -> Template | JinjaTemplate | None:
    """The job's template: one whose file's name ends with .jinja, .jinja2 or .j2 is written in Jinja.

    Raises ValueError with each problem of its syntax, NotFoundError if its file cannot be read.
    """
    from pipeline.spec.jinja_template import JinjaTemplate

    text = spec.template_text()
    if text is None:
        return None
    return JinjaTemplate(text) if spec.template_is_jinja else Template(text)


def _place(text: str, position: int) -> str:
    line = text.count("\n", 0, position) + 1
    return f"line {line}, column {position - text.rfind(chr(10), 0, position)} of the template: "


def _explain(piece: str) -> str:
    if piece in ("{", "}"):
        return f"a single {piece!r}; write {piece * 2!r} for a brace in the text"
    if not piece[1:-1].strip():
        return "{} names no field; write {text} for the field text"
    return f"{piece} is not the plain name of a field; write {{text}}, without blanks, indexes, '!' or ':'"
