"""What of an answer under way may be shown already: text that no later token takes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipeline.engines.reply import Detokenizer
from pipeline.records import Completion, Request

if TYPE_CHECKING:
    from pipeline.prompting.encoder import ThinkingTags

Part = Literal["reasoning", "answer"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Text to be shown next, and whether the model thinks it or says it."""

    part: Part
    text: str


class Draft:
    """Tokens of one answer in, pieces of its text out; together the pieces are the finished answer's own texts.

    What may still be cut waits: newlines at the end, and what could be the beginning of a stop string. The rules for
    reasoning are those of `Reply`, and `finish` brings whatever the rules here held back. Bytes that never become a
    character are the exception: with some tokenizers they change the text before them, which has been shown.
    """

    def __init__(self, request: Request, decode: Callable[[Sequence[int]], str], thinking: ThinkingTags | None) -> None:
        self._open_id = thinking.open_id if thinking else None
        self._close_id = thinking.close_id if thinking else None
        self._num_seen = 0
        self._is_reasoning = request.reasoning_open and thinking is not None
        self._texts: dict[Part, _Text] = {
            "reasoning": _Text(decode, stop=(), bare=True),
            "answer": _Text(decode, stop=request.settings.stop, bare=self._is_reasoning),
        }

    @property
    def answer(self) -> str:
        """What has been shown of the answer."""
        return self._texts["answer"].shown

    def push(self, token_ids: Sequence[int]) -> list[Piece]:
        """What the tokens so far, all of them, allow to be shown beyond what was."""
        pieces: list[Piece] = []
        for position in range(self._num_seen, len(token_ids)):
            pieces += self._take(position, token_ids[position])
        self._num_seen = max(self._num_seen, len(token_ids))
        return pieces

    def finish(self, completion: Completion) -> list[Piece]:
        """The rest of both texts; nothing of an answer that is an error."""
        reasoning = self._rest("reasoning", completion.reasoning or "")
        return reasoning + self._rest("answer", completion.text or "")

    def _take(self, position: int, token: int) -> list[Piece]:
        if self._is_reasoning and token == self._close_id:
            self._is_reasoning = False
            return []
        if position == 0 and not self._is_reasoning and token == self._open_id:
            self._is_reasoning = self._texts["answer"].bare = True
            return []
        part: Part = "reasoning" if self._is_reasoning else "answer"
        text = self._texts[part].push(token)
        return [Piece(part, text)] if text else []

    def _rest(self, part: Part, whole: str) -> list[Piece]:
        rest = whole[len(self._texts[part].shown) :]
        self._texts[part].shown = whole
        return [Piece(part, rest)] if rest else []


class _Text:
    """One of the two texts. `bare`: without the newlines around it."""

    def __init__(self, decode: Callable[[Sequence[int]], str], *, stop: Sequence[str], bare: bool) -> None:
        self._detokenizer = Detokenizer(decode)
        self._stop = stop
        self._held = ""
        self.bare = bare
        self.shown = ""

    def push(self, token: int) -> str:
        text = self._held + self._detokenizer.push(token)
        if self.bare and not self.shown:
            text = text.lstrip("\n")
        length = len(text.rstrip("\n"))
        # A stop string can begin in what is given only as far back as its own length.
        longest = max(map(len, self._stop), default=1) - 1
        for begin in range(max(0, len(text) - longest), length):
            if any(stop.startswith(text[begin:]) for stop in self._stop):
                length = begin
                break
        self._held, text = text[length:], text[:length]
        self.shown += text
        return text
