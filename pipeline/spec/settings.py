"""The settings of one answer: the job's `generation`, and a line's own laid over it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from types import MappingProxyType

from pydantic import ValidationError

from pipeline.records import Json, Settings
from pipeline.spec.keys import GenerationSpec, JobSpec, LineGeneration
from pipeline.spec.wording import must_be, nearest

_MAX_NAME_CHARS = 60
_AS_GENERATION: Mapping[str, str] = MappingProxyType({})
_SETTINGS = {field.name for field in fields(Settings)}


def default_settings(spec: JobSpec) -> Settings:
    """What the job says about every answer."""
    values = {name: value for name, value in spec.generation if name in _SETTINGS}
    return Settings(**values, thinking_budget=spec.thinking.budget)


def apply_overrides(
    settings: Settings,
    system: str | None,
    overrides: Mapping[str, Json],
    written: Mapping[str, str] = _AS_GENERATION,
) -> tuple[Settings, str | None]:
    """The job's settings and system message with those of a line laid over them.

    `written` says where the line has a setting, if not under `generation`. Raises ValueError, saying all that is wrong
    in the words of the job file's own messages.
    """
    try:
        line = LineGeneration.model_validate(overrides)
    except ValidationError as error:
        raise ValueError("; ".join(_messages(error, overrides, written))) from None
    given = {name: getattr(line, name) for name in line.model_fields_set}
    system = given.pop("system", system)
    return replace(settings, **given), system


def _messages(error: ValidationError, overrides: Mapping[str, Json], written: Mapping[str, str]) -> Iterator[str]:
    # A list with several bad elements is one problem. A name that is not Unicode has no place in pydantic's words.
    locations = [detail["loc"] for detail in error.errors(include_url=False)]
    for name in dict.fromkeys(str(location[0]) for location in locations if location):
        field = LineGeneration.model_fields.get(name)
        if field is not None:
            yield f"`{written.get(name, f'generation.{name}')}` {must_be(field, overrides[name])}"
        elif name in GenerationSpec.model_fields:
            yield f"`generation.{name}` is for the whole job; a line cannot set it"
        else:
            near = nearest(name, LineGeneration.model_fields)
            printable = json.dumps(name)[1:-1][:_MAX_NAME_CHARS]
            yield f"`generation.{printable}` is unknown" + (f"; did you mean `{near}`?" if near else "")
    if () in locations:
        yield "`generation` has a name that is not valid Unicode"
