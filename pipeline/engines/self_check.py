"""Compares a model's scores of a few prompts computed together with those of each prompt alone."""
# pyright: basic

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipeline.engines.batch import Batch, CausalModel
from pipeline.engines.packed_model import PackedModel
from pipeline.engines.slot_cache import Span

if TYPE_CHECKING:
    import torch

TEXT = "The quick brown fox jumps over the lazy dog, and then it asks: what is the capital of France, and why?"
_NUM_STEPS = 1
_NUM_COPIES = 6  # the prompt as it is, and with its input moved by rounding
_LEAST_ALLOWED = 0.01
_ROUNDING_FACTOR = 5  # of two samples of the same noise, the one from few copies; more is a fault


def difference_by_batch(model: CausalModel, token_ids: Sequence[int], pad_id: int) -> tuple[float, float]:
    """How far scores in a padded batch are from those alone, and the most that rounding explains.

    Both are parts of the scores' own spread: root mean squares over the vocabulary, divided by the standard
    deviation. The prompts are `token_ids` and their beginning; compared are the scores of the first token of each
    answer and of the next, in which the cache takes part; told are those furthest beyond rounding. What rounding
    explains is measured: how the model's scores move when each number that enters its first layer does by half a
    rounding step. In 16 bits that is 2% for one prompt and 30% for another.
    """
    import torch

    prompts = _prompts(token_ids)
    found, copies = [], []
    with torch.inference_mode():
        together = Batch(model, prompts, _NUM_STEPS, pad_id)
        found.append(together.prefill())
        with _moved_copies(model.embeddings):
            apart = [Batch(model, [prompt] * _NUM_COPIES, _NUM_STEPS, pad_id) for prompt in prompts]
            copies.append(torch.stack([batch.prefill() for batch in apart]))
            for _ in range(_NUM_STEPS):
                tokens = copies[-1][:, 0].argmax(dim=-1)
                copies.append(
                    torch.stack(
                        [batch.step(token.expand(_NUM_COPIES)) for batch, token in zip(apart, tokens, strict=True)]
                    )
                )
        for scores in copies[:-1]:
            found.append(together.step(scores[:, 0].argmax(dim=-1).to(model.device)))
    return _compare(torch.cat(found), torch.cat(copies))


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
        inputs = torch.tensor([tokens] * _NUM_COPIES, device=packed.device)
        return model(input_ids=inputs, use_cache=False).logits[:, -2:].transpose(0, 1)

    first, second = token_ids[-1], token_ids[0]  # of the answers; any tokens do
    with torch.inference_mode():
        with _moved_copies(model.get_input_embeddings()):
            copies = torch.stack([alone([*short, first]), alone([*long, second])], dim=1).flatten(0, 1)
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
    return _compare(found, copies)


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


@contextmanager
def _moved_copies(embeddings: torch.nn.Module) -> Generator[None]:
    """Within this block rows of a batch after the first enter the model with each number half a rounding step off."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def move(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(0, 2, output.shape, generator=generator) * 2 - 1
        signs[0] = 0
        return (output.double() * (1 + signs.to(output.device) * torch.finfo(output.dtype).eps / 2)).to(output.dtype)

    handle = embeddings.register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


def _compare(found: torch.Tensor, copies: torch.Tensor) -> tuple[float, float]:
    """Difference and what is allowed, for the row where one exceeds the other most; a difference of NaN comes first.

    Of scores found [rows, vocabulary] and wanted [rows, copies, vocabulary], the first copy being what is compared.
    """
    import torch

    found, copies = found.float().cpu(), copies.float().cpu()
    wanted = copies[:, 0]
    spread = wanted.std(dim=-1)
    difference = (found - wanted).square().mean(dim=-1).sqrt() / spread
    rounding = (copies[:, 1:] - wanted[:, None]).square().mean(dim=(-2, -1)).sqrt() / spread
    allowed = torch.clamp(_ROUNDING_FACTOR * rounding, min=_LEAST_ALLOWED)
    worst = int((difference / allowed).nan_to_num(torch.inf).argmax())
    return difference[worst].item(), allowed[worst].item()
