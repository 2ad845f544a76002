"""Sizes and durations as people write them (`14GiB`, `1h30m`), to numbers and back without loss."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

MAX_SIZE_BYTES = 2**50  # a pebibyte: beyond any memory or input
MAX_DURATION_S = 3650 * 86400.0  # ten years: beyond any run, and within what every timer of the system can count

SIZE_PATTERN = r"^[0-9]{1,20}(\.[0-9]{1,20})? ?([kKMGT]?B|[KMGT]iB)$"
DURATION_PATTERN = r"^([0-9]{1,20}(\.[0-9]{1,400})?(us|ms|s|m|h|d) ?){1,6}$"

_BYTES = {
    **{"TiB": 2**40, "TB": 10**12, "GiB": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6},
    **{"KiB": 2**10, "KB": 10**3, "kB": 10**3, "B": 1},
}
_SECONDS = {
    **{"d": Fraction(86400), "h": Fraction(3600), "m": Fraction(60), "s": Fraction(1)},
    **{"ms": Fraction(1, 1000), "us": Fraction(1, 1_000_000)},
}


def parse_size(text: str) -> int:
    """Bytes of a size such as `14GiB`, `500MB` or `1.5 GiB`, rounded down; ValueError for anything else."""
    if not re.fullmatch(SIZE_PATTERN, text):
        raise ValueError(f"{text!r} is not a size such as 14GiB")
    number = text.rstrip("kKMGTiB ")
    return int(Fraction(number) * _BYTES[text[len(number) :].strip()])


def format_size(size_bytes: int) -> str:
    """The shortest exact way to write a size: `parse_size` gives the same number back."""
    unit = next(unit for unit, factor in _BYTES.items() if size_bytes % factor == 0)
    return f"{size_bytes // _BYTES[unit]}{unit}"


def parse_duration(text: str) -> float:
    """Seconds of a duration such as `100us`, `1ms`, `90s`, `3h` or `1h30m`; ValueError for anything else."""
    if not re.fullmatch(DURATION_PATTERN, text):
        raise ValueError(f"{text!r} is not a duration such as 90s, 30m or 3h")
    parts = re.findall(r"([0-9.]+)([a-z]+)", text)
    return float(sum((Fraction(number) * _SECONDS[unit] for number, unit in parts), Fraction()))


def format_duration(duration_s: float) -> str:
    """A short exact way to write a duration: `parse_duration` gives the same number back."""
    if duration_s == 0:
        return "0s"
    for unit, factor in _SECONDS.items():
        count = round(Fraction(duration_s) / factor)
        if float(count * factor) == duration_s:
            return f"{count}{unit}"
    return f"{Decimal(repr(duration_s)):f}s"
