"""The job file: YAML text and `--set` to a JobSpec, with every problem at once and in its place; and back."""

from __future__ import annotations

import copy
import glob
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import ValidationError

from pipeline.errors import NotFoundError, Problem, SpecError
from pipeline.remote import is_remote
from pipeline.spec.keys import JobSpec, TemplateFile, job_keys, job_sections
from pipeline.spec.rules import broken_rules
from pipeline.spec.template import read_template
from pipeline.spec.wording import is_required, must_be, must_be_section, unknown_key
from pipeline.spec.yaml_text import (
    FLOAT_PATTERN,
    INT_PATTERN,
    KEY_PATTERN,
    MAX_FILE_BYTES,
    Document,
    KeyPath,
    Place,
    read_document,
    read_value,
)

MAX_PROBLEMS = 50  # shown at once; beyond it the file is something else than a job


def load_spec(path: Path | str, *, overrides: Sequence[str] = ()) -> JobSpec:
    """The job in the file at `path`, with overrides such as `generation.seed=7` laid over it.

    Raises SpecError with all problems of the file and the overrides in the order of their lines, then plain input files
    that are not there; and NotFoundError if the file, or a template file that it names, cannot be read.
    """
    path = Path(path)
    document = read_document(_read(path), str(path))
    document.problems.extend(problem for override in overrides for problem in _override(document, override))
    try:
        spec = build_spec(document, name=path.stem)
    except SpecError as error:  # input that is not there would be the next thing to be told
        raise SpecError([*error.problems, *_missing_input(document)]) from None
    _check_template_file(spec)
    return spec


def build_spec(document: Document, *, name: str) -> JobSpec:
    """The job that `document` describes, called `name` unless it says otherwise; SpecError with all problems."""
    if len(document.problems) > MAX_PROBLEMS:
        raise SpecError(_in_order(document.problems, 0, document.file))
    values = _with_sections({"name": name, **document.values})
    problems, spoilt = list(document.problems), {_dotted(path) for path in document.unusable}
    num_untold = 0
    try:
        spec = JobSpec.model_validate(values)
    except ValidationError as error:
        faults = list(_faults(error, values))
        unreported = [fault for fault in faults if not _is_spoiled(fault.key, spoilt)]
        problems += [fault.problem(document, values) for fault in unreported[:MAX_PROBLEMS]]
        num_untold = len(unreported[MAX_PROBLEMS:])
        # The rules are asked about the rest, so that a typing error does not hide a contradiction.
        spec = JobSpec.model_validate(_mended(values, faults))
        spoilt |= {fault.key for fault in faults}
    for broken in broken_rules(spec):
        if not any(_is_spoiled(key, spoilt) for key in broken.keys):
            problems.append(_placed(broken.message, document.place(tuple(broken.key.split("."))), broken.key))
    if problems:
        raise SpecError(_in_order(problems, num_untold, document.file))
    return spec


def dump_spec(spec: JobSpec) -> str:
    """The job as YAML that `load_spec` reads back to an equal JobSpec; every key is written out."""
    return yaml.dump(spec.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """Quotes also what only YAML 1.2, which we read, takes for a number."""


for _tag, _pattern in (("int", INT_PATTERN), ("float", FLOAT_PATTERN)):
    cast(Any, _Dumper).add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, None)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise NotFoundError(Problem(f"cannot read the job file: {error.strerror}", str(path))) from None
    if len(data) > MAX_FILE_BYTES:
        raise SpecError(Problem("larger than 1 MiB; a job file is not that long", str(path)))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SpecError(Problem("not UTF-8 text; save the file as UTF-8", str(path), line)) from None


def _missing_input(document: Document) -> Iterator[Problem]:
    """Plain files on this machine that `input.path` names and that are not there."""
    if _is_spoiled("input.path", map(_dotted, document.unusable)):
        return
    named = _value_at(document.values, ("input", "path"))
    for name in cast(list[Any], named)[:MAX_PROBLEMS] if isinstance(named, list) else [named]:
        if isinstance(name, str) and name and not (glob.has_magic(name) or is_remote(name) or os.path.lexists(name)):
            yield Problem("no such file", name, field="input.path")


def _check_template_file(spec: JobSpec) -> None:
    template = spec.input.template
    if isinstance(template, TemplateFile):
        try:
            read_template(spec.input)
        except ValueError as error:
            raise SpecError([Problem(str(it), template.file, field="input.template") for it in error.args]) from None


