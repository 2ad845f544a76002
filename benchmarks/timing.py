"""How long a call takes whose data is in no cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

_LEAST_S = 0.4


def median_us(call: Callable[..., object], layers: Sequence[tuple[Any, ...]]) -> float:
    """The median in microseconds of calls with the layers in turn, at least five; together they exceed the caches."""
    took: list[float] = []
    call(*layers[0])
    until = time.perf_counter() + _LEAST_S
    for layer in cycle(layers):
        began = time.perf_counter()
        call(*layer)
        took.append(time.perf_counter() - began)
        if began > until and len(took) >= 5:
            return statistics.median(took) * 1e6
    raise AssertionError("there are no layers")
