"""JobSpec: what the user asked, key by key; frozen, unknown keys refused, and it may still say `auto`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema
from pydantic.fields import FieldInfo

from pipeline.errors import NotFoundError, Problem
from pipeline.remote import is_remote, local_path
from pipeline.spec.units import (
    DURATION_PATTERN,
    MAX_DURATION_S,
    MAX_SIZE_BYTES,
    SIZE_PATTERN,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)


@dataclass(frozen=True, slots=True)
class Wording:
    """How messages name a type that has a notation of its own."""

    noun: str
    such_as: str = ""
    show: Callable[[Any], str] = str  # writes a bound in the type's notation


def _from_text(parse: Callable[[str], float]) -> BeforeValidator:
    return BeforeValidator(lambda value: parse(value) if isinstance(value, str) else value)


def _switch_word(value: object) -> object:
    # Tools that still read YAML 1.1 turn on and off into booleans.
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


Text = Annotated[str, Field(min_length=1)]
Line = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f\x7f]+$"), Wording("one line of text")]
FilePath = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$"), Wording("a path")]
Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Size = Annotated[
    int,
    Field(ge=1, le=MAX_SIZE_BYTES),
    _from_text(parse_size),
    PlainSerializer(format_size, return_type=str, when_used="json"),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": SIZE_PATTERN}]}),
    Wording("a size", such_as="14GiB or 500MB", show=format_size),
]
_DURATION = (
    _from_text(parse_duration),
    PlainSerializer(format_duration, return_type=str, when_used="json"),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": DURATION_PATTERN}]}),
    Wording("a duration", such_as="90s, 30m or 3h", show=format_duration),
)
Delay = Annotated[float, Field(ge=0, le=MAX_DURATION_S), *_DURATION]
Duration = Annotated[float, Field(gt=0, le=MAX_DURATION_S), *_DURATION]
Switch = Annotated[
    Literal["auto", "on", "off"],
    BeforeValidator(_switch_word),
    WithJsonSchema({"enum": ["auto", "on", "off", True, False]}),
]
Paths = Annotated[
    tuple[FilePath, ...],
    Field(min_length=1, strict=False),
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
            ]
        }
    ),
    Wording("a file, a glob or a list of these"),
]
Texts = Annotated[tuple[Text, ...], Field(strict=False)]


class Section(BaseModel):
    """A group of keys; values keep the type they were written in, nothing is converted by guess."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),  # a section may be called `model`
        defer_build=True,  # commands that only print help need no validators
    )


class EchoSpec(Section):
    """How a rehearsal with the echo engine misbehaves."""

    delay: Delay = Field(default=0.0, description="Time that each answer takes.")
    fail_every: Count | None = Field(default=None, description="Answer every N-th item with an error.")
    crash_at: Index | None = Field(default=None, description="Kill the process at the item of this index.")
    oom_at: Index | None = Field(default=None, description="Run out of memory at the item of this index.")
    hang_at: Index | None = Field(default=None, description="Never return from the item of this index.")


class ModelSpec(Section):
    """Which model, and where its parts go."""

    path: FilePath | None = Field(
        default=None,
        description="`builtin:NAME` (such as builtin:smollm2-135m), a local directory or a hub id. "
        "Only engine echo does without.",
    )
    revision: Line | None = Field(
        default=None, description="Branch, tag or commit of a hub id; null is its main branch."
    )
    load_strategy: Literal["no-gpu", "min-gpu", "max-gpu"] = Field(
        default="min-gpu",
        description="no-gpu: all in host memory. min-gpu: everything but routed experts on the GPU. "
        "max-gpu: as many whole layers on the GPUs as fit.",
    )
    gpu_memory: Size | None = Field(
        default=None, description="Most memory of each GPU to use; null: what is free, less a reserve."
    )
    cpu_memory: Size | None = Field(
        default=None, description="Most host memory to use; null: what is free, less a reserve."
    )
    engine: Literal["auto", "transformers", "echo"] = Field(
        default="auto", description="What generates; echo needs no model and answers with the prompt, for rehearsals."
    )
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with the model.")
    strict: bool = Field(
        default=False,
        description="Refuse instead of falling back: no GPU for min-gpu, or a checkpoint that loads slowly.",
    )
    activation: Literal["exact", "int8"] = Field(
        default="exact", description="int8 quantizes activations on the CPU too: faster, and it changes answers."
    )
    repack_cache: Annotated[FilePath, BeforeValidator(lambda value: "off" if value is False else value)] = Field(
        default="auto",
        description="Where weights repacked for the fast kernels are kept: auto (the user's cache directory), off, "
        "or a directory.",
        json_schema_extra={"type": ["string", "boolean"], "not": {"const": True}},
    )
    echo: EchoSpec = Field(default_factory=EchoSpec, description="Engine echo only: how it misbehaves.")