def _override(document: Document, override: str) -> Iterator[Problem]:
    key, equals, text = override.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(KEY_PATTERN.match(part) for part in path):
        yield Problem(f"{override[:100]!a} must be KEY=VALUE, such as generation.seed=7", "--set")
        return
    try:
        document.set(path, read_value(text), Place("--set"))
    except SpecError:
        message = f"{text[:100]!a} is not a YAML value; put text that begins with a bracket or a quote in double quotes"
        yield Problem(message, "--set", field=key)
    except KeyError as error:
        yield Problem(f"cannot be set: `{error.args[0]}` has no keys of its own", "--set", field=key)


def _with_sections(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `values` with every section there, so that what is missing from a missing section is named itself."""
    complete = copy.deepcopy(dict(values))
    for name in filter(None, job_sections()):
        *parents, last = name.split(".")
        around = _value_at(complete, parents)
        if isinstance(around, dict) and _value_at(around, [last]) is None:
            around[last] = {}
    return complete


def _value_at(values: Any, path: Sequence[str | int]) -> Any:
    for part in path:
        values = cast(dict[Any, Any], values).get(part) if isinstance(values, dict) else None
    return values


@dataclass(frozen=True, slots=True)
class _Fault:
    """A key, or a section, whose value the schema refuses."""

    path: KeyPath  # the innermost part that is wrong
    key: str  # dotted
    missing: bool

    def problem(self, document: Document, values: Mapping[str, Any]) -> Problem:
        value, field = _value_at(values, self.key.split(".")), job_keys().get(self.key)
        of_key = False
        if field is not None:
            message = is_required(field) if self.missing else must_be(field, value)
        elif self.key in job_sections():
            message = must_be_section(self.key, value)
        else:
            of_key, message = True, unknown_key(self.key)
        return _placed(message, document.place(self.path, of_key=of_key), self.key)


def _faults(error: ValidationError, values: Mapping[str, Any]) -> Iterator[_Fault]:
    seen: set[str] = set()
    for detail in error.errors(include_url=False, include_context=False, include_input=False):
        location, missing = detail["loc"], detail["type"] == "missing"
        depth = _written_depth(location, values)
        path = location[: depth + missing]
        # A list or a choice of types has several errors for what is one problem to its author.
        dotted = [_dotted(path[:end]) for end in range(1, len(path) + 1)]
        key = next((key for key in dotted if key in job_keys()), dotted[-1])
        if key not in seen:
            seen.add(key)
            yield _Fault(path, key, missing and key == dotted[-1])


def _written_depth(location: KeyPath, values: Any) -> int:
    """How much of pydantic's location is in the values: the rest are its own names for branches of a choice."""
    for depth, part in enumerate(location):
        if isinstance(values, dict) and part in values:
            values = cast(dict[Any, Any], values)[part]
        elif isinstance(values, list) and isinstance(part, int):
            values = cast(list[Any], values)[part]
        else:
            return depth
    return len(location)


def _mended(values: Mapping[str, Any], faults: Sequence[_Fault]) -> dict[str, Any]:
    """`values` without what is wrong, and with something in place of what is required."""
    mended = copy.deepcopy(dict(values))
    for fault in faults:
        *parents, last = fault.key.split(".")
        _value_at(mended, parents).pop(last, None)
    mended = _with_sections(mended)
    for key, field in job_keys().items():
        *parents, last = key.split(".")
        if field.is_required():
            _value_at(mended, parents).setdefault(last, key)
    return mended


def _is_spoiled(key: str, spoilt: Iterable[str]) -> bool:
    """Whether `key` is, holds or lies in one of `spoilt`."""
    return any(f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.") for other in spoilt)


def _placed(message: str, place: Place, key: str) -> Problem:
    return Problem(message, place.file, place.line, place.column, key)


def _dotted(path: KeyPath) -> str:
    return ".".join(str(part) for part in path)


def _in_order(problems: list[Problem], num_untold: int, file: str) -> list[Problem]:
    ordered = sorted(problems, key=lambda problem: (problem.file != file, problem.line or 0, problem.column or 0))
    num_untold += len(ordered[MAX_PROBLEMS:])
    return ordered[:MAX_PROBLEMS] + [Problem(f"and {num_untold} more problems", file)] * bool(num_untold)
