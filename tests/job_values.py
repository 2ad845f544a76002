"""Values that each key of a job may have, for properties over whole jobs."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from pipeline.spec.keys import JobSpec
from pipeline.spec.units import MAX_DURATION_S, MAX_SIZE_BYTES

# Words that mean something else without quotes, in YAML 1.1 or 1.2.
WORDS = st.sampled_from(
    ["1e5", "0o7", "0x1f", ".5", "5.", "on", "No", "null", "~", "true", "3:00", "=", "- a", "a: b", "*a"]
)
TEXT = WORDS | st.text(min_size=1, max_size=20)
LINE = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20)
PATH = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20)
COUNT = st.integers(1, 2**40)
INDEX = st.integers(0, 2**40)
SIZE = st.integers(1, MAX_SIZE_BYTES)
DURATION = st.floats(0, MAX_DURATION_S, exclude_min=True)
SWITCH = st.sampled_from(["auto", "on", "off"])


def optional(values: SearchStrategy[Any]) -> SearchStrategy[Any]:
    return st.none() | values


VALUES: dict[str, SearchStrategy[Any]] = {
    "name": LINE,
    "model.path": optional(PATH),
    "model.revision": optional(LINE),
    "model.load_strategy": st.sampled_from(["no-gpu", "min-gpu", "max-gpu"]),
    "model.gpu_memory": optional(SIZE),
    "model.cpu_memory": optional(SIZE),
    "model.engine": st.sampled_from(["auto", "transformers", "echo"]),
    "model.trust_remote_code": st.booleans(),
    "model.strict": st.booleans(),
    "model.activation": st.sampled_from(["exact", "int8"]),
    "model.repack_cache": PATH,
    "model.echo.delay": st.floats(0, MAX_DURATION_S),
    "model.echo.fail_every": optional(COUNT),
    "model.echo.crash_at": optional(INDEX),
    "model.echo.oom_at": optional(INDEX),
    "model.echo.hang_at": optional(INDEX),
    "thinking.mode": SWITCH,
    "thinking.budget": optional(COUNT),
    "input.path": st.lists(PATH, min_size=1, max_size=3),
    "input.format": st.sampled_from(["auto", "prompt", "messages", "openai-batch"]),
    "input.prompt_field": TEXT,
    "input.messages_field": TEXT,
    "input.id_field": TEXT,
    "input.template": optional(TEXT),
    "input.system": optional(st.text(max_size=20)),
    "input.chat_template": SWITCH,
    "input.over_length": st.sampled_from(["error", "truncate-start", "truncate-end"]),
    "input.max_line": SIZE,
    "input.max_bytes": optional(SIZE),
    "input.allow_control_tokens": st.booleans(),
    "generation.max_new_tokens": COUNT,
    "generation.temperature": st.floats(0, 1e9),
    "generation.top_p": st.floats(0, 1, exclude_min=True),
    "generation.top_k": INDEX,
    "generation.min_p": st.floats(0, 1),
    "generation.repetition_penalty": st.floats(0, 1e9, exclude_min=True),
    "generation.stop": st.lists(TEXT, max_size=3),
    "generation.seed": st.integers(0, 2**63 - 1),
    "generation.ignore_eos": st.booleans(),
    "generation.num_samples": COUNT,
    "generation.deterministic": st.booleans(),
    "batch.slots": st.just("auto") | COUNT,
    "batch.cache_tokens": st.just("auto") | COUNT,
    "output.path": PATH,
    "output.local_directory": PATH,
    "output.format": st.sampled_from(["native", "openai-batch"]),
    "output.keep_fields": st.sampled_from(["all", "none"]) | st.lists(TEXT, max_size=3),
    "output.summary_line": st.booleans(),
    "run.time_limit": optional(DURATION),
    "run.resume": st.sampled_from(["if-unchanged", "always", "never"]),
    "run.max_attempts": COUNT,
    "run.stall_timeout": DURATION,
    "run.save_unfinished": DURATION,
    "run.metrics": optional(PATH),
    "run.on_finish": optional(st.lists(TEXT, min_size=1, max_size=3)),
}
LEAST: dict[str, Any] = {"model.path": "m", "input.path": ["in.jsonl"], "output.path": "out.jsonl"}


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as sections."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *parents, last = key.split(".")
        section = tree
        for name in parents:
            section = section.setdefault(name, {})
        section[last] = value
    return tree


def job_values() -> SearchStrategy[dict[str, Any]]:
    """Some keys of a job, dotted, with values that are right each by itself."""
    return st.fixed_dictionaries(
        {key: VALUES[key] for key in LEAST}, optional={key: value for key, value in VALUES.items() if key not in LEAST}
    )


def jobs() -> SearchStrategy[JobSpec]:
    """Jobs of any values, also such as contradict each other."""
    return job_values().map(lambda values: JobSpec.model_validate(nested(values)))
