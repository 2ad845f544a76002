"""An unmodified transformers model over packed steps: tokens of many sequences in one call, each in its own context."""
# pyright: basic

from __future__ import annotations

import inspect
import itertools
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.engines.fused import Forward, fused_forwards, keep_faithful
from pipeline.engines.recorded_steps import RecordedSteps, can_record
from pipeline.engines.recurrent import RecurrentStates, is_recurrent, packed_forward
from pipeline.engines.row_invariant import row_invariant
from pipeline.engines.slot_cache import NotServedError, SlotCache, Span, Step

if TYPE_CHECKING:
    import torch

_names = itertools.count()


class Place(Protocol):
    """Where a sequence's context lies: its slot, and its room in the cache."""

    slot: int
    start: int


class PackedModel:
    """A model whose attention and recurrent layers ask a slot cache; `close` leaves it as it was.

    Raises NotServedError for a model whose attention cannot be replaced from outside. Whether the rest of it minds
    packing is for a comparison with its own scores to say. `row_by_row`: no token's numbers depend on what else is in
    the step or on how its sequence was cut, bit for bit; NotServedError also for a model that cannot be computed so.
    """

    def __init__(self, model: torch.nn.Module, num_slots: int, *, row_by_row: bool = False) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        self._model: Any = model
        self.vocabulary: int = model.config.get_text_config(decoder=True).vocab_size  # type: ignore
        self.device: torch.device = next(self._model.get_input_embeddings().parameters()).device
        self.cache = SlotCache(row_by_row=row_by_row)
        self._row_by_row = row_by_row
        self._recorded = RecordedSteps(self._compute, self.device) if can_record(model, self.device) else None
        self._spare_slot = num_slots + 1  # of nobody, for recorded steps; the one before it is that of a kept prefix
        self._states = RecurrentStates(num_slots + (1 if self._recorded is None else 2))
        self._recurrent = [module for module in model.modules() if is_recurrent(module)]
        self._fused: dict[torch.nn.Module, Forward] = {}
        self._parameters = inspect.signature(model.forward).parameters
        # Names, because transformers keeps attention functions in a table for the whole process.
        self._attention = f"overnight_slots_{next(_names)}"
        AttentionInterface.register(self._attention, self.cache.attend)
        AttentionMaskInterface.register(self._attention, _no_mask)
        if "position_ids" not in self._parameters:
            raise NotServedError("positions are not an input")

    def fuse(self, token_ids: Sequence[int]) -> None:
        """Compute modules in fewer passes from now on, as far as that gives the same for this prompt."""
        forwards = fused_forwards(self._model, self.cache)
        if not forwards:
            return
        self.resize(len(token_ids))
        prompt = Span(0, 0, len(token_ids), 0, 0)
        self._fused = keep_faithful(forwards, lambda: self.forward(token_ids, [], [prompt], [len(token_ids) - 1]))

    def resize(self, num_tokens: int) -> None:
        """Have room for the context of so many tokens; what was held is lost if that is another number."""
        if num_tokens != self.cache.num_tokens and self._recorded is not None:
            self._recorded.forget()
        self.cache.resize(num_tokens)

    def forward(
        self, token_ids: Sequence[int], decoding: Sequence[Span], prefill: Sequence[Span], wanted: Sequence[int]
    ) -> torch.Tensor:
        """Scores [wanted, vocabulary] of the token after each of the step's tokens that `wanted` names.

        The step's tokens are one of each span that decodes, then those of the others. The scores are valid until the
        next call.
        """
        import torch

        if self._recorded is not None and not prefill:
            spare = Span(self._spare_slot, 0, 1, self.cache.num_tokens, 0)
            scores = self._recorded.scores(token_ids, decoding, spare)
            if scores is not None:
                return scores if len(wanted) == len(token_ids) else scores[[*wanted]]
        spans = [*decoding, *prefill]
        positions = [place for span in spans for place in range(span.num_before, span.num_before + span.num_tokens)]

        def whole_numbers(values: Sequence[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64, device=self.device)

        step = Step.of(decoding, prefill, self.device)
        return self._compute(whole_numbers(token_ids), whole_numbers(positions), step, whole_numbers(wanted))

    def _compute(
        self, token_ids: torch.Tensor, positions: torch.Tensor, step: Step, wanted: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The same of tensors; without `wanted` after every token."""
        inputs = {"input_ids": token_ids[None], "position_ids": positions[None], "use_cache": False}
        trims = wanted is not None and "logits_to_keep" in self._parameters
        if trims:
            inputs["logits_to_keep"] = wanted
        with self._packing(step), self.arithmetic():
            logits = self._model(**inputs).logits[0]
        return logits if trims or wanted is None else logits[wanted]

    def copy(self, source: Place, target: Place, num_tokens: int) -> None:
        """Give one sequence what another knows of its first tokens; of recurrent states, all that it knows."""
        self.cache.copy(source.start, target.start, num_tokens)
        if self._recurrent:
            self._states.copy(source.slot, target.slot)

    def arithmetic(self) -> AbstractContextManager[Any]:
        """How rows of numbers are computed; also for what follows from the scores."""
        return row_invariant() if self._row_by_row else nullcontext()

    @property
    def is_recurrent(self) -> bool:
        """Whether what a slot knows is a state too, of which only the latest exists."""
        return bool(self._recurrent)

    @contextmanager
    def _packing(self, step: Step) -> Generator[None]:
        """Within this block the model's layers ask the cache about this step; outside it is as it was."""
        config = self._model.config
        before, experts_before = config._attn_implementation, getattr(config, "_experts_implementation", None)
        config._attn_implementation = self._attention
        if self._row_by_row and experts_before is not None:
            config._experts_implementation = "eager"  # expert by expert, each a product that we know
        forwards = {module: packed_forward(module, self.cache, self._states) for module in self._recurrent}
        for module, forward in (self._fused | forwards).items():
            vars(module)["forward"] = forward
        self.cache.step = step
        try:
            yield
        finally:
            self.cache.step = None
            config._attn_implementation = before
            if self._row_by_row and experts_before is not None:
                config._experts_implementation = experts_before
            for module in (*self._fused, *self._recurrent):
                vars(module).pop("forward", None)


def _no_mask(*_: Any, **__: Any) -> None:
    return None
