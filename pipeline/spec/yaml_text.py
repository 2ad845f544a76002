"""YAML text to plain values that know their line and column; refuses what a job file has no use for.

Values follow the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema): `on`, `off`, `yes` and `no`
are text, `1e-3` is a number, `010` is ten and `3:00` is text. Parsing is by events, so that depth is known before it
costs anything: the library's own composer takes half a minute for a megabyte of brackets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import yaml

from pipeline.errors import Problem, SpecError

MAX_FILE_BYTES = 2**20
MAX_DEPTH = 16
MAX_NODES = 10_000

# `CSafeLoader` is missing where PyYAML was built without libyaml.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

INT_PATTERN = re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z")
FLOAT_PATTERN = re.compile(
    r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
)
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,100}\Z")
_WORDS = {
    **dict.fromkeys(("null", "Null", "NULL", "~", ""), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff]")

# What the parser says, and what is usually behind it.
_HINTS = {
    "scanning an alias": "; put text that begins with * in quotes",
    "scanning an anchor": "; put text that begins with & in quotes",
    "cannot start any token": "; indent with spaces, and put text that begins with @, % or a backquote in quotes",
    "mapping values are not allowed": "; check the indentation, and put text that holds a colon and a space in quotes",
    "unexpected end of stream": "; a quote is opened here and never closed",
    "expected ':'": "; a key is followed by a colon and a space",
    "expected key": "; check the indentation and the quotes",
    "expected ',' or": "; a bracket is not closed",
    "escape c": "; a backslash in double quotes begins an escape: double it, or use single quotes",
}

KeyPath: TypeAlias = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where something was written; lines and columns count from 1."""

    file: str
    line: int | None = None
    column: int | None = None


@dataclass(slots=True)
class Document:
    """A mapping as written, with the place of each key and value, and what was wrong with the writing."""

    file: str
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    key_places: dict[KeyPath, Place] = field(default_factory=dict[KeyPath, Place])
    value_places: dict[KeyPath, Place] = field(default_factory=dict[KeyPath, Place])
    problems: list[Problem] = field(default_factory=list[Problem])
    unusable: set[KeyPath] = field(default_factory=set[KeyPath])  # already reported; their values mean nothing

    def place(self, path: KeyPath, *, of_key: bool = False) -> Place:
        """The place of the value (or key) at `path`, else of the nearest key around it, else of the file."""
        if not of_key and path in self.value_places:
            return self.value_places[path]
        for end in range(len(path), 0, -1):
            if path[:end] in self.key_places:
                return self.key_places[path[:end]]
        return Place(self.file)

    def set(self, path: tuple[str, ...], value: Any, place: Place) -> None:
        """Lay a value over what was written; KeyError if a part of `path` was written as something without keys."""
        values = self.values
        for name in path[:-1]:
            if values.get(name) is None:
                values[name] = {}
            if not isinstance(values[name], dict):
                raise KeyError(name)
            values = cast(dict[str, Any], values[name])
        values[path[-1]] = value
        for places in (self.key_places, self.value_places):
            for covered in [known for known in places if known[: len(path)] == path]:
                del places[covered]
        self.key_places[path] = self.value_places[path] = place


def read_document(text: str, file: str) -> Document:
    """The one mapping that `text` holds; `file` names it in problems.

    What can be passed over is collected in `problems` (keys given twice, aliases, anchors, tags, odd keys).
    Raises SpecError where reading cannot go on: broken syntax, no mapping, nesting too deep, control characters.
    """
    document, value = _parse(text, file)
    if value is None:
        raise SpecError(Problem("the file is empty; it needs at least model, input and output", file))
    if not isinstance(value, dict):
        raise SpecError(Problem("the file must hold keys and values, such as `input:` on a line of its own", file, 1))
    document.values = value
    return document


def read_value(text: str) -> Any:
    """One value on a command line: quoted text, a flow list or mapping, or else a bare word as YAML would take it.

    A bare word may hold what YAML would cut it at: `template=Summarise: {text}` needs no quotes. Raises SpecError.
    """
    text = text.strip()
    if not text.startswith(("[", "{", '"', "'")):
        return plain_value(text)
    document, value = _parse(text, "")
    if document.problems:
        raise SpecError(document.problems)
    return value


