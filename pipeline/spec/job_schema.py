"""The job file's JSON Schema, for editors and for the reference."""

from __future__ import annotations

from typing import Any, cast

from pydantic.fields import FieldInfo

from pipeline.spec.keys import JobSpec, Wording, job_keys, job_sections


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the job file, made from JobSpec.

    It accepts whatever `load_spec` does; what only the rules between keys refuse, it accepts too. The bare words `on`
    and `off` are booleans to editors that read YAML 1.1, so both are allowed where they mean the same.
    """
    schema = cast(dict[str, Any], _without_titles(JobSpec.model_json_schema()))
    sections = schema["$defs"]
    for key, field in job_keys().items():
        section, _, name = key.rpartition(".")
        properties = sections[job_sections()[section].__name__]["properties"] if section else schema["properties"]
        properties[name] |= _notes(field)
    del schema["properties"]["name"]["default"]  # it is the name of the file
    # The engine decides whether a model is needed, and the default engine needs one.
    echo = {"properties": {"engine": {"const": "echo"}}, "required": ["engine"]}
    sections["ModelSpec"] |= {"if": echo, "else": {"required": ["path"], "properties": {"path": {"type": "string"}}}}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "overnight job"}
    return {**head, **schema, "required": ["model", *schema["required"]]}


def _notes(field: FieldInfo) -> dict[str, str]:
    """What JobSpec knows of a key and pydantic's schema does not say."""
    notes: dict[str, str] = {}
    wording = next((part for part in field.metadata if isinstance(part, Wording)), None)
    if wording and not field.is_required():
        notes["default"] = wording.show(field.get_default())
    return notes


def _without_titles(node: Any) -> Any:
    """The schema without titles, which only repeat names."""
    if isinstance(node, list):
        return [_without_titles(part) for part in cast(list[Any], node)]
    if not isinstance(node, dict):
        return node
    return {
        key: _without_titles(part)
        for key, part in cast(dict[str, Any], node).items()
        if not (key == "title" and isinstance(part, str))
    }
