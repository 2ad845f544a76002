"""Generates with transformers' own `generate`, in batches of 16 lines in file order: what `bench` compares with."""
# pyright: basic

from __future__ import annotations

import itertools
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.engines.reply import Reply
from pipeline.engines.vocabulary import pad_id_of, vocabulary_of
from pipeline.errors import Problem, SpecError
from pipeline.records import Completion, Request, Timing, Unfinished

if TYPE_CHECKING:
    import torch

    from pipeline.prompting.encoder import ThinkingTags

BATCH_SIZE = 16


class StockEngine:
    """Greedy only: what `generate` samples depends on the neighbours, so there would be nothing to compare.

    A batch goes on until its longest row has all its tokens, as `generate` does; each row is then cut to its own end.
    """

    slots = BATCH_SIZE
    out_of_memory_events = 0  # it raises

    def __init__(self, model: torch.nn.Module, tokenizer: Any, thinking: ThinkingTags | None) -> None:
        self._model: Any = model
        self._vocabulary = vocabulary_of(model, tokenizer, thinking)
        self._pad_id = pad_id_of(tokenizer, self._vocabulary)

    def generate(self, requests: Iterator[Request]) -> Generator[Completion | None]:
        while batch := list(itertools.islice(requests, BATCH_SIZE)):
            started_at, began = time.time(), time.perf_counter()
            rows = self._generate(batch)
            timing = Timing(started_at, 0.0, 0.0, time.perf_counter() - began)
            for request, tokens in zip(batch, rows, strict=True):
                reply = Reply(request, self._vocabulary)
                for token in tokens:
                    reply.push(token)
                yield reply.completion(timing)

    def unfinished(self) -> Sequence[Unfinished]:
        return []

    def close(self) -> None:
        del self._model

    def _generate(self, batch: Sequence[Request]) -> list[list[int]]:
        """The new tokens of each row, with whatever follows its end."""
        import torch

        longest = max(len(request.token_ids) for request in batch)
        input_ids = torch.full((len(batch), longest), self._pad_id)
        mask = torch.zeros((len(batch), longest), dtype=torch.int64)
        for row, request in enumerate(batch):
            input_ids[row, longest - len(request.token_ids) :] = torch.tensor(request.token_ids)
            mask[row, longest - len(request.token_ids) :] = 1
        ends = None if any(request.settings.ignore_eos for request in batch) else sorted(self._vocabulary.end_ids)
        device = self._model.get_input_embeddings().weight.device
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=input_ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max(request.settings.max_new_tokens for request in batch),
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=self._pad_id,
            )
        return output[:, longest:].tolist()


def check_greedy(requests: Iterable[Request]) -> None:
    """Raises SpecError naming each line that asks for what `generate` cannot do for a row of a batch."""
    problems = [
        Problem(
            "is not greedy, and the stock baseline is: it has one temperature for all, no repetition_penalty and "
            "no thinking budget for each row; bench such lines without a baseline",
            item.file,
            line=item.line,
        )
        for item in {request.item.index: request.item for request in requests if not _is_greedy(request)}.values()
    ]
    if problems:
        raise SpecError(problems)


def _is_greedy(request: Request) -> bool:
    settings = request.settings
    return settings.temperature == 0 and settings.repetition_penalty == 1 and settings.thinking_budget is None
