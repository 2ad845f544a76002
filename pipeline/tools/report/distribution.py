"""One distribution as bars on a logarithmic scale, with what matters of it written above them."""
# pyright: basic

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, exp, log
from typing import TYPE_CHECKING, Literal

from pipeline.forecast.forecast import show_duration
from pipeline.summary import BUCKET_RATIO, Histogram
from pipeline.tools.report.drawing import name_panel
from pipeline.tools.report.palette import Palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_BARS = 32
_LEAST_BUCKETS = 40  # of two percent: a factor of a little more than two


@dataclass(frozen=True, slots=True)
class Distribution:
    """What a panel shows: seconds (`unit` s) or tokens."""

    name: str
    histogram: Histogram
    unit: Literal["s", "tokens"]
    greatest: float | None = None  # exactly, where it is known: quantiles of a histogram are within a percent

    def draw(self, axes: Axes, palette: Palette) -> None:
        """Bars of equal width on a logarithmic scale; median and 99th percentile are written above them."""
        name_panel(axes, palette, self.name)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False)
        values = [(value, count) for value, count in self.histogram.values() if value > 1e-6]
        if not values:
            axes.set_xticks([])
            said = "all zero" if self.histogram.count else "nothing measured"
            axes.text(0.5, 0.4, said, transform=axes.transAxes, ha="center", color=palette.muted)
            return
        edges, counts = self._bars(values)
        axes.set_xscale("log")
        axes.stairs(counts, edges, fill=True, color=palette.soft)
        axes.stairs(counts, edges, color=palette.accent, linewidth=1.4)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(0, max(counts) * 1.38)
        self._draw_quantiles(axes, palette, edges[0], edges[-1])
        ticks = _log_ticks(edges[0], edges[-1])
        axes.set_xticks(ticks, [_amount(tick, self.unit) for tick in ticks])
        axes.set_xticks([], minor=True)

    def _bars(self, values: list[tuple[float, int]]) -> tuple[list[float], list[int]]:
        """Edges and counts: each bar is the same number of the histogram's buckets, so that none gets more by chance.

        No bar is narrower than a token, and values that hardly differ are not drawn as if they did.
        """
        step = log(BUCKET_RATIO)
        lowest, highest = (round(log(value) / step) for value in (values[0][0], values[-1][0]))
        margin = max(0, _LEAST_BUCKETS - (highest - lowest)) // 2
        lowest, num_buckets = lowest - margin, highest - lowest + 2 * margin + 1
        token = 1 if self.unit == "s" else ceil(log(1 + 1 / values[0][0]) / step)
        size = max(2, token, ceil(num_buckets / _MOST_BARS))
        counts = [0] * ceil(num_buckets / size)
        for value, count in values:
            counts[(round(log(value) / step) - lowest) // size] += count
        return [exp(step * (lowest - 0.5 + size * number)) for number in range(len(counts) + 1)], counts

    def _draw_quantiles(self, axes: Axes, palette: Palette, left: float, right: float) -> None:
        for fraction, label, dashes, height in ((0.5, "median", (0, ()), 0.86), (0.99, "99 %", (0, (2, 2)), 0.98)):
            value = min(self.histogram.quantile(fraction), self.greatest or right)
            axes.axvline(max(left, value), ymax=height, color=palette.ink, linewidth=1.1, linestyle=dashes)
            on_the_right = value > (left * right) ** 0.5
            axes.annotate(
                f"{label} {_amount(value, self.unit)}",
                (max(left, value), height),
                xycoords=("data", "axes fraction"),
                xytext=(-4 if on_the_right else 4, -2),
                textcoords="offset points",
                ha="right" if on_the_right else "left",
                va="top",
                color=palette.ink,
            )


def _amount(value: float, unit: str) -> str:
    """Three digits, with the unit that suits: 0.0123 s is 12.3 ms."""
    if unit == "s":
        if value < 1e-3:
            return f"{value * 1e6:.3g} µs"
        return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s" if value < 120 else show_duration(value)
    return f"{value:,.0f}"


def _log_ticks(low: float, high: float) -> list[float]:
    """At most five round numbers in a logarithmic range."""
    for mantissas in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [
            mantissa * 10.0**power
            for power in range(-9, 13)
            for mantissa in mantissas
            if low <= mantissa * 10.0**power <= high
        ]
        if len(ticks) <= 5:
            return ticks
    return ticks[:: -(-len(ticks) // 5)]
