"""The job file's reference in Markdown, made from the same keys, wordings and rules as its messages."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic.fields import FieldInfo

from pipeline.spec.fingerprint import KEY_CLASSES, KeyClass
from pipeline.spec.keys import LineGeneration, Section, Wording, job_keys, job_sections
from pipeline.spec.rules import RULES
from pipeline.spec.wording import expectation

_RESUME: dict[KeyClass, str] = {
    "answers": "no: other answers",
    "presentation": "no: other lines",
    "operational": "yes",
}
_BEGINNING = """\
# The job file, key by key

Made by `overnight schema --markdown > docs/job-reference.md` from the program's own definitions; a test keeps it fresh.
`jobs/job.schema.json` says the same to editors.

A job is one YAML file. `model`, `input` and `output` are required, everything else has a default. Unknown keys are
refused. Any key can be set on the command line too, dotted: `--set generation.seed=7`. Sizes are written `14GiB` or
`500MB`, durations `90s`, `30m` or `3h`. Relative paths are relative to the working directory.

*Resume* says whether a stopped run may go on after the key was changed. Where it says no, the run is refused (exit code
78) with the name of the key, for it would mix answers; `--fresh` begins anew.
"""


def job_reference() -> str:
    """The reference as Markdown, a table for each section in the order of the file."""
    lines = [_BEGINNING]
    for name, section in job_sections().items():
        lines += _section(name, section)
    lines += ["## What goes together", "", "Each of these is refused with exit code 78 before anything is loaded.", ""]
    lines += [f"- `{rule.keys[0]}` {rule.message}" for rule in RULES]
    names = ", ".join(f"`{name}`" for name in LineGeneration.model_fields)
    lines += [
        *("", "## What a line may set for itself", ""),
        *("Under the key `generation` of an input line, over the job's own value:", f"{names}.", ""),
    ]
    return "\n".join(lines)


def _section(name: str, section: type[Section]) -> Iterator[str]:
    keys = {key: field for key, field in job_keys().items() if key.rpartition(".")[0] == name}
    yield f"## `{name}`" if name else "## At the top"
    yield ""
    yield _sentence(section.__doc__)
    yield ""
    yield "| key | takes | default | meaning | resume |"
    yield "|---|---|---|---|---|"
    for key, field in keys.items():
        cells = (
            f"`{key}`",
            expectation(field),
            _default(key, field),
            str(field.description),
            _RESUME[KEY_CLASSES[key]],
        )
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def _sentence(text: str | None) -> str:
    return " ".join((text or "").split())


def _default(key: str, field: FieldInfo) -> str:
    if key == "name":
        return "the job file's name"
    if field.is_required():
        return "required"
    value = field.get_default()
    wording = next((part for part in field.metadata if isinstance(part, Wording)), None)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if wording is not None:
        return f"`{wording.show(value)}`"
    return "`[]`" if value == () else f"`{value}`"
