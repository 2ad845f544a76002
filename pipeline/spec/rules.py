"""What a job may not ask for although each key is right by itself: contradictions, and what is not installed."""

from __future__ import annotations

import os.path
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import PurePath

from pipeline import columnar, compression, remote
from pipeline.spec.keys import EchoSpec, JobSpec
from pipeline.spec.template import check_template


@dataclass(frozen=True, slots=True)
class Broken:
    """A rule that a job breaks: where to show it, why, and all keys that it looked at."""

    key: str
    message: str
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """Keys that must agree; the first of them is where the problem is shown."""

    keys: tuple[str, ...]
    broken: Callable[[JobSpec], bool]
    message: str


def broken_rules(spec: JobSpec) -> Iterator[Broken]:
    """Everything that `spec` asks for and cannot have. Looks at the file system for the place of the output."""
    for rule in RULES:
        if rule.broken(spec):
            yield Broken(rule.keys[0], rule.message, rule.keys)
    yield from _unreadable_kinds(spec)
    if spec.run.metrics is not None and find_spec("prometheus_client") is None:
        yield Broken("run.metrics", "needs `pip install 'overnight[metrics]'`", ("run.metrics",))
    if isinstance(spec.input.template, str):
        for message in check_template(spec.input.template):
            yield Broken("input.template", message, ("input.template",))


def _unreadable_kinds(spec: JobSpec) -> Iterator[Broken]:
    """Names that ask for a format or compression that cannot be had here."""
    for key, path in (*(("input.path", path) for path in spec.input.path), ("output.path", spec.output.path)):
        lacking = compression.missing_library(path) or columnar.missing_library(path)
        if lacking := lacking or remote.refusal(path, for_writing=key == "output.path"):
            yield Broken(key, f"{path}: {lacking}", (key,))


def _is_directory(spec: JobSpec) -> bool:
    # Path.is_dir raises for a name that is too long; that is for the opening of the output to say.
    return spec.output.path.endswith("/") or os.path.isdir(spec.output.file)  # noqa: PTH112


def _output_is_input(spec: JobSpec) -> bool:
    if remote.is_remote(spec.output.path):
        return any(fnmatchcase(spec.output.path, pattern) for pattern in spec.input.path)
    output = os.path.realpath(spec.output.path)
    return any(_matches(output, pattern) for pattern in spec.input.path if not remote.is_remote(pattern))


def _matches(path: str, pattern: str) -> bool:
    whole = os.path.realpath(pattern)
    if "**" not in whole:
        return path == whole or PurePath(path).match(whole)
    # A double star crosses folders, as each star does for fnmatch, and stands for none of them too.
    return fnmatchcase(path, whole) or fnmatchcase(path, whole.replace("/**/", "/"))


RULES = (
    Rule(
        ("model.path", "model.engine"),
        lambda spec: spec.model.path is None and spec.model.engine != "echo",
        "is required: builtin:smollm2-135m, a local directory or a hub id (only `engine: echo` needs no model)",
    ),
    Rule(
        ("model.echo", "model.engine"),
        lambda spec: spec.model.echo != EchoSpec() and spec.model.engine != "echo",
        "is for the echo engine only; leave it out or set model.engine to echo",
    ),
    Rule(
        ("thinking.budget", "thinking.mode"),
        lambda spec: spec.thinking.budget is not None and spec.thinking.mode == "off",
        "has no meaning with thinking.mode off; leave one of the two out",
    ),
    Rule(
        ("thinking.budget", "generation.max_new_tokens"),
        lambda spec: (spec.thinking.budget or 0) >= spec.generation.max_new_tokens,
        "leaves no room for an answer; it must be below generation.max_new_tokens, which counts reasoning too",
    ),
    Rule(
        ("thinking.mode", "input.chat_template"),
        lambda spec: spec.thinking.mode == "on" and spec.input.chat_template == "off",
        "cannot be on with input.chat_template off: the template is what asks the model to think",
    ),
    Rule(
        ("input.template", "input.format"),
        lambda spec: spec.input.template is not None and spec.input.format in ("messages", "openai-batch"),
        "has no meaning with input.format messages or openai-batch; leave one of the two out",
    ),
    Rule(
        ("input.prompt_field", "input.template"),
        lambda spec: spec.input.template is not None and spec.input.prompt_field != "prompt",
        "has no meaning beside input.template, which names its fields itself; leave one of the two out",
    ),
    Rule(
        ("input.chat_template", "input.format"),
        lambda spec: spec.input.chat_template == "off" and spec.input.format == "messages",
        "cannot be off with input.format messages: only the template turns messages into a prompt",
    ),
    Rule(
        ("input.system", "input.chat_template"),
        lambda spec: spec.input.system is not None and spec.input.chat_template == "off",
        "has no place without a chat template; write it into input.template, or leave input.chat_template out",
    ),
    Rule(
        ("output.keep_fields", "output.format"),
        lambda spec: spec.output.format == "openai-batch" and spec.output.keep_fields != "all",
        "has no place in OpenAI's shape, which repeats nothing of the input; leave it out",
    ),
    Rule(
        ("output.path", "output.format"),
        lambda spec: spec.output.format == "openai-batch" and columnar.is_columnar(spec.output.path),
        "is a table, and output.format openai-batch is lines; name a .jsonl file",
    ),
    Rule(
        ("output.path",),
        lambda spec: spec.output.path.lower().endswith(".arrow"),
        "can be read as input, not written; name a .parquet or .jsonl file",
    ),
    Rule(("output.path",), _is_directory, "is a directory; name a file in it"),
    Rule(
        ("output.path", "input.path"),
        _output_is_input,
        "is among the files of input.path, which it would overwrite; name another file",
    ),
)
