"""Shows an answer as it comes: what the model thinks dimmed or hidden, and nothing that could harm a terminal."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from pipeline.engines.draft import Part, Piece

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
# A model's text is not to move the cursor or change the terminal: control characters are shown as pictures of them.
_HARMLESS: dict[int, int] = {
    **{code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)},
    **{code: 0xFFFD for code in range(0x80, 0xA0)},
    0x7F: 0x2421,
}


class Screen:
    """Where an answer is written as it comes: thinking dimmed, or in brackets where there are no colours, or hidden.

    `answers` and `thoughts` are two streams for a script and one for a person.
    """

    def __init__(self, *, answers: TextIO, thoughts: TextIO, hide_thinking: bool = False) -> None:
        self._streams: dict[Part, TextIO] = {"answer": answers, "reasoning": thoughts}
        self._part: Part | None = None
        self._at_line_start = True
        self.hide_thinking = hide_thinking

    def show(self, piece: Piece) -> None:
        if piece.part != self._part:
            self._leave()
            self._enter(piece.part)
        if piece.part == "answer" or not self.hide_thinking:
            self._write(piece.part, piece.text)

    def end(self) -> None:
        """The answer is over, or has been stopped: what comes next begins a line."""
        self._leave()
        if not self._at_line_start:
            self._write("answer", "\n")

    def _enter(self, part: Part) -> None:
        self._part = part
        if part == "reasoning":
            mark = "[thinking ...]" if self.hide_thinking else "[thinking]\n"
            if self._has_colours:
                mark = f"{_DIM}thinking ..." if self.hide_thinking else _DIM
            self._streams[part].write(mark)
            self._at_line_start = False

    def _leave(self) -> None:
        if self._part == "reasoning":
            end = "\n" if self.hide_thinking else "\n[/thinking]\n"
            if self._has_colours:
                end = f"{_PLAIN}\n" if self.hide_thinking else f"{_PLAIN}\n\n"
            self._streams["reasoning"].write(end)
            self._streams["reasoning"].flush()
            self._at_line_start = True
        self._part = None

    def _write(self, part: Part, text: str) -> None:
        stream = self._streams[part]
        stream.write(text.translate(_HARMLESS) if stream.isatty() else text)
        stream.flush()
        self._at_line_start = text.endswith("\n")

    @property
    def _has_colours(self) -> bool:
        return has_colours(self._streams["reasoning"])


def has_colours(stream: TextIO) -> bool:
    """Whether escape codes may be written; see no-color.org."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
