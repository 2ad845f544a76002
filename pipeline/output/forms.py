"""How the answers, which a run keeps as native lines, become the file that is published."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

# Given the hexadecimal SHA-256 of the answers, makes the summary and returns its line.
Conclude = Callable[[str], bytes]

# From the suffix of each file that is published beside the output to what makes its content of the native lines.
Companions = Mapping[str, Callable[[Iterable[bytes]], Iterator[bytes]]]


class Form(Protocol):
    """One form of output.

    `lines` are the native lines of all answers in input order, in pieces that end with a line end. The same lines give
    the same bytes, so that a publishing that was interrupted is finished by another process.
    """

    companions: Companions
    has_lines: bool
    """Text, which whatever version of a library writes the same."""

    def encode(self, lines: Iterable[bytes], conclude: Conclude, *, summary_line: bool) -> Iterator[bytes]:
        """The content of the output, before any compression; calls `conclude` once, when all answers are drawn."""
        ...
