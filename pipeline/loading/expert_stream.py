"""Experts of layers for which memory is too small: read from the model's files for every pass, ahead of need.

A pass takes the layers in order, so while one computes the next is read; the order closes to a ring, for after the last
layer comes the first of the next step.
"""
# pyright: basic

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

from pipeline.kernels.packed import PackedWeight
from pipeline.loading.weight_files import Matrix, WeightShape, read_tensors

LayerWeights: TypeAlias = "tuple[PackedWeight, PackedWeight]"  # gate and up, down


class Layer(NamedTuple):
    """What a layer's experts look like, and where they are read from."""

    shape: tuple[WeightShape, WeightShape]
    matrices: Callable[[LayerWeights], Sequence[Matrix]]


class ExpertStream:
    """The streamed layers of a model by their place among each other; memory for two of them."""

    def __init__(self) -> None:
        self._layers: list[Layer] = []
        self._free: dict[tuple[WeightShape, WeightShape], list[LayerWeights]] = defaultdict(list)
        self._ahead: dict[int, tuple[LayerWeights, Future[None]]] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="experts")

    def add(self, layer: Layer) -> int:
        """Take on a layer; its place."""
        self._layers.append(layer)
        return len(self._layers) - 1

    @contextmanager
    def layer(self, place: int) -> Generator[LayerWeights]:
        """The weights of a layer, valid within the block. Raises NotFoundError for files that cannot be read."""
        if place not in self._ahead:  # the first pass, or one after a pass that was broken off
            self._drop_ahead()
            self._begin(place)
        self._begin((place + 1) % len(self._layers))
        weights, reading = self._ahead.pop(place)
        try:
            reading.result()
            yield weights
        finally:
            reading.exception()  # read or failed, nothing writes into it any more
            self._free[self._layers[place].shape].append(weights)

    def _begin(self, place: int) -> None:
        if place in self._ahead:
            return
        shape, matrices = self._layers[place]
        weights = self._free[shape].pop() if self._free[shape] else (shape[0].new(), shape[1].new())
        reading = self._reader.submit(read_tensors, matrices(weights), _unobserved)
        self._ahead[place] = weights, reading

    def _drop_ahead(self) -> None:
        for place, (weights, reading) in self._ahead.items():
            reading.exception()
            self._free[self._layers[place].shape].append(weights)
        self._ahead.clear()


def _unobserved(_num_bytes: int) -> None:
    pass
