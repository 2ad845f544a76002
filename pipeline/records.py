"""The nouns that flow through the house, Item to Completion, and the Engine that turns requests into completions."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
FinishReason: TypeAlias = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True)
class Item:
    """One non-blank line of the input: its place and what it said."""

    index: int  # position among the non-blank lines of all inputs, from 0: the identity of the item
    file: str  # as the job names it
    line: int  # physical line in that file, from 1
    offset: int  # byte at which the line begins in that file, decompressed
    id: Json = None  # the line's own id, payload only
    fields: Mapping[str, Any] | None = None  # the line as read; None where it could not be read


@dataclass(frozen=True, slots=True)
class ItemError:
    """Why an item has no answer; `type` is a short stable word for programs, `message` is for people."""

    type: str
    message: str
    attempts: int = 1


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Settings:
    """How one answer is generated: the job's `generation`, with the line's own values laid over it."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    ignore_eos: bool = False
    thinking_budget: int | None = None  # most reasoning tokens


@dataclass(frozen=True, slots=True)
class Prompt:
    """A readable line: the text or conversation to answer, and how."""

    item: Item
    content: str | tuple[Message, ...]  # a str is one user turn, or raw text without a chat template
    system: str | None
    settings: Settings
    is_text: bool = False  # raw text that no chat template is applied to, whatever the job says of others
    thinking: Literal["on", "off"] | None = None  # the line's own mode; None: the job's


@dataclass(frozen=True, slots=True)
class Rejection:
    """A line that is answered with an error without reaching the engine."""

    item: Item
    error: ItemError


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt as the engine takes it: token ids and limits, one for each sample."""

    item: Item
    sample: int  # from 0
    token_ids: tuple[int, ...]
    settings: Settings  # max_new_tokens already lowered to the room the model's context leaves
    reasoning_open: bool = False  # the rendered prompt ends inside an open reasoning tag
    generated: tuple[int, ...] = ()  # tokens that an earlier session already generated for this answer


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one answer; `completion_tokens` counts reasoning, answer and stop token, never padding."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time of one answer went, in seconds."""

    started_at: float  # Unix time at which the engine took the request
    queue_s: float  # taken by the engine, not yet computed on
    prefill_s: float
    decode_s: float

    @property
    def time_to_first_token_s(self) -> float:
        return self.queue_s + self.prefill_s

    @property
    def total_s(self) -> float:
        return self.time_to_first_token_s + self.decode_s


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one sample of one item, or the error that is its answer (then text, usage and timing are None)."""

    item: Item
    sample: int
    finish_reason: FinishReason
    text: str | None = None
    reasoning: str | None = None
    usage: Usage | None = None
    timing: Timing | None = None
    error: ItemError | None = None

    @classmethod
    def failed(cls, item: Item, sample: int, error: ItemError) -> Completion:
        """The answer of an item that has none."""
        return cls(item=item, sample=sample, finish_reason="error", error=error)


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check of the doctor found: good, slower than need be, or what keeps a run from its promises."""

    check: str
    level: Literal["good", "warning", "trouble"]
    found: str
    advice: str | None = None  # what to do, and what it would bring


@dataclass(frozen=True, slots=True)
class Unfinished:
    """Tokens so far of an answer in flight, for the journal."""

    index: int
    sample: int
    token_ids: tuple[int, ...]


class Engine(Protocol):
    """One way to generate; owns the model, its device memory and its slots.

    `generate` pulls a request whenever it has room for one and yields each completion the moment it is finished.
    It yields None after a step that finished nothing, so that the loop can commit, save and stop between steps.
    Closing the iterator abandons what is in flight; then `generate` may be called again.
    """

    out_of_memory_events: int  # since the engine was made: each time that memory ran out, whatever came of it

    @property
    def slots(self) -> int:
        """How many sequences it decodes together: all that it can, or as many as it has found to be of use."""
        ...

    def generate(self, requests: Iterator[Request]) -> Generator[Completion | None]: ...

    def unfinished(self) -> Sequence[Unfinished]:
        """Answers in flight with the tokens generated so far; empty where an engine cannot tell."""
        ...

    def close(self) -> None: ...