def _parse(text: str, file: str) -> tuple[Document, Any]:
    if odd := _CONTROL_CHARACTER.search(text):
        line = text.count("\n", 0, odd.start()) + 1
        column = odd.start() - text.rfind("\n", 0, odd.start())
        raise SpecError(Problem(f"the control character {odd[0]!a} has no place here", file, line, column))
    document = Document(file)
    try:
        return document, _Reader(document, cast(Any, yaml).parse(text, _LOADER)).document()
    except yaml.MarkedYAMLError as error:
        raise SpecError(_syntax_problem(error, file)) from None
    except yaml.YAMLError as error:
        raise SpecError(Problem(f"not valid YAML: {error}", file)) from None


def plain_value(text: str) -> Any:
    """What an unquoted word means by the core schema of YAML 1.2."""
    if len(text) > 400:  # no number; and Python refuses integers of more than 4300 digits
        return text
    if text in _WORDS:
        return _WORDS[text]
    if INT_PATTERN.match(text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if FLOAT_PATTERN.match(text):
        return float(re.sub(r"\.(inf|nan)", r"\1", text.lower()))
    return text


def _syntax_problem(error: yaml.MarkedYAMLError, file: str) -> Problem:
    saying = f"{error.context or ''} {error.problem or ''}"
    hint = next((hint for part, hint in _HINTS.items() if part in saying), "")
    mark = error.context_mark if "end of stream" in saying and error.context_mark else error.problem_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (None, None)
    return Problem(f"not valid YAML: {error.problem or error.context}{hint}", file, line, column)


class _Reader:
    """Builds values from the parser's events and notes their places in the document."""

    def __init__(self, document: Document, events: Iterator[Any]) -> None:
        self._document = document
        self._events = events
        self._num_nodes = 0

    def document(self) -> Any:
        next(self._events)  # start of the stream
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return None
        value = self._node(next(self._events), ())
        next(self._events)  # end of the document
        event = next(self._events)
        if isinstance(event, yaml.DocumentStartEvent):
            self._refuse(event, (), "a second document begins here; a job file holds one")
        return value

    def _node(self, event: Any, path: KeyPath) -> Any:
        self._check_size(event, len(path))
        self._document.value_places[path] = self._place(event)
        if isinstance(event, yaml.AliasEvent):
            self._refuse(event, path, "aliases (*) are not used in a job file; if it is text, put it in quotes")
            return None
        if event.anchor is not None:
            self._refuse(event, path, "anchors (&) are not used in a job file; if it is text, put it in quotes")
        if event.tag is not None:
            self._refuse(event, path, "tags (!) are not used in a job file; if it is text, put it in quotes")
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(path)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(path)
        return plain_value(event.value) if event.implicit[0] else event.value

    def _sequence(self, path: KeyPath) -> list[Any]:
        values: list[Any] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            values.append(self._node(event, (*path, len(values))))
        return values

    def _mapping(self, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._key(event, path)
            if key is None or key in values:
                self._skip(next(self._events))
                continue
            self._document.key_places[(*path, key)] = self._place(event)
            values[key] = self._node(next(self._events), (*path, key))
        return values

    def _key(self, event: Any, path: KeyPath) -> str | None:
        """The name in `event`, or None if it is none."""
        if not isinstance(event, yaml.ScalarEvent) or event.tag is not None or event.anchor is not None:
            self._skip(event)
            self._refuse(event, path, "a key must be a plain name", spoils=False)
            return None
        key: str = event.value
        if not KEY_PATTERN.match(key):
            self._refuse(event, path, f"{key[:100]!a} is no key; sections are written as indented lines", spoils=False)
            return None
        first = self._document.key_places.get((*path, key))
        if first is not None:
            self._refuse(event, (*path, key), f"given twice; first in line {first.line}", spoils=False)
        return key

    def _skip(self, event: Any) -> None:
        depth = 0
        while True:
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            self._check_size(event, depth)
            if depth == 0:
                return
            event = next(self._events)

    def _check_size(self, event: Any, depth: int) -> None:
        self._num_nodes += 1
        if depth > MAX_DEPTH or self._num_nodes > MAX_NODES:
            place = self._place(event)
            limit = f"nested deeper than {MAX_DEPTH} levels" if depth > MAX_DEPTH else f"more than {MAX_NODES} values"
            message = f"{limit}; a job file is not that large (a glob names many files)"
            raise SpecError(Problem(message, place.file, place.line, place.column))

    def _refuse(self, event: Any, path: KeyPath, message: str, *, spoils: bool = True) -> None:
        place, dotted = self._place(event), ".".join(str(part) for part in path)
        self._document.problems.append(Problem(message, place.file, place.line, place.column, dotted or None))
        if spoils:
            self._document.unusable.add(path)

    def _place(self, event: Any) -> Place:
        return Place(self._document.file, event.start_mark.line + 1, event.start_mark.column + 1)
