"""Chooses the next token of every row of a batch, each by its own settings and its own random stream.

The filters and their order (repetition penalty, temperature, top-k, top-p, min-p) are those of transformers'
`GenerationMixin._get_logits_processor`, computed for all rows at once though every setting may differ. A row's draw
depends on its scores, its settings and (seed, index, sample, step) alone: no generator is shared between rows.
"""
# pyright: basic

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

from pipeline.kernels import rowwise
from pipeline.records import Settings

if TYPE_CHECKING:
    import torch

_FIRST_CANDIDATES = 256  # a nucleus is nearly always smaller; where it is not, the search widens


def stream_key(seed: int, index: int, sample: int) -> int:
    """The identity of one answer's random stream, as a signed 64-bit number."""
    identity = f"{seed}/{index}/{sample}".encode()
    return int.from_bytes(blake2b(identity, digest_size=8).digest(), "little", signed=True)


def uniform(keys: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """The numbers that the streams `keys` give at `steps` (both int64, one shape), as float64 strictly within (0, 1).

    Counter-based: the number of a step is computed from the step, not from the numbers before it. The mixer is the
    finalizer of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"), applied to the
    counter and again to counter and key. 52 of its bits and a half are exact in float64, so neither 0 nor 1 appears.
    """
    bits = _mix(keys ^ _mix((steps + 1) * _signed(0x9E3779B97F4A7C15)))
    return (_shift_right(bits, 12).double() + 0.5) * 2.0**-52


def nucleus_weights(
    scores: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """What is left of each row's distribution after temperature, top-k, top-p and min-p.

    `scores` is [rows, vocabulary] with finite maxima; the settings are float64 [rows] (temperature above 0; top-k 0,
    top-p 1 and min-p 0 are off). Returns float64 [rows, vocabulary] weights, not normalized, 1 for the best token. A
    filter is a least weight, so that tokens of equal score are kept or dropped together.
    """
    best = scores.amax(dim=-1, keepdim=True)
    # float64: the last bit of a sum, which may depend on the shape of the batch, then practically never turns a draw.
    weights = (scores - best).double().div_(temperature[:, None]).exp_()
    least = min_p[:, None]
    if bool(((top_k > 0) | (top_p < 1)).any()):
        least = least.maximum(_least_in_nucleus(weights, top_k[:, None].long(), top_p[:, None]))
    return weights.mul_(weights >= least)


def _least_in_nucleus(weights: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The smallest weight [rows, 1] among each row's top-k and, of those, the fewest that sum to at least top-p."""
    vocabulary = weights.shape[-1]
    top_k = top_k.clamp(max=vocabulary)
    num_candidates = min(vocabulary, max(int(top_k.max()), _FIRST_CANDIDATES))
    while True:
        candidates = weights.topk(num_candidates, dim=-1).values
        least = candidates.gather(-1, (top_k - 1).clamp(min=0)).where(top_k > 0, 0.0)
        # A candidate is in the nucleus when those before it do not yet sum to top-p.
        wanted = top_p * (weights * (weights >= least)).sum(dim=-1, keepdim=True)
        sums = candidates.cumsum(dim=-1)
        covered = (sums[:, -1:] >= wanted) | (candidates[:, -1:] <= least) | (top_p >= 1)
        if num_candidates == vocabulary or bool(covered.all()):
            break
        num_candidates = min(vocabulary, num_candidates * 8)
    size = ((sums - candidates < wanted) & (candidates >= least)).sum(dim=-1, keepdim=True)
    return candidates.gather(-1, (size - 1).clamp(min=0)).where(top_p < 1, least)


def draw(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """One token [rows] by inverse CDF from float64 weights [rows, vocabulary] and uniforms [rows] within (0, 1).

    A token of weight 0 is never drawn: the CDF is flat there and the search takes the first place that reaches.
    """
    import torch

    sums = weights.cumsum(dim=-1)
    return torch.searchsorted(sums, uniforms[:, None] * sums[:, -1:]).squeeze(-1)


def penalize_repetition(scores: torch.Tensor, seen: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """Scores [rows, vocabulary] of the tokens seen (bool, same shape) lowered by each row's penalty [rows].

    As `RepetitionPenaltyLogitsProcessor` of transformers (Keskar et al. 2019, CTRL): a positive score is divided, a
    negative one multiplied.
    """
    import torch

    penalty = penalty[:, None].to(scores.dtype)
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def best_tokens(scores: torch.Tensor) -> torch.Tensor:
    """The first of the best tokens of each row [rows, vocabulary], int64; -1 where none is a finite number."""
    import torch

    if rowwise.available(scores):
        return rowwise.best(scores)
    best = scores.max(dim=-1)
    return torch.where(torch.isfinite(best.values), best.indices, -1)


class Sampler:
    """The settings, random streams and histories of a fixed number of rows; a row may be assigned anew at any time."""

    def __init__(self, num_rows: int, vocabulary: int, device: torch.device | str = "cpu") -> None:
        import torch

        self._settings = [Settings()] * num_rows
        # temperature, top_k, top_p, min_p, repetition_penalty: one transfer a row, and float64 holds all exactly
        self._numbers = torch.tensor([_numbers(Settings())] * num_rows, dtype=torch.float64, device=device)
        self._keys = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._steps = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._seen: torch.Tensor | None = None  # [rows, vocabulary], made for the first row with a penalty
        self._vocabulary = vocabulary
        self._samples = False
        self._penalizes = False

    def assign(self, row: int, settings: Settings, key: int, prompt: Sequence[int], generated: Sequence[int]) -> None:
        """Give a row to an answer: its settings, its stream, its prompt and what it has generated already."""
        import torch

        self._settings[row] = settings
        self._samples = any(settings.temperature > 0 for settings in self._settings)
        self._penalizes = any(settings.repetition_penalty != 1 for settings in self._settings)
        self._numbers[row] = torch.tensor(_numbers(settings), dtype=torch.float64)
        self._keys[row] = key
        self._steps[row] = len(generated)
        if self._penalizes and self._seen is None:
            shape = (len(self._settings), self._vocabulary)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self._keys.device)
        if self._seen is not None:
            self._seen[row] = False
            self._seen[row, torch.tensor([*prompt, *generated], device=self._seen.device)] = True

    def next_tokens(self, logits: torch.Tensor, rows: torch.Tensor, forced: torch.Tensor | None = None) -> torch.Tensor:
        """The next token of each of `rows` (int64 [n]) from their logits [n, vocabulary]: int64 [n].

        Each of these rows moves on by one step. `forced` (int64 [n]) names tokens to take instead, -1 for none.
        -1 in the result: the scores of this row are not finite numbers, so there is nothing to choose from.
        """
        import torch

        temperature, top_k, top_p, min_p, penalty = self._numbers[rows].unbind(dim=-1)
        scores = logits
        if self._penalizes and self._seen is not None:
            scores = penalize_repetition(scores.float(), self._seen[rows], penalty)
        tokens = best_tokens(scores)
        if self._samples:
            drawing = ((temperature > 0) & (tokens >= 0)).nonzero().squeeze(1)  # greedy rows have theirs
            if len(drawing):
                settings = (setting[drawing] for setting in (temperature, top_k, top_p, min_p))
                # In float32, as transformers does before its processors.
                weights = nucleus_weights(scores[drawing].float(), *settings)
                own = rows[drawing]
                tokens[drawing] = draw(weights, uniform(self._keys[own], self._steps[own]))
        if forced is not None:
            tokens = torch.where(forced >= 0, forced, tokens)
        self._steps[rows] += 1
        if self._seen is not None:
            self._seen[rows, tokens.clamp(min=0)] = True
        return tokens


def _numbers(settings: Settings) -> list[float]:
    return [
        settings.temperature,
        settings.top_k,
        settings.top_p,
        settings.min_p,
        settings.repetition_penalty,
    ]


def _signed(word: int) -> int:
    """The 64-bit word as torch, which has no unsigned arithmetic, holds it."""
    return word - 2**64 if word >= 2**63 else word


def _shift_right(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift: torch's own repeats the sign."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _mix(words: torch.Tensor) -> torch.Tensor:
    words = (words ^ _shift_right(words, 30)) * _signed(0xBF58476D1CE4E5B9)
    words = (words ^ _shift_right(words, 27)) * _signed(0x94D049BB133111EB)
    return words ^ _shift_right(words, 31)
