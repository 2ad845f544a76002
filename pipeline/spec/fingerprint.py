"""What of a job decides whether an earlier run may be resumed: the class of every key, and the fingerprint."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any, Literal, TypeAlias, cast

from pipeline.records import Json
from pipeline.spec.keys import JobSpec, value_of

KeyClass: TypeAlias = Literal["answers", "presentation", "operational"]

# answers: another value gives other answers. presentation: another value gives other bytes for the same answers.
# operational: free to change between the sessions of a run.
KEY_CLASSES: dict[str, KeyClass] = {
    "name": "operational",
    "model.path": "answers",
    "model.revision": "answers",
    "model.load_strategy": "operational",
    "model.gpu_memory": "operational",
    "model.cpu_memory": "operational",
    "model.engine": "answers",
    "model.trust_remote_code": "answers",  # another program computes them
    "model.strict": "operational",
    "model.activation": "answers",
    "model.repack_cache": "operational",
    "model.echo.delay": "operational",
    "model.echo.fail_every": "answers",
    "model.echo.crash_at": "operational",
    "model.echo.oom_at": "answers",  # that item is answered with an error
    "model.echo.hang_at": "operational",
    "thinking.mode": "answers",
    "thinking.budget": "answers",
    "input.path": "presentation",  # the content is guarded by its digest; error records name the file
    "input.format": "answers",
    "input.prompt_field": "answers",
    "input.messages_field": "answers",
    "input.id_field": "answers",
    "input.template": "answers",
    "input.system": "answers",
    "input.chat_template": "answers",
    "input.over_length": "answers",
    "input.max_line": "answers",  # a longer line is answered with an error
    "input.max_bytes": "operational",
    "input.allow_control_tokens": "answers",
    "generation.max_new_tokens": "answers",
    "generation.temperature": "answers",
    "generation.top_p": "answers",
    "generation.top_k": "answers",
    "generation.min_p": "answers",
    "generation.repetition_penalty": "answers",
    "generation.stop": "answers",
    "generation.seed": "answers",
    "generation.ignore_eos": "answers",
    "generation.num_samples": "answers",
    "generation.deterministic": "answers",
    "batch.slots": "operational",
    "batch.cache_tokens": "operational",
    "output.path": "operational",
    "output.local_directory": "operational",
    "output.format": "presentation",
    "output.keep_fields": "presentation",
    "output.summary_line": "presentation",
    "run.time_limit": "operational",
    "run.resume": "operational",
    "run.max_attempts": "operational",
    "run.stall_timeout": "operational",
    "run.save_unfinished": "operational",
    "run.metrics": "operational",
    "run.on_finish": "operational",
}


def fingerprint_fields(spec: JobSpec) -> dict[str, Json]:
    """Every key that must stay as it is while a run is resumed, with its value; equal after a way through JSON.

    A template counts by its text and language, wherever it is kept. NotFoundError if its file cannot be read.
    """
    fields: dict[str, Any] = {key: value_of(spec, key) for key, kind in KEY_CLASSES.items() if kind != "operational"}
    text = spec.input.template_text()
    fields["input.template"] = {"jinja": text} if spec.input.template_is_jinja else text
    return {
        key: list(cast(tuple[Any, ...], value)) if isinstance(value, tuple) else value for key, value in fields.items()
    }


def fingerprint(spec: JobSpec) -> str:
    """SHA-256 (hex) of `fingerprint_fields` as JSON with sorted keys and without spaces."""
    text = json.dumps(fingerprint_fields(spec), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sha256(text.encode()).hexdigest()
