"""Compares a model's scores of a few prompts in one batch with those of each prompt alone."""
# pyright: basic

from __future__ import annotations

from collections.abc import Sequence

from pipeline.engines.batch import Batch, CausalModel

TEXT = "The quick brown fox jumps over the lazy dog, and then it asks: what is the capital of France, and why?"
_NUM_STEPS = 1


def difference_by_batch(model: CausalModel, token_ids: Sequence[int], pad_id: int) -> tuple[float, float]:
    """The largest difference between scores in a batch and alone, and the most that rounding explains.

    Both are parts of the scores' own spread: root mean squares over the vocabulary, divided by the standard
    deviation. The prompts are `token_ids` and their beginning; compared are the scores of the first token of each
    answer and of the next, in which the cache takes part.
    """
    import torch

    prompts = [token_ids[: max(1, len(token_ids) // 6)], token_ids]
    largest = torch.zeros(())
    with torch.inference_mode():
        together = Batch(model, prompts, _NUM_STEPS, pad_id)
        apart = [Batch(model, [prompt], _NUM_STEPS, pad_id) for prompt in prompts]
        scores, alone = together.prefill(), torch.cat([batch.prefill() for batch in apart])
        rounding = max(0.01, 32 * torch.finfo(scores.dtype).eps)
        for step in range(_NUM_STEPS + 1):
            error = (scores.float() - alone.float()).square().mean(dim=-1).sqrt() / alone.float().std(dim=-1)
            largest = torch.maximum(largest, error.max().cpu())  # NaN is kept
            if step < _NUM_STEPS:
                tokens = alone.argmax(dim=-1).to(model.device)
                scores = together.step(tokens)
                alone = torch.cat([batch.step(token) for batch, token in zip(apart, tokens.split(1), strict=True)])
    return largest.item(), rounding
