"""The table of engines: for each name, how its prompts are encoded and how it is opened."""
# pyright: basic

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from pipeline.plan.plan import Plan
from pipeline.records import Engine, Prompt, Rejection, Request
from pipeline.spec.keys import JobSpec

if TYPE_CHECKING:
    from pipeline.facts.model_facts import ModelFacts
    from pipeline.prompting.encoder import PromptEncoder, ThinkingTags

Report = Callable[[str], None]  # takes a sentence for the user
_Encoding: TypeAlias = "tuple[Callable[[], Any], Callable[[], PromptEncoder]]"

_ECHO_CONTEXT_LENGTH = 1 << 20


class Encoder(Protocol):
    """Prompts to requests and to the text that a model would see; the tokens of an answer to its text."""

    thinking: ThinkingTags | None
    takes_conversations: bool  # False: the model has no chat template, or none is applied

    def encode(self, prompt: Prompt) -> Request | Rejection: ...

    def render(self, prompt: Prompt) -> str | Rejection: ...

    @property
    def decode(self) -> Callable[[Sequence[int]], str]: ...


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """One way to generate. `encoder` is cheap and raises SpecError for what the model cannot do; `open` loads."""

    encoder: Callable[[], Encoder]
    open: Callable[[Report, bool], tuple[Engine, float]]  # shows a bar or not; and the seconds it took to load
    revised: Callable[[Plan], EngineChoice]  # the same for another plan of the job; what is loaded stays


def choose_engine(spec: JobSpec, plan: Plan, facts: ModelFacts | None) -> EngineChoice:
    """The engine that the plan names; only one without a model does without `facts`."""
    if plan.engine == "echo":
        return _echo(spec, plan)
    assert facts is not None
    return _transformers(spec, plan, _encoding(spec, plan, facts.architecture.context_length))


def _echo(spec: JobSpec, plan: Plan) -> EngineChoice:
    from pipeline.engines.echo import EchoEngine, Misbehaviour
    from pipeline.prompting.encoder import BytesEncoder

    echo = spec.model.echo
    misbehaviour = Misbehaviour(echo.delay, echo.fail_every, echo.crash_at, echo.oom_at, echo.hang_at)
    return EngineChoice(
        encoder=lambda: BytesEncoder(context_length=_ECHO_CONTEXT_LENGTH, over_length=spec.input.over_length),
        open=lambda _report, _show_progress: (EchoEngine(slots=plan.slots, misbehaviour=misbehaviour), 0.0),
        revised=lambda other: _echo(spec, other),
    )


def choose_stock_engine(spec: JobSpec, plan: Plan, facts: ModelFacts) -> EngineChoice:
    """Stock transformers for the same plan, to be compared with: its own loading and its own `generate`."""
    tokenizer, encoder = _encoding(spec, plan, facts.architecture.context_length)

    def open_(_report: Report, show_progress: bool) -> tuple[Engine, float]:
        from pipeline.engines.stock import StockEngine
        from pipeline.loading import load_model

        began = time.perf_counter()
        loaded = load_model(replace(plan, weights="stock", plain_kernel=False), show_progress=show_progress)
        return StockEngine(loaded.model, tokenizer(), encoder().thinking), time.perf_counter() - began

    return EngineChoice(encoder, open_, lambda other: choose_stock_engine(spec, other, facts))


def _transformers(spec: JobSpec, plan: Plan, encoding: _Encoding) -> EngineChoice:
    tokenizer, encoder = encoding

    def open_(report: Report, show_progress: bool) -> tuple[Engine, float]:
        from pipeline.engines.memory import keep_freed_memory
        from pipeline.engines.transformers import open_deterministic_engine, open_engine
        from pipeline.loading import load_model

        began = time.perf_counter()
        loaded = load_model(plan, show_progress=show_progress, report=report)
        keep_freed_memory()
        engine = (open_deterministic_engine if spec.generation.deterministic else open_engine)(
            loaded.model,
            tokenizer(),
            thinking=encoder().thinking,
            slots=plan.slots,
            cache_tokens=plan.cache_tokens,
            step_tokens=plan.step_tokens,
            # Where every step reads the disk, more rows always share it.
            sized=spec.batch.slots == "auto" and plan.streaming is None,
            report=report,
        )
        return engine, time.perf_counter() - began

    return EngineChoice(encoder, open_, lambda other: _transformers(spec, other, encoding))


def _encoding(spec: JobSpec, plan: Plan, context_length: int) -> _Encoding:
    """The model's tokenizer and its encoder, each read when it is first asked for."""
    assert plan.model_dir is not None
    model_dir = Path(plan.model_dir)

    @cache
    def tokenizer() -> Any:
        from pipeline.prompting.encoder import load_tokenizer

        return load_tokenizer(model_dir, trust_remote_code=plan.trust_remote_code)

    @cache
    def encoder() -> PromptEncoder:
        from pipeline.prompting.encoder import PromptEncoder

        return PromptEncoder(
            tokenizer(),
            context_length=context_length,
            thinking_mode=spec.thinking.mode,
            chat_template=spec.input.chat_template,
            over_length=spec.input.over_length,
            allow_control_tokens=spec.input.allow_control_tokens,
        )

    return tokenizer, encoder
