"""Compares a model's scores of a few prompts computed together with those of each prompt alone."""
# pyright: basic

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.engines.batch import Batch, CausalModel
from pipeline.engines.packed_model import PackedModel
from pipeline.engines.slot_cache import Span

if TYPE_CHECKING:
    import torch

TEXT = "The quick brown fox jumps over the lazy dog, and then it asks: what is the capital of France, and why?"
_NUM_STEPS = 1


def difference_by_batch(model: CausalModel, token_ids: Sequence[int], pad_id: int) -> tuple[float, float]:
    """The largest difference between scores in a padded batch and alone, and the most that rounding explains.

    Both are parts of the scores' own spread: root mean squares over the vocabulary, divided by the standard
    deviation. The prompts are `token_ids` and their beginning; compared are the scores of the first token of each
    answer and of the next, in which the cache takes part.
    """
    import torch

    prompts = _prompts(token_ids)
    largest = torch.zeros(())
    with torch.inference_mode():
        together = Batch(model, prompts, _NUM_STEPS, pad_id)
        apart = [Batch(model, [prompt], _NUM_STEPS, pad_id) for prompt in prompts]
        scores, alone = together.prefill(), torch.cat([batch.prefill() for batch in apart])
        for step in range(_NUM_STEPS + 1):
            largest = torch.maximum(largest, _difference(scores, alone))
            if step < _NUM_STEPS:
                tokens = alone.argmax(dim=-1).to(model.device)
                scores = together.step(tokens)
                alone = torch.cat([batch.step(token) for batch, token in zip(apart, tokens.split(1), strict=True)])
    return largest.item(), _rounding(scores)


def difference_by_packing(model: Any, packed: PackedModel, token_ids: Sequence[int]) -> tuple[float, float]:
    """The same for packed steps, compared with the model's own forward over each whole prompt.

    The longer prompt is computed in two parts, the second beside the shorter prompt's first token of an answer. Two
    passes of the model's own and three packed ones: with experts on disk a pass takes minutes (see `CHECK_PASSES`).
    """
    import torch

    short, long = _prompts(token_ids)
    half = len(long) // 2
    packed.resize(len(short) + len(long) + 2)

    def span(slot: int, first: int, num_tokens: int, num_before: int) -> Span:
        return Span(slot, first, num_tokens, slot * (len(short) + 1), num_before)

    def forward(tokens: Sequence[int], decoding: list[Span], prefill: list[Span]) -> Any:
        """Scores after each sequence's last token; a copy, for what a GPU gives is valid until the next step."""
        ends = [one.first + one.num_tokens - 1 for one in (*decoding, *prefill)]
        return packed.forward(tokens, decoding, prefill, ends).clone()

    def alone(tokens: Sequence[int]) -> Any:
        return model(input_ids=torch.tensor([tokens], device=packed.device), use_cache=False).logits[0, -2:]

    first, second = token_ids[-1], token_ids[0]  # of the answers; any tokens do
    with torch.inference_mode():
        wanted = torch.stack([alone([*short, first]), alone([*long, second])], dim=1).flatten(0, 1)
        begun = forward(
            [*short, *long[:half]],
            [],
            [span(0, 0, len(short), 0), span(1, len(short), half, 0)],
        )
        mixed = forward(
            [first, *long[half:]],
            [span(0, 0, 1, len(short))],
            [span(1, 1, len(long) - half, half)],
        )
        decoded = forward([second], [span(1, 0, 1, len(long))], [])
        found = torch.cat([begun[:1], mixed[1:], mixed[:1], decoded])
    return _difference(found, wanted).item(), _rounding(found)


def same_bits(packed: PackedModel, token_ids: Sequence[int]) -> bool:
    """Whether the scores after each token of a prompt are the same numbers, however it is computed.

    Whole and alone; in another slot, in parts of odd sizes beside other prompts; and its last tokens one by one.
    """
    import torch

    short, long = _prompts(token_ids)
    cut, single = len(long) // 3 | 1, max(1, len(long) - 3)
    rooms = 0, len(long), 2 * len(long)
    packed.resize(3 * len(long))

    def forward(*spans: tuple[int, int, Sequence[int], int, int]) -> Any:
        """Scores after all tokens of the last of these: slot, room, prompt, first token and the one after the last."""
        token_ids: list[int] = []
        kinds: tuple[list[Span], list[Span]] = [], []  # decoding, prefill
        for slot, room, prompt, begin, end in spans:
            kinds[not (begin and end - begin == 1 and not kinds[1])].append(
                Span(slot, len(token_ids), end - begin, room, begin)
            )
            token_ids += prompt[begin:end]
        num_last = spans[-1][4] - spans[-1][3]
        wanted = range(len(token_ids) - num_last, len(token_ids))
        return packed.forward(token_ids, *kinds, wanted).clone()

    with torch.inference_mode():
        whole = forward((0, rooms[0], long, 0, len(long)))
        forward((0, rooms[1], short, 0, len(short) - 1))
        parts = [
            forward((0, rooms[1], short, len(short) - 1, len(short)), (1, rooms[2], long, 0, cut)),
            forward((0, rooms[0], long[::-1], 0, 2), (1, rooms[2], long, cut, single)),
            *(forward((1, rooms[2], long, at, at + 1)) for at in range(single, len(long))),
        ]
    return torch.equal(torch.cat(parts), whole)


def _prompts(token_ids: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    return token_ids[: max(1, len(token_ids) // 6)], token_ids


def _difference(scores: torch.Tensor, alone: torch.Tensor) -> torch.Tensor:
    """The largest over rows of [rows, vocabulary]; NaN is kept."""
    error = (scores.float() - alone.float()).square().mean(dim=-1).sqrt() / alone.float().std(dim=-1)
    return error.max().cpu()


def _rounding(scores: torch.Tensor) -> float:
    import torch

    return max(0.01, 32 * torch.finfo(scores.dtype).eps)
