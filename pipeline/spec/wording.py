"""Says in plain words what a key takes and what was written instead; the one voice of the job file's messages."""

from __future__ import annotations

import json
import types
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from pipeline.spec.keys import TemplateFile, Wording, job_keys, job_sections

_MAX_SHOWN_CHARS = 40
_BOUNDS = {"ge": "of at least", "gt": "above", "le": "at most", "lt": "below"}


def expectation(field: FieldInfo) -> str:
    """What a key takes, as a phrase: `a number above 0 and at most 1`, `null or a size such as 14GiB`."""
    return _phrase(field.annotation, field.metadata)


def must_be(field: FieldInfo, value: object) -> str:
    """What a key takes and that `value` is not it, with the usual way out."""
    return f"must be {expectation(field)}, not {shown(value)}{_way_out(field, value)}"


def must_be_section(name: str, value: object) -> str:
    """A section was expected."""
    return f"must hold keys of its own ({', '.join(job_sections()[name].model_fields)}), not {shown(value)}"


def is_required(field: FieldInfo) -> str:
    """A key without a default was left out."""
    return f"is required: {expectation(field)}"


def unknown_key(key: str) -> str:
    """An unknown dotted key, and what its author may have meant."""
    section, _, name = key.rpartition(".")
    here = list(job_sections()[section].model_fields)
    known = {path: path.rpartition(".")[2] for path in (*job_keys(), *job_sections()) if path}
    for path, last in known.items():
        if last == name:
            return f"unknown here; `{name}` belongs {_under(path)}"
    if near := nearest(name, here):
        return f"unknown key; did you mean `{near}`?"
    if near := nearest(name, known.values()):
        path = next(path for path, last in known.items() if last == near)
        return f"unknown key; did you mean `{near}` {_under(path)}?"
    return f"unknown key; known here are {', '.join(here)}"


def _under(path: str) -> str:
    section = path.rpartition(".")[0]
    return f"under `{section}`" if section else "at the top level"


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The known name that `name` most likely stands for."""
    near = get_close_matches(name[:100].replace("-", "_").lower(), list(names), n=1, cutoff=0.6)
    return near[0] if near else None


def shown(value: object) -> str:
    """A value as a message shows it: short, and text told apart from numbers and words of YAML."""
    quoted = json.dumps(value, ensure_ascii=False, default=str)
    short = quoted if len(quoted) <= _MAX_SHOWN_CHARS else quoted[: _MAX_SHOWN_CHARS - 3] + "..."
    return f"the text {short}" if isinstance(value, str) else short


def _way_out(field: FieldInfo, value: object) -> str:
    kind = field.annotation
    if value is None:
        return "" if field.is_required() else "; leave the key out for its default"
    if kind is bool and isinstance(value, str):
        word = {"yes": "true", "on": "true", "no": "false", "off": "false"}.get(value.lower())
        return f"; write {word}" if word else ""
    if isinstance(value, str) and _is_number(value):
        return "; write it without quotes" if _takes_number(field) else ""
    if _takes_text(kind):
        if isinstance(value, bool | int | float):
            return f"; put it in quotes: {json.dumps(json.dumps(value))}"
        if isinstance(value, dict):
            return "; put text that begins with { in quotes"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _takes_number(field: FieldInfo) -> bool:
    return any(kind in (int, float) for kind in _alternatives(field.annotation))


def _takes_text(kind: Any) -> bool:
    return str in _alternatives(kind)


def _alternatives(kind: Any) -> list[Any]:
    """The plain types that a type stands for."""
    if get_origin(kind) in (Union, types.UnionType):
        return [plain for part in get_args(kind) for plain in _alternatives(part)]
    return [get_args(kind)[0] if hasattr(kind, "__metadata__") else kind]


def _phrase(kind: Any, metadata: Sequence[object]) -> str:
    wording = next((part for part in metadata if isinstance(part, Wording)), None)
    if wording:
        example = f", such as {wording.such_as}" if wording.such_as else ""
        return wording.noun + _bounds(metadata, wording) + example
    origin, arguments = get_origin(kind), get_args(kind)
    if hasattr(kind, "__metadata__"):
        return _phrase(arguments[0], [part for extra in kind.__metadata__ for part in _flattened(extra)])
    if origin in (Union, types.UnionType):
        parts = sorted(arguments, key=lambda part: part is not type(None))  # null first: it is the short one
        return _listed([word for part in parts for word in _words(part)])
    if origin is Literal:
        return _listed(arguments)
    if origin is tuple:
        return f"a list of {_phrase(arguments[0], ())}s"
    return _NOUNS[kind] + _bounds(metadata, Wording("")) if kind is not str else _text(metadata)


_NOUNS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    type(None): "null",
    TemplateFile: "{file: PATH}",
}


def _text(metadata: Sequence[object]) -> str:
    return "non-empty text" if any(hasattr(part, "min_length") for part in metadata) else "text"


def _flattened(metadata: object) -> Sequence[object]:
    return metadata.metadata if isinstance(metadata, FieldInfo) else (metadata,)


def _bounds(metadata: Sequence[object], wording: Wording) -> str:
    phrases = [
        f"{words} {wording.show(getattr(part, bound))}"
        for bound, words in _BOUNDS.items()
        for part in metadata
        if hasattr(part, bound)
    ]
    return "".join((" " if position == 0 else " and ") + phrase for position, phrase in enumerate(phrases))


def _words(kind: Any) -> Sequence[str]:
    return get_args(kind) if get_origin(kind) is Literal else (_phrase(kind, ()),)


def _listed(words: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
