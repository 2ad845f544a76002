"""Answers as lines of an OpenAI batch output, one for each line of the input; samples are the choices of one line.

Shapes: https://platform.openai.com/docs/api-reference/batch/request-output around a `chat.completion` or
`text_completion` object, with the reasoning in `reasoning_content` as vLLM has it. A line without an answer carries its
error twice, as status code and body of the response and as `error`, for clients look at one or the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from itertools import groupby
from operator import itemgetter
from typing import Any

from pydantic_core import from_json, to_json

from pipeline.output.forms import Companions, Conclude

# What a line is not to blame for: the service failed, in the words of HTTP. All else is a bad request.
_OUR_FAULTS = frozenset({"engine_error", "out_of_memory", "crashed", "stalled", "echo_failure"})
_TEXT_URL = "/v1/completions"

KEPT_FIELDS = ("url",)  # of the input line, in the native lines: says which of the two shapes was asked for


class OpenAIBatch:
    """The form of one job's output. `model` is what answered; ids are derived from `fingerprint` and the index."""

    has_lines = True

    def __init__(self, *, model: str, fingerprint: str) -> None:
        self._model = model
        self._fingerprint = fingerprint
        self.companions: Companions = {".timing.jsonl": timing_lines}

    def encode(self, lines: Iterable[bytes], conclude: Conclude, *, summary_line: bool) -> Iterator[bytes]:
        """One line for each item. A summary line would be no line of this format, so there is none."""
        del summary_line
        digest = hashlib.sha256()
        for _, samples in groupby(_records(lines), key=itemgetter("index")):
            line = to_json(self._line(list(samples))) + b"\n"
            digest.update(line)
            yield line
        conclude(digest.hexdigest())

    def _line(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        first = samples[0]
        key = hashlib.sha256(f"{self._fingerprint}:{first['index']}".encode()).hexdigest()[:32]
        good = [sample for sample in samples if sample["error"] is None]
        failed = [sample["error"] for sample in samples if sample["error"] is not None]
        body = self._body(key, good) if good else _error_body(failed[0])
        status = 200 if good else _status(failed[0])
        return {
            "id": f"batch_req_{key}",
            "custom_id": _as_text(first["id"]),
            "response": {"status_code": status, "request_id": f"req_{key}", "body": body},
            "error": _error(failed, len(samples)),
        }

    def _body(self, key: str, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        asked: dict[str, Any] = samples[0]["input"] or {}
        is_text = asked.get("url") == _TEXT_URL
        usages = [sample["usage"] for sample in samples]
        prompt_tokens = usages[0]["prompt_tokens"]
        completion_tokens = sum(usage["completion_tokens"] for usage in usages)
        reasoning_tokens = sum(usage["reasoning_tokens"] for usage in usages)
        started_at = min(datetime.fromisoformat(sample["timing"]["started_at"]) for sample in samples)
        return {
            "id": f"{'cmpl' if is_text else 'chatcmpl'}-{key}",
            "object": "text_completion" if is_text else "chat.completion",
            "created": int(started_at.timestamp()),
            "model": self._model,
            "choices": [_text_choice(sample) if is_text else _chat_choice(sample) for sample in samples],
            "usage": {
                "prompt_tokens": prompt_tokens,  # of a prompt with several samples once, as OpenAI counts it
                "completion_tokens": completion_tokens,
                "total_tokens": prompt_tokens + completion_tokens,
                "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
            },
        }


def timing_lines(lines: Iterable[bytes]) -> Iterator[bytes]:
    """What of each answer has no place in OpenAI's shape: a line of its own, in the order of the answers."""
    for record in _records(lines):
        kept = {name: record[name] for name in ("index", "id", "sample", "finish_reason", "usage", "timing", "error")}
        yield to_json({"object": "timing", **kept}) + b"\n"


def _records(pieces: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for piece in pieces:
        for line in piece.split(b"\n")[:-1]:
            yield from_json(line)


def _chat_choice(sample: dict[str, Any]) -> dict[str, Any]:
    message = {
        "role": "assistant",
        "content": sample["completion"],
        "reasoning_content": sample["reasoning"],
        "refusal": None,
    }
    return {
        "index": sample["sample"],
        "message": message,
        "logprobs": None,
        "finish_reason": sample["finish_reason"],
    }


def _text_choice(sample: dict[str, Any]) -> dict[str, Any]:
    choice = {
        "index": sample["sample"],
        "text": sample["completion"],
        "logprobs": None,
        "finish_reason": sample["finish_reason"],
    }
    return choice if sample["reasoning"] is None else {**choice, "reasoning_content": sample["reasoning"]}


def _status(error: dict[str, Any]) -> int:
    return 500 if error["type"] in _OUR_FAULTS else 400


def _error_body(error: dict[str, Any]) -> dict[str, Any]:
    kind = "server_error" if error["type"] in _OUR_FAULTS else "invalid_request_error"
    return {"error": {"message": error["message"], "type": kind, "param": None, "code": error["type"]}}


def _error(failed: Sequence[dict[str, Any]], num_samples: int) -> dict[str, Any] | None:
    if not failed:
        return None
    first = failed[0]
    lacking = "" if len(failed) == num_samples else f"{len(failed)} of {num_samples} choices are missing: "
    place = f"{first['file']}:{first['line']}"
    return {"code": first["type"], "message": f"{place}: {lacking}{first['message']}", "line": first["line"]}


def _as_text(id_: object) -> str | None:
    return id_ if id_ is None or isinstance(id_, str) else to_json(id_).decode()