class ThinkingSpec(Section):
    """Whether the model reasons before it answers."""

    mode: Switch = Field(default="auto", description="auto: what the model's own chat template does.")
    budget: Count | None = Field(
        default=None, description="Most reasoning tokens; at the budget the reasoning is closed and the answer begins."
    )


class TemplateFile(Section):
    """A prompt template kept in a file of its own."""

    file: FilePath = Field(
        description="A UTF-8 file with the template; in Jinja, where its name ends with .jinja, .jinja2 or .j2."
    )


class InputSpec(Section):
    """Where the prompts come from, and how a line becomes one."""

    path: Paths = Field(
        description="A file, a glob, a directory of a data set, or a list of these: JSONL (plain, .gz, .bz2, .xz or "
        ".zst), .parquet or .arrow; s3://, gs://, hf:// or https:// too."
    )
    format: Literal["auto", "prompt", "messages", "openai-batch"] = Field(
        default="auto", description="What a line holds; auto decides line by line."
    )
    prompt_field: Text = Field(default="prompt", description="Field of a line that holds its prompt.")
    messages_field: Text = Field(default="messages", description="Field of a line that holds its list of messages.")
    id_field: Text = Field(default="id", description="Field of a line that is copied to the answer's id.")
    template: Text | TemplateFile | None = Field(
        default=None,
        description="Makes the prompt from the line's fields: a text such as 'Summarise: {text}', or {file: PATH}, "
        "in Jinja where PATH ends with .jinja; null takes prompt_field as it is.",
    )
    system: str | None = Field(default=None, description="System message put before each prompt; null adds none.")
    chat_template: Switch = Field(
        default="auto",
        description="auto applies the model's chat template if it has one; off gives it the bare prompt.",
    )
    over_length: Literal["error", "truncate-start", "truncate-end"] = Field(
        default="error", description="What becomes of a prompt that leaves no room for an answer."
    )
    max_line: Size = Field(default=64 * 2**20, description="A longer line is answered with an error.")
    max_bytes: Size | None = Field(
        default=None, description="Most decompressed input; beyond it the job is refused. Guards against gzip bombs."
    )
    allow_control_tokens: bool = Field(
        default=False, description="Let text that spells a control token (such as <|im_end|>) become one."
    )

    @property
    def template_is_jinja(self) -> bool:
        """Whether the template is written in Jinja: its file's name says so."""
        return isinstance(self.template, TemplateFile) and self.template.file.endswith((".jinja", ".jinja2", ".j2"))

    def template_text(self) -> str | None:
        """The template, read from its file where it has one; NotFoundError if that cannot be read as UTF-8."""
        if not isinstance(self.template, TemplateFile):
            return self.template
        try:
            return Path(self.template.file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise NotFoundError(Problem(f"cannot read: {reason}", self.template.file, field="input.template")) from None


class Sampling(Section):
    """How one answer is generated: what the job sets for all lines and a line may set for itself."""

    max_new_tokens: Count = Field(default=256, description="Most tokens of an answer, reasoning included.")
    temperature: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="0 takes the likeliest token each time."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="Sample from the likeliest tokens that together have this probability; 1 is off."
    )
    top_k: Index = Field(default=0, description="Sample from this many of the likeliest tokens; 0 is off.")
    min_p: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="Drop tokens less likely than this share of the likeliest one; 0 is off."
    )
    repetition_penalty: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="Above 1 makes tokens that already occurred less likely; 1 is off."
    )
    stop: Texts = Field(
        default=(), description="Texts that end the answer and are cut from it; not applied to reasoning."
    )
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = Field(
        default=0, description="With the item's index and sample it fixes the item's random stream."
    )
    ignore_eos: bool = Field(
        default=False, description="Go on to max_new_tokens whatever the model says; for benchmarks."
    )


class LineGeneration(Sampling):
    """The `generation` field of an input line: overrides the job's for that line."""

    system: str | None = None


