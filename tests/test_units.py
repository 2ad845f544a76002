"""Sizes and durations: what people write, and no loss on the way back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.spec.units import MAX_DURATION_S, MAX_SIZE_BYTES, format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("14GiB", 14 * 2**30),
        ("1.5 GiB", 3 * 2**29),
        ("500MB", 500_000_000),
        ("2kB", 2000),
        ("2KB", 2000),
        ("2KiB", 2048),
        ("1TiB", 2**40),
        ("0.1GB", 100_000_000),  # exact, not 99999999 by way of floats
        ("7B", 7),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "14", "14G", "14gib", "GiB", "-1GiB", "1e3MB", "1,5GB", "14GiB\n", "1 2GB", "٣GB"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("100us", 0.0001),
        ("1ms", 0.001),
        ("20ms", 0.02),
        ("90s", 90.0),
        ("30m", 1800.0),
        ("3h", 10800.0),
        ("1d", 86400.0),
        ("1h30m", 5400.0),
        ("1h 30m", 5400.0),
        ("0.1s", 0.1),
        ("1.5h", 5400.0),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "90", "3:00", "1 hour", "-1s", "s", "1s\n", "1e3s", "1h,30m", "1y"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


@given(st.integers(min_value=0, max_value=MAX_SIZE_BYTES))
def test_a_size_is_written_without_loss(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes)) == size_bytes


@given(st.floats(min_value=0, max_value=MAX_DURATION_S) | st.integers(0, 10**8).map(lambda ms: ms / 1000))
def test_a_duration_is_written_without_loss(duration_s: float) -> None:
    assert parse_duration(format_duration(duration_s)) == duration_s


@pytest.mark.parametrize(
    ("size_bytes", "text"), [(64 * 2**20, "64MiB"), (16 * 10**9, "16GB"), (1001, "1001B"), (3 * 2**29, "1536MiB")]
)
def test_a_size_is_written_in_its_own_unit(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [(0.0, "0s"), (1800.0, "30m"), (90.0, "90s"), (0.02, "20ms"), (1e-4, "100us"), (86400.0, "1d")],
)
def test_a_duration_is_written_in_its_own_unit(duration_s: float, text: str) -> None:
    assert format_duration(duration_s) == text
