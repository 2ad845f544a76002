"""Make a prompt and its answer fit into the model's context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from pipeline.records import ItemError, Message, Settings

OverLength = Literal["error", "truncate-start", "truncate-end"]

# Token ids of a whole conversation.
Encode: TypeAlias = Callable[[Sequence[Message]], Sequence[int]]
# (content, num_tokens, at_start) -> the content without so many of its tokens, and how many they were.
Cut: TypeAlias = Callable[[str, int, bool], tuple[str, int]]

_INSTRUCTIONS = frozenset({"system", "developer"})  # never cut


class PromptRefused(Exception):  # noqa: N818 - the answer to a line, not a fault
    """A prompt that cannot become a request; `error` is what its line is answered with."""

    def __init__(self, type_: str, message: str) -> None:
        super().__init__(message)
        self.error = ItemError(type_, message)


@dataclass(frozen=True, slots=True)
class LengthLimit:
    """How many tokens prompt and answer may have together, and what becomes of a prompt that leaves no room.

    A cut takes tokens of the content away, from its start or its end, and never of the template's frame or of system
    and developer messages; a conversation is cut through its turns, and a turn that loses all its text stays as an
    empty turn. It leaves the answer its `max_new_tokens`, or half the context where they are more than that.
    """

    context_length: int
    over_length: OverLength

    def fit(
        self,
        messages: Sequence[Message],
        settings: Settings,
        encode: Encode,
        cut: Cut,
    ) -> tuple[Sequence[int], Settings]:
        """Token ids of the prompt and settings whose `max_new_tokens` fits behind them. Raises PromptRefused."""
        ids = encode(messages)
        if len(ids) >= self.context_length:
            ids = self._cut(messages, ids, settings, encode, cut)
        if not ids:
            raise PromptRefused("empty_prompt", "the prompt has no token to begin from")
        room = self.context_length - len(ids)
        return ids, settings if settings.max_new_tokens <= room else replace(settings, max_new_tokens=room)

    def _cut(
        self,
        messages: Sequence[Message],
        ids: Sequence[int],
        settings: Settings,
        encode: Encode,
        cut: Cut,
    ) -> Sequence[int]:
        num_tokens = len(ids)
        message = f"the prompt has {num_tokens} tokens; the context of {self.context_length} must hold it and an answer"
        if self.over_length == "error":
            raise PromptRefused("prompt_too_long", message)
        length = self.context_length - min(settings.max_new_tokens, max(1, self.context_length // 2))
        # Text cut short can have other tokens at the cut than it had there before: repeat until it fits.
        while len(ids) > length:
            messages = self._shorten(messages, len(ids) - length, cut)
            if not any(turn.content for turn in messages if turn.role not in _INSTRUCTIONS):
                raise PromptRefused("prompt_too_long", f"{message}; without any content it has {len(encode(messages))}")
            ids = encode(messages)
        return ids

    def _shorten(self, messages: Sequence[Message], num_tokens: int, cut: Cut) -> list[Message]:
        shorter = list(messages)
        at_start = self.over_length == "truncate-start"
        for position in range(len(shorter)) if at_start else reversed(range(len(shorter))):
            turn = shorter[position]
            if num_tokens > 0 and turn.content and turn.role not in _INSTRUCTIONS:
                content, num_cut = cut(turn.content, num_tokens, at_start)
                shorter[position] = replace(turn, content=content)
                num_tokens -= num_cut
        return shorter