class GenerationSpec(Sampling):
    """How answers are generated; a line may override the keys under its own `generation` field."""

    num_samples: Count = Field(default=1, description="Answers to each line, each with a random stream of its own.")
    deterministic: bool = Field(
        default=False,
        description="Bitwise the same answers whatever the batch, the order or an interruption; slow for long prompts.",
    )


class BatchSpec(Section):
    """How much is worked on at once; changes speed and memory, not answers."""

    slots: Literal["auto"] | Count = Field(
        default="auto",
        description="Sequences decoded together. auto: as many as memory holds and help, by steps timed when a run "
        "begins.",
    )
    cache_tokens: Literal["auto"] | Count = Field(default="auto", description="Total tokens of context held at once.")


class OutputSpec(Section):
    """Where the answers go and what a line of them holds."""

    path: FilePath = Field(
        description="The file to publish: JSONL, compressed if it ends with .gz, .bz2, .xz or .zst, or .parquet. The "
        "files of the run stand beside it; if it is elsewhere (s3://, gs://, hf://), in local_directory."
    )
    local_directory: FilePath = Field(
        default="runs", description="Where the files of the run are kept if path is elsewhere, such as s3://..."
    )
    format: Literal["native", "openai-batch"] = Field(default="native", description="Shape of a line.")
    keep_fields: Literal["all", "none"] | Texts = Field(
        default="all", description="Which fields of the input line its answer repeats: all, none, or a list of names."
    )
    summary_line: bool = Field(default=True, description="End the file with the throughput summary.")

    @property
    def file(self) -> Path:
        """Where this machine has the output: `path`, or a path made of it in `local_directory`."""
        return Path(self.local_directory) / local_path(self.path) if is_remote(self.path) else Path(self.path)


class RunSpec(Section):
    """How long the run may take and how it deals with trouble."""

    time_limit: Duration | None = Field(
        default=None, description="Stop in good order after this time, with exit code 75."
    )
    resume: Literal["if-unchanged", "always", "never"] = Field(
        default="if-unchanged",
        description="if-unchanged: go on unless something that changes answers has changed. always: also if the "
        "input only grew at its end. never: refuse the files of an earlier run.",
    )
    max_attempts: Count = Field(
        default=3,
        description="An item that kills the process this often, and once alone, is answered with an error.",
    )
    stall_timeout: Duration = Field(default=1800.0, description="Give up when nothing has moved for this long.")
    save_unfinished: Duration = Field(
        default=60.0,
        description="How often the tokens of unfinished answers are saved, so that long answers survive a stop.",
    )
    metrics: FilePath | None = Field(
        default=None,
        description="Keep a Prometheus textfile here (PATH.prom); a shard adds its number before the suffix.",
    )
    on_finish: Annotated[tuple[Text, ...], Field(min_length=1, strict=False)] | None = Field(
        default=None,
        description="Command to start when the run has ended, stopped or failed: a list of the program and its "
        "arguments, no shell; OVERNIGHT_EXIT_CODE, _OUTPUT, _SUMMARY, _MESSAGE and others are in its environment.",
    )


class JobSpec(Section):
    """One run of `overnight`: which model answers which prompts, how, and where the answers go."""

    name: Line = Field(default="job", description="Name of the job in summaries; left out, the job file's name.")
    model: ModelSpec = Field(default_factory=ModelSpec)
    thinking: ThinkingSpec = Field(default_factory=ThinkingSpec)
    input: InputSpec
    generation: GenerationSpec = Field(default_factory=GenerationSpec)
    batch: BatchSpec = Field(default_factory=BatchSpec)
    output: OutputSpec
    run: RunSpec = Field(default_factory=RunSpec)


@cache
def job_sections() -> Mapping[str, type[Section]]:
    """Every section of the job file by its dotted name, in the order of the file; "" is the file itself."""
    return dict(_sections_under(JobSpec, ""))


def _sections_under(section: type[Section], name: str) -> Iterator[tuple[str, type[Section]]]:
    yield name, section
    for part, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _sections_under(field.annotation, f"{name}.{part}".lstrip("."))


@cache
def job_keys() -> Mapping[str, FieldInfo]:
    """Every key of the job file that takes a value, dotted as in `--set`, in the order of the file."""
    sections = job_sections()
    fields = {
        f"{name}.{part}".lstrip("."): field
        for name, section in sections.items()
        for part, field in section.model_fields.items()
    }
    return {key: field for key, field in fields.items() if key not in sections}


def value_of(spec: JobSpec, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = spec
    for name in key.split("."):
        value = getattr(value, name)
    return value
