"""One answer as its tokens arrive: where reasoning ends, when the answer ends, and what its text is.

Pure: token ids in, a Completion out, the same for every engine that generates token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.records import Completion, FinishReason, Request, Timing, Usage

_LONGEST_HOLD = 64  # tokens of undecodable bytes after which the text is taken as it is, so that the work stays linear


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What token ids mean: `decode` gives their text without special tokens and without tidied spaces."""

    decode: Callable[[Sequence[int]], str]
    end_ids: frozenset[int]
    open_id: int | None = None  # of reasoning
    close_id: int | None = None


class Reply:
    """The tokens of one answer so far, those of an earlier session first, and what follows from them.

    Reasoning exists if the prompt ends inside it or the first token opens it; it lasts to the first closing tag, and
    `reasoning_tokens` counts the tags that were generated. Newlines around reasoning and around the answer after it
    are dropped, as in Qwen's documented parsing; an answer without reasoning keeps its text exactly. Stop strings are
    sought in the answer as so defined. Reasoning that is never closed leaves the answer empty and ends `length`, even
    where the model ended by itself: there is no answer yet.
    """

    def __init__(self, request: Request, vocabulary: Vocabulary) -> None:
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._request = request
        self._vocabulary = vocabulary
        self._reasoning_at = 0 if request.reasoning_open and vocabulary.close_id is not None else None
        self._closed_at: int | None = None  # position of the closing tag
        self._ended = False  # by an end token, which is not text
        self._stops: StopFinder | None = None  # made with the answer's first token
        for token in request.generated:
            self.push(token)

    @property
    def in_reasoning(self) -> bool:
        return self._reasoning_at is not None and self._closed_at is None

    @property
    def forced_token(self) -> int | None:
        """The token that has to come next: the closing tag, as the last token that the thinking budget allows."""
        budget = self._request.settings.thinking_budget
        if budget is None or not self.in_reasoning or len(self.tokens) < budget - 1:
            return None
        return self._vocabulary.close_id

    def push(self, token: int) -> None:
        """Take the next token; once `finish_reason` is set, further tokens are ignored."""
        if self.finish_reason is not None:
            return
        self.tokens.append(token)
        settings = self._request.settings
        if token in self._vocabulary.end_ids and not settings.ignore_eos:
            self._ended = True
            self.finish_reason = "length" if self.in_reasoning else "stop"
        elif self.in_reasoning:
            if token == self._vocabulary.close_id:
                self._closed_at = len(self.tokens) - 1
        elif len(self.tokens) == 1 and token == self._vocabulary.open_id:
            self._reasoning_at = 1
        elif settings.stop and self._stop_found(token):
            self.finish_reason = "stop"
        if self.finish_reason is None and len(self.tokens) >= settings.max_new_tokens:
            self.finish_reason = "stop" if self._is_cut() else "length"

    def completion(self, timing: Timing) -> Completion:
        """The finished answer."""
        if self.finish_reason is None:
            raise ValueError("the answer is not finished")
        text, reasoning = self._answer(), None
        if self._reasoning_at is not None:
            reasoning = self._vocabulary.decode(self._tokens_between(self._reasoning_at, self._closed_at)).strip("\n")
            text = text.rstrip("\n")
        return Completion(
            item=self._request.item,
            sample=self._request.sample,
            finish_reason=self.finish_reason,
            text=text,
            reasoning=reasoning,
            usage=Usage(
                prompt_tokens=len(self._request.token_ids),
                completion_tokens=len(self.tokens),
                reasoning_tokens=self._num_reasoning_tokens(),
            ),
            timing=timing,
        )

    def _num_reasoning_tokens(self) -> int:
        if self._reasoning_at is None:
            return 0
        return len(self._tokens_between(0, None if self._closed_at is None else self._closed_at + 1))

    def _tokens_between(self, first: int, last: int | None) -> list[int]:
        """Tokens from `first` up to `last` or the end of the text, where an end token is left out."""
        if last is None:
            last = len(self.tokens) - self._ended
        return self.tokens[first:last]

    def _answer(self) -> str:
        """The text of the answer so far, cut at a stop string."""
        text = self._uncut_answer()
        places = [place for stop in self._request.settings.stop if (place := text.find(stop)) >= 0]
        return text[: min(places)] if places else text

    def _uncut_answer(self) -> str:
        if self.in_reasoning:
            return ""
        if self._closed_at is None:
            return self._vocabulary.decode(self._tokens_between(0, None))
        return self._vocabulary.decode(self._tokens_between(self._closed_at + 1, None)).lstrip("\n")

    def _stop_found(self, token: int) -> bool:
        if self._stops is None:
            self._stops = StopFinder(self._vocabulary.decode, self._request.settings.stop)
        # The whole text has the last word: newlines that follow the reasoning are no part of it.
        return self._stops.push(token) and self._is_cut()

    def _is_cut(self) -> bool:
        return bool(self._request.settings.stop) and self._answer() != self._uncut_answer()


class StopFinder:
    """Tells after each token whether it brought the text a stop string; the work per token is constant."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(decode)
        self._stop = stop
        self._tail = ""  # what may be the beginning of a stop string
        self._longest_beginning = max(map(len, stop)) - 1

    def push(self, token: int) -> bool:
        piece = self._detokenizer.push(token)
        if not piece:
            return False
        text = self._tail + piece
        self._tail = text[-self._longest_beginning :] if self._longest_beginning else ""
        return any(stop in text for stop in self._stop)


class Detokenizer:
    """The text of a growing row of tokens, piece by piece; the pieces together are the text of the whole row.

    A token's text may depend on the token before it (SentencePiece drops the space that begins a text) and a character
    may span tokens. So tokens are decoded together with those that gave the piece before, and what may still become
    another character waits.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._known: list[int] = []  # tokens whose text, not empty, was given entirely
        self._known_length = 0  # of their text
        self._held: list[int] = []
        self._given_length = 0  # of the text of both

    def push(self, token: int) -> str:
        """The text that this token settles; often its own, empty while a character is incomplete."""
        self._held.append(token)
        text = self._decode([*self._known, *self._held])
        settled = text if len(self._held) >= _LONGEST_HOLD else text.rstrip("\ufffd")
        piece = settled[self._given_length :]
        self._given_length = max(self._given_length, len(settled))
        if len(settled) == len(text) > self._known_length:
            self._known, self._held = self._held, []
            self._known_length = self._given_length = len(self._decode(self._known))
        return piece
