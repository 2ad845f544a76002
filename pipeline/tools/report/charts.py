"""The drawings of a report, by matplotlib: as SVG that takes the page's colours, or together as one PNG.

Nothing is told by colour alone: series have panels of their own, breaks are dashed, failures are crosses, and what
matters is written beside it.
"""
# pyright: basic

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.forecast.forecast import show_duration
from pipeline.tools.report.distribution import Distribution
from pipeline.tools.report.drawing import DPI, figures, name_panel, require_matplotlib, to_svg
from pipeline.tools.report.palette import LIGHT, STAND_IN, Palette
from pipeline.tools.report.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDE, _NARROW = 1040, 360
_MOST_NAMED_BREAKS = 8  # more would be written over each other
_ROOM_FOR_WORDS = 0.25  # of the axis, after a break; with less it has the number of the session alone
_HEADROOM = 1.2  # for what is written above the data
# Steps of a time axis in seconds.
_STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200, 86_400)


class Charts:
    """Draws what a record holds. Raises NotFoundError where matplotlib is not installed."""

    def __init__(self, record: RunRecord) -> None:
        require_matplotlib()
        self._record = record

    def timeline(self) -> tuple[str, str]:
        """Throughput, sequences in flight and memory over working time: SVG for a wide page and for a narrow one."""
        return self._timeline(_WIDE), self._timeline(_NARROW)

    def latencies(self) -> list[str]:
        """SVG of the distribution of time to first token, time per token and end-to-end latency."""
        return list(map(_to_svg, self._latencies()))

    def lengths(self) -> list[str]:
        """SVG of the distribution of tokens of prompts, of answers and of what was thought."""
        return list(map(_to_svg, self._lengths()))

    def write_png(self, path: Path, title: str) -> None:
        """All drawings in one picture. Raises OSError."""
        panels = [*self._latencies(), *self._lengths()]
        num_rows = -(-len(panels) // 3)
        with figures(LIGHT) as figure_of:
            figure = figure_of(_WIDE, 520 + 200 * num_rows)
            figure.get_layout_engine().set(w_pad=14 / DPI, h_pad=9 / DPI)
            top, *rows = figure.subfigures(1 + num_rows, 1, height_ratios=[520, *[200] * num_rows])
            top.suptitle(title, x=0.012, ha="left", fontsize=17, fontweight="bold", color=LIGHT.ink)
            self._draw_timeline(top, LIGHT, wide=True)
            for number, row in enumerate(rows):
                for place, axes in enumerate(row.subplots(1, 3)):
                    chosen = panels[3 * number + place : 3 * number + place + 1]
                    if not chosen:
                        axes.set_axis_off()
                    for each in chosen:
                        each.draw(axes, LIGHT)
            figure.savefig(path, format="png", dpi=2 * DPI, facecolor=LIGHT.background, metadata={"Software": None})

    # --- over time

    def _timeline(self, width: int) -> str:
        wide = width == _WIDE
        with figures(STAND_IN) as figure_of:
            figure = figure_of(width, 470 if wide else 500)
            self._draw_timeline(figure, STAND_IN, wide=wide)
            return to_svg(figure, f"timeline{width}", "Throughput, sequences in flight and memory over time")

    def _draw_timeline(self, figure: Any, palette: Palette, *, wide: bool) -> None:
        record = self._record
        has_memory = any(record.memory)
        ratios = [5, 3, 2.4] if has_memory else [5, 3]
        panels: Sequence[Axes] = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios)
        merge = 1 if wide else 3
        width = record.output_tokens.width * merge
        rate = [sum(each) / width for each in _merged(record.output_tokens.totals(), merge)]
        self._draw_breaks(panels, palette, wide=wide)
        _draw_steps(panels[0], palette, width, rate)
        name_panel(panels[0], palette, "Output tokens a second")
        self._draw_mean(panels[0], palette)
        self._draw_failures(panels[0], palette)
        in_flight = [sum(each) / width for each in _merged(record.in_flight_s.totals(), merge)]
        _draw_steps(panels[1], palette, width, in_flight)
        slots = record.slots
        name_panel(panels[1], palette, "Sequences in flight" + (f", of {slots} slots" if slots else ""))
        if slots and max(in_flight, default=0) > slots / 4:
            panels[1].axhline(slots, color=palette.muted, linewidth=1, linestyle=(0, (1, 2)))
        if has_memory:
            unit, size = ("GiB", 2**30) if max(record.memory) >= 2**30 else ("MiB", 2**20)
            memory = [max(each) / size for each in _merged(_held(record.memory), merge)]
            _draw_steps(panels[2], palette, width, memory)
            name_panel(panels[2], palette, f"Memory held by the process, {unit}")
        for axes in panels:
            axes.set_ylim(0, axes.get_ylim()[1] * (_HEADROOM if axes is panels[0] else 1))
            axes.yaxis.set_major_locator(_ticks(3))
            axes.yaxis.set_major_formatter(_thousands)
        _draw_time_axis(panels[-1], record.axis.length, wide=wide)

    def _draw_mean(self, axes: Axes, palette: Palette) -> None:
        history = self._record.history
        generation_s = sum(session.duration for session in history.sessions)
        if not generation_s or not history.tally.output_tokens:
            return
        mean = history.tally.output_tokens / generation_s
        axes.axhline(mean, color=palette.ink, linewidth=1, linestyle=(0, (5, 3)))
        axes.annotate(
            f"mean {mean:,.0f}",
            (1, mean),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            color=palette.ink,
            bbox={"facecolor": palette.background, "edgecolor": "none", "pad": 1.5},
        )

    def _draw_failures(self, axes: Axes, palette: Palette) -> None:
        spread = self._record.failures
        places = [(number + 0.5) * spread.width for number, count in enumerate(spread.totals()) if count > 0.5]
        if places:
            axes.plot(
                places,
                [0.03] * len(places),
                transform=axes.get_xaxis_transform(),
                linestyle="none",
                marker="x",
                markersize=5,
                markeredgewidth=1.2,
                color=palette.ink,
                clip_on=False,
            )
            axes.annotate(
                "\N{MULTIPLICATION SIGN} failed answers",
                (1, 1),
                xycoords="axes fraction",
                xytext=(0, 6),
                textcoords="offset points",
                ha="right",
                color=palette.muted,
            )

    def _draw_breaks(self, panels: Sequence[Axes], palette: Palette, *, wide: bool) -> None:
        """Dashed lines where a session ended and another took over, and hatched bands where a model was loading."""
        stretches, sessions = self._record.axis.stretches, self._record.history.sessions
        for number, (stretch, session) in enumerate(zip(stretches, sessions, strict=False)):
            for axes in panels:
                if stretch.generation - stretch.begin > self._record.axis.length / 200:
                    axes.axvspan(
                        stretch.begin,
                        stretch.generation,
                        facecolor="none",
                        edgecolor=palette.line,
                        hatch="////",
                        linewidth=0,
                    )
                if number:
                    axes.axvline(stretch.begin, color=palette.ink, linewidth=1, linestyle=(0, (2, 2)))
            if number and len(stretches) <= _MOST_NAMED_BREAKS:
                before = sessions[number - 1]
                gap_s = session.started_at - before.started_at - before.load_s - before.duration
                ended = before.ended.replace("_", " ")
                room = stretch.end - stretch.begin >= self._record.axis.length * _ROOM_FOR_WORDS
                in_words = wide and room and not self._record.history.header.merged
                panels[0].annotate(
                    f"{ended}; resumed {show_duration(max(0.0, gap_s))} later" if in_words else str(number + 1),
                    (stretch.begin, 1),
                    xycoords=("data", "axes fraction"),
                    xytext=(5, -12),
                    textcoords="offset points",
                    color=palette.ink,
                    bbox={"facecolor": palette.background, "edgecolor": "none", "pad": 1.5},
                )

    # --- distributions

    def _latencies(self) -> list[Distribution]:
        tally = self._record.history.tally
        return [
            Distribution("Time to first token", tally.ttft, "s"),
            Distribution("Time per token after the first", tally.tpot, "s"),
            Distribution("From taking a prompt to its answer", tally.e2el, "s"),
        ]

    def _lengths(self) -> list[Distribution]:
        record = self._record
        named = {
            "Tokens of a prompt": record.prompts,
            "Tokens of an answer": record.outputs,
            "Tokens of reasoning in it": record.reasoning,
        }
        return [
            Distribution(name, lengths.histogram, "tokens", lengths.longest)
            for name, lengths in named.items()
            if lengths.histogram.count or lengths is not record.reasoning
        ]


