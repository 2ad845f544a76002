"""Figures in the house's style, and their way into a page: matplotlib, asked for when something is drawn."""
# pyright: basic

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipeline.errors import NotFoundError
from pipeline.tools.report.palette import Palette, with_properties

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 72  # a point of matplotlib is then a pixel of the page


def require_matplotlib() -> None:
    """Raises NotFoundError with what to install where it is not there."""
    try:
        import matplotlib as _  # noqa: F401
    except ImportError:
        message = "the report is drawn with matplotlib; install it with: pip install 'overnight[report]'"
        raise NotFoundError(message) from None


@contextmanager
def figures(palette: Palette) -> Iterator[Callable[[float, float], Any]]:
    """Gives what makes a figure of a width and a height in pixels, in the house's style."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "axes.axisbelow": True,
        "axes.edgecolor": palette.line,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.labelcolor": palette.muted,
        "axes.labelsize": 11,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.facecolor": "none",
        "font.family": "sans-serif",
        "font.size": 11,
        "grid.color": palette.line,
        "grid.linewidth": 0.8,
        "hatch.color": palette.line,
        "hatch.linewidth": 0.8,
        "svg.fonttype": "none",  # text stays text: it can be read out, searched, and has the page's font
        "xtick.color": palette.line,
        "xtick.labelcolor": palette.muted,
        "ytick.color": palette.line,
        "ytick.labelcolor": palette.muted,
        "ytick.major.size": 0,
    }

    def figure_of(width: float, height: float) -> Figure:
        figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        return figure

    with rc_context(settings):
        yield figure_of


def to_svg(figure: Figure, salt: str, title: str) -> str:
    """The drawing as an element of a page: without prologue, size and date, its names its own (`salt`)."""
    from matplotlib import rc_context

    with io.StringIO() as file:
        with rc_context({"svg.hashsalt": salt}):
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    # Names that nothing refers to would come twice in a page of several drawings.
    referred = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text))
    text = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in referred else "", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text)
    return with_properties(text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1))


def name_panel(axes: Axes, palette: Palette, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=12.5, fontweight="bold", color=palette.ink, pad=8)
