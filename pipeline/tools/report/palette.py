"""The colours of a report, for light and for dark: ink on a background, and one accent."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Palette:
    """As #rrggbb. Text is only ever written in ink, muted or accent on background or panel."""

    background: str
    panel: str  # behind key figures and code
    ink: str
    muted: str  # of what explains: labels, units, captions
    line: str  # of grids and rules
    accent: str  # of data
    soft: str  # of areas of data

    def to_css(self) -> str:
        """Custom properties: --ink: #1b1e23; and so on."""
        return " ".join(f"--{name}: {colour};" for name, colour in asdict(self).items())


LIGHT = Palette("#fcfcfa", "#f3f2ee", "#1b1e23", "#5b6068", "#dddbd4", "#0b66a0", "#cfe3f0")
DARK = Palette("#15171a", "#1e2125", "#edebe6", "#a5a9b0", "#34383e", "#6cb8ea", "#1f3d52")
# Colours that no drawing has: each stands for a custom property until the drawing is in a page.
STAND_IN = Palette(*(f"#00fe{number:02x}" for number in range(7)))


def with_properties(svg: str) -> str:
    """The drawing with custom properties in the place of the stand-ins, so that it follows the page's colours."""
    for name, colour in asdict(STAND_IN).items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours, 1 to 21 (WCAG 2.2, relative luminance)."""
    lighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