def _to_svg(distribution: Distribution) -> str:
    with figures(STAND_IN) as figure_of:
        figure = figure_of(_NARROW, 190)
        distribution.draw(figure.subplots(), STAND_IN)
        return to_svg(figure, re.sub(r"\W", "", distribution.name), distribution.name)


def _draw_steps(axes: Axes, palette: Palette, width: float, values: Sequence[float]) -> None:
    edges = [width * number for number in range(len(values) + 1)]
    axes.stairs(values, edges, fill=True, color=palette.soft)
    axes.stairs(values, edges, color=palette.accent, linewidth=1.4)
    axes.set_xlim(0, edges[-1])


def _draw_time_axis(axes: Axes, length: float, *, wide: bool) -> None:
    most = 8 if wide else 4
    step = next((step for step in _STEPS if length / step <= most), length / most or 1.0)
    ticks = [step * number for number in range(int(length / step) + 1)]
    axes.set_xticks(ticks, ["0" if not tick else f"{tick:g} s" if tick < 60 else show_duration(tick) for tick in ticks])
    explained = ": loading (hatched) and generation, without the time between sessions" if wide else ", loading hatched"
    axes.set_xlabel(f"working time{explained}")


def _merged(values: Sequence[float], number: int) -> Iterator[Sequence[float]]:
    for place in range(0, len(values), number):
        yield values[place : place + number]


def _held(memory: Sequence[int]) -> list[int]:
    """What was noted, held until it is noted anew: a commit comes only now and then."""
    held = list(memory)
    for place in range(1, len(held)):
        held[place] = held[place] or held[place - 1]
    for place in range(len(held) - 2, -1, -1):
        held[place] = held[place] or held[place + 1]
    return held


def _ticks(most: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, min_n_ticks=1)


def _thousands(value: float, _position: float) -> str:
    return f"{value:,.10g}"
