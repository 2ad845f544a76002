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

from pipeline.loading.weight_files import Reader, Wanted, WeightShape
from pipeline.loading.weight_source import Layer, LayerWeights


class ExpertStream:
    """The streamed layers of a model by their place among each other; memory for two of them."""

    def __init__(self) -> None:
        self._layers: list[Layer] = []
        self._free: dict[tuple[WeightShape, WeightShape], list[LayerWeights]] = defaultdict(list)
        self._ahead: dict[int, tuple[LayerWeights, Future[None]]] = {}
        self._reader = Reader(past_cache=True)
        self._turn = ThreadPoolExecutor(1, thread_name_prefix="experts")  # one layer after the other

    def add(self, layer: Layer) -> int:
        """Take on a layer; its place."""
        self._layers.append(layer)
        return len(self._layers) - 1

    def shape(self, place: int) -> tuple[WeightShape, WeightShape]:
        """What the weights of a layer look like."""
        return self._layers[place].shape

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
        shape, wanted = self._layers[place]
        weights = self._free[shape].pop() if self._free[shape] else (shape[0].new(), shape[1].new())
        reading = self._turn.submit(self._read, wanted, weights)
        self._ahead[place] = weights, reading

    def _read(self, wanted: Callable[[LayerWeights], Sequence[Wanted]], weights: LayerWeights) -> None:
        self._reader.read(wanted(weights), lambda _num_bytes: None)

    def _drop_ahead(self) -> None:
        for place, (weights, reading) in self._ahead.items():
            reading.exception()
            self._free[self._layers[place].shape].append(weights)
        self._ahead.clear()
