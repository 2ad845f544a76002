"""Steps of a GPU in which every sequence takes one token, recorded once for each number of rows and then replayed.

A step of a large model is thousands of small kernels, and starting them one by one from Python takes longer than they
do. A CUDA graph starts them all at once; what changes from step to step lies in a table that is written before.
"""
# pyright: basic

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from pipeline.engines.slot_cache import Span, Step

if TYPE_CHECKING:
    import torch

# Rows that are computed for nobody cost less than a recording of every number of rows would.
_SIZES = (1, 2, 4, 8, *range(16, 257, 16))

Run = Callable[["torch.Tensor", "torch.Tensor", Step], "torch.Tensor"]


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    table: torch.Tensor  # int64 [4, rows]: token, start, length with it, slot
    scores: torch.Tensor  # [rows, vocabulary]


class RecordedSteps:
    """`run` computes the scores [rows, vocabulary] after token ids [rows] at positions [rows] in a step."""

    def __init__(self, run: Run, device: torch.device) -> None:
        import torch

        self._run = run
        self._device = device
        self._aside = torch.cuda.Stream(device)
        self._recordings: dict[int, _Recording] = {}
        self._can_record = True

    def forget(self) -> None:
        """What was recorded reads and writes memory that is to be given up."""
        self._recordings = {}

    def scores(self, token_ids: Sequence[int], decoding: Sequence[Span], spare: Span) -> torch.Tensor | None:
        """Scores [rows, vocabulary] of the tokens after these, valid until the next call.

        `spare` is the place of rows that are nobody's. None where so many rows, or this model, cannot be recorded.
        """
        size = next((size for size in _SIZES if size >= len(token_ids)), None)
        if size is None or not self._can_record:
            return None
        num_spare = size - len(token_ids)
        if size not in self._recordings:
            try:
                self._recordings[size] = self._record(_table([0] * size, [spare] * size).to(self._device))
            except Exception:  # noqa: BLE001 - a model may do what cannot be recorded; it is computed as it is
                self._can_record = False
                self.forget()
                return None
        recording = self._recordings[size]
        recording.table.copy_(_table([*token_ids, *[0] * num_spare], [*decoding, *[spare] * num_spare]))
        recording.graph.replay()
        return recording.scores[: len(token_ids)]

    def _record(self, table: torch.Tensor) -> _Recording:
        """Rows of nobody alone: what is computed before a recording must not move anybody's state on."""
        import torch

        def run() -> torch.Tensor:
            token_ids, starts, lengths, slots = table
            return self._run(token_ids, lengths - 1, Step.of_single_tokens(starts, lengths, slots))

        # What is compiled, allocated for good or chosen at first use is so before.
        self._aside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._aside):
            run()
        torch.cuda.current_stream(self._device).wait_stream(self._aside)
        graph = torch.cuda.CUDAGraph()
        shared = next((one.graph.pool() for one in self._recordings.values()), None)
        # torch's own choice is a stream of the first GPU, which need not be the model's.
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=shared, stream=self._aside):
            scores = run()
        return _Recording(graph, table, scores)


def can_record(model: torch.nn.Module, device: torch.device) -> bool:
    """Whether all that a step of the model does is done in the order of one GPU's stream, which a recording replays.

    Not where experts lie in host memory or on another GPU, or are read from disk: these compute in an order of theirs.
    """
    if device.type != "cuda" or any(hasattr(module, "reads_for_every_pass") for module in model.modules()):
        return False
    return all(tensor.device == device for tensor in chain(model.parameters(), model.buffers()))


def _table(token_ids: Sequence[int], spans: Sequence[Span]) -> torch.Tensor:
    import torch

    columns = [
        (token, span.start, span.num_before + 1, span.slot) for token, span in zip(token_ids, spans, strict=True)
    ]
    return torch.tensor(columns, dtype=torch.int64).T.contiguous()
