"""One completion to one native line, in which a run keeps its answers, and the file of such lines."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Literal, cast

from pydantic_core import to_json

from pipeline.output.forms import Companions, Conclude
from pipeline.records import Completion, Item, ItemError, Timing, Usage


class Native:
    """The native lines as they are, and the summary as the last line if asked for."""

    companions: Companions = MappingProxyType({})
    has_lines = True

    def encode(self, lines: Iterable[bytes], conclude: Conclude, *, summary_line: bool) -> Iterator[bytes]:
        """The digest that `conclude` is given covers all lines before the summary's."""
        digest = hashlib.sha256()
        for piece in lines:
            digest.update(piece)
            yield piece
        summary = conclude(digest.hexdigest())
        if summary_line:
            yield summary


NATIVE = Native()


def render(completion: Completion, *, keep_fields: Literal["all", "none"] | Sequence[str] = "all") -> bytes:
    """The line of one answer, with its line end: strict UTF-8 JSON, whatever the completion holds.

    `keep_fields` says what of the input line is repeated under `input`: `all`, the names listed (those the line has),
    or `none`, where `input` is null as it is for a line that could not be read.
    """
    item, error = completion.item, completion.error
    record: dict[str, Any] = {
        "object": "completion",
        "index": item.index,
        "id": item.id,
        "sample": completion.sample,
        "completion": completion.text,
        "reasoning": completion.reasoning,
        "finish_reason": completion.finish_reason,
        "usage": completion.usage and _usage(completion.usage),
        "timing": completion.timing and _timing(completion.timing, completion.usage),
        "error": error and _error(error, item),
        "input": _kept(item.fields, keep_fields),
    }
    try:
        line = to_json(record, inf_nan_mode="null")
    except ValueError:  # half of a surrogate pair: no line of JSON that we read holds one, a caller of ours may
        line = to_json(_without_surrogates(record), inf_nan_mode="null")
    return line + b"\n"


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
    }


def _timing(timing: Timing, usage: Usage | None) -> dict[str, Any]:
    """Sums and rate are those of the rounded parts, so that a reader who adds them up finds the same."""
    queue_s, prefill_s, decode_s = round(timing.queue_s, 6), round(timing.prefill_s, 6), round(timing.decode_s, 6)
    first_s = round(queue_s + prefill_s, 6)
    total_s = round(first_s + decode_s, 6)
    num_tokens = 0 if usage is None else usage.completion_tokens
    started_at = datetime.fromtimestamp(timing.started_at, UTC)
    return {
        "started_at": started_at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "queue_s": queue_s,
        "prefill_s": prefill_s,
        "time_to_first_token_s": first_s,
        "decode_s": decode_s,
        "total_s": total_s,
        "tokens_per_second": round(num_tokens / total_s, 6) if total_s > 0 else 0.0,
    }


def _error(error: ItemError, item: Item) -> dict[str, Any]:
    return {
        "type": error.type,
        "message": error.message,
        "file": item.file,
        "line": item.line,
        "offset": item.offset,
        "attempts": error.attempts,
    }


def _kept(fields: Mapping[str, Any] | None, keep_fields: str | Sequence[str]) -> Mapping[str, Any] | None:
    if fields is None or keep_fields == "none":
        return None
    if keep_fields == "all":
        return fields
    return {name: fields[name] for name in keep_fields if name in fields}


def _without_surrogates(value: object) -> object:
    """The same value with U+FFFD in place of half surrogate pairs."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, Mapping):
        fields = cast("Mapping[str, object]", value)
        return {_without_surrogates(name): _without_surrogates(inner) for name, inner in fields.items()}
    if isinstance(value, list | tuple):
        return [_without_surrogates(inner) for inner in cast("Iterable[object]", value)]
    return value
