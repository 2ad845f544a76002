"""The engine for a model of transformers: slots where its layers can be packed, padded batches where they cannot."""
# pyright: basic

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pipeline.engines.padded import PaddedEngine
from pipeline.engines.slot_cache import NotServedError
from pipeline.engines.slots import SlotEngine
from pipeline.errors import MachineError, Problem, SpecError
from pipeline.kernels import packed, plain
from pipeline.kernels.native import native
from pipeline.loading.quiet import quiet_libraries
from pipeline.plan.streaming import STEP_TOKENS
from pipeline.records import Engine

if TYPE_CHECKING:
    import torch

    from pipeline.prompting.encoder import ThinkingTags

_FIELD = "generation.deterministic"


def open_deterministic_engine(
    model: torch.nn.Module,
    tokenizer: Any,
    *,
    thinking: ThinkingTags | None,
    slots: int,
    cache_tokens: int,
    step_tokens: int = STEP_TOKENS,
    sized: bool = False,
    report: Callable[[str], None],
) -> Engine:
    """The engine whose answers are the same bit by bit whatever the batch, the order, the slots or an interruption.

    Raises SpecError for a model that it cannot promise this for, MachineError where there is no compiler.
    """
    if not plain.is_served():
        why = native(packed.SOURCE).reason
        raise MachineError(Problem(f"needs kernels that are compiled here, and {why}; install gcc", field=_FIELD))
    try:
        engine = SlotEngine(
            model,
            tokenizer,
            thinking=thinking,
            slots=slots,
            cache_tokens=cache_tokens,
            window=slots,
            report=report,
            step_tokens=step_tokens,
            sized=sized,
            deterministic=True,
        )
        with quiet_libraries():
            difference, rounding = engine.self_check()
            why = f"packed, its scores differ from its own by {difference:.0%} of their spread"
            if difference <= rounding:
                if engine.bits_check():
                    return engine
                why = "in a self-check its scores changed with the prompts beside them"
    except NotServedError as error:
        why = str(error)
    except (TypeError, ValueError, RuntimeError) as error:
        why = f"{type(error).__name__}: {error}"
    raise SpecError(Problem(f"cannot be promised for this model ({why}); leave it out", field=_FIELD))


def open_engine(
    model: torch.nn.Module,
    tokenizer: Any,
    *,
    thinking: ThinkingTags | None,
    slots: int,
    cache_tokens: int,
    step_tokens: int = STEP_TOKENS,
    sized: bool = False,
    report: Callable[[str], None],
) -> Engine:
    """The fastest engine that answers as the model itself would, after a check of a few prompts.

    `report` is told why a model is not packed, and of one that answers otherwise in a batch than alone. `sized`: the
    engine finds out how many of the slots are of use, where they are packed.
    """
    try:
        engine = SlotEngine(
            model,
            tokenizer,
            thinking=thinking,
            slots=slots,
            cache_tokens=cache_tokens,
            window=slots,
            report=report,
            step_tokens=step_tokens,
            sized=sized,
        )
        with quiet_libraries():  # a layer says at its first step which of its kernels are not installed
            difference, rounding = engine.self_check()
        if difference <= rounding:
            return engine
        why = f"packed, its scores differ from its own by {difference:.0%} of their spread"
    except NotServedError as error:
        why = str(error)
    except Exception as error:  # noqa: BLE001 - a model may raise anything when it is called in another way
        why = f"{type(error).__name__}: {error}"
    report(f"this model is answered in padded batches, which is slower: it cannot be packed ({why})")
    padded = PaddedEngine(
        model,
        tokenizer,
        thinking=thinking,
        slots=slots,
        cache_tokens=cache_tokens,
        window=4 * slots,
        report=report,
    )
    if slots > 1:
        padded.self_check()
    return padded
