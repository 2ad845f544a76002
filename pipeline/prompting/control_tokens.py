"""Keep the text of a prompt from spelling the tokens that structure it.

A tokenizer reads `<|im_end|>` as a control token wherever it stands, in the template's frame or in a user's text. The
guard compares the control tokens of a prompt with those of the same conversation about nothing. Where they differ, the
prompt is encoded again by a copy of the tokenizer in which every control token has a name that no text can spell: the
frame's tokens are written by those names, and all else is plain text to it.
"""

# pyright: basic
from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

# Unicode's noncharacters, "not for interchange": no normalizer changes them and no honest text has them.
_BEGIN, _END = "\ufdd0", "\ufdd1"
_NAME_BEGIN, _NAME_END = "\ufdd2", "\ufdd3"
_RESERVED = re.compile(f"[{_BEGIN}{_END}{_NAME_BEGIN}{_NAME_END}]")


class ControlTokens:
    """The control tokens of one tokenizer: all its added tokens but runs of white space (Gemma has `\\n\\n`)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.texts = {id_: token.content for id_, token in added.items() if not token.content.isspace()}
        longest_first = sorted(self.texts.values(), key=len, reverse=True)  # as the tokenizer matches them
        self._spelled = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._marked = re.compile(f"{_BEGIN}({self._spelled.pattern}){_END}|[{_BEGIN}{_END}]")

    def among(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The control tokens of a prompt, in order."""
        texts = self.texts
        return tuple([id_ for id_ in ids if id_ in texts])

    def first_difference(self, ids: Sequence[int], expected: Sequence[int]) -> str:
        """Spelling of the first control token in which `ids` differs from the `expected` control tokens."""
        for id_, wanted in zip_longest(self.among(ids), expected):
            if id_ != wanted:
                return self.texts[wanted if id_ is None else id_]
        return ""

    def mark(self, text: str) -> str:
        """A user's text with marks around it and around each control token it spells, for `encode_marked`.

        White space at the ends stays outside, so that a template that trims gives the same.
        Raises ValueError where the text itself has a mark in it.
        """
        if _RESERVED.search(text):
            raise ValueError("and a Unicode noncharacter (U+FDD0 to U+FDD3), by which it could escape the guard")
        core = text.strip()
        if not core:
            return text
        marked = self._spelled.sub(f"{_BEGIN}\\g<0>{_END}", core)
        return text.replace(core, f"{_BEGIN}{marked}{_END}", 1)

    @staticmethod
    def unmark(text: str) -> str:
        return text.replace(_BEGIN, "").replace(_END, "")

    def encode_marked(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Encode rendered text with marked contents: only control tokens outside all marks become tokens.

        A text without forgery is encoded exactly as by the tokenizer itself. Raises ValueError where this tokenizer
        cannot be copied.
        """
        # Split at the marks: [text, marked token or None, text, ...]. Each piece is renamed by itself, so that text
        # on both sides of a mark cannot join to spell a token.
        pieces = self._marked.split(text)
        pieces[::2] = [self._spelled.sub(self._name, piece) for piece in pieces[::2]]
        return self._unspellable.encode("".join(filter(None, pieces)), add_special_tokens=add_special_tokens).ids

    def encode_plain(self, text: str) -> Encoding:
        """Encode a text in which no control token is one. Raises ValueError as `encode_marked` does."""
        return self._unspellable.encode(text, add_special_tokens=False)

    def structure(self, ids: Sequence[int]) -> tuple[int, ...]:
        """As `among`, but without the token for unknown characters, which honest text has too."""
        return tuple([id_ for id_ in self.among(ids) if id_ != self._unknown_id])

    @cached_property
    def _names(self) -> dict[str, str]:
        return {text: f"{_NAME_BEGIN}{id_}{_NAME_END}" for id_, text in self.texts.items()}

    def _name(self, match: re.Match[str]) -> str:
        return self._names[match[0]]

    @property
    def _unspellable(self) -> Tokenizer:
        return self._copy[0]

    @property
    def _unknown_id(self) -> int | None:
        return self._copy[1]

    @cached_property
    def _copy(self) -> tuple[Tokenizer, int | None]:
        """The tokenizer with unspellable control tokens under the same ids, and what it makes of unknown characters.

        Made when first needed: it takes a second for a large vocabulary.
        """
        from tokenizers import Tokenizer

        try:
            data = json.loads(self._tokenizer.to_str())
            for token in data["added_tokens"]:
                token["content"] = self._names.get(token["content"], token["content"])
            _rename_in_vocabulary(data["model"], self._names)
            copy = Tokenizer.from_str(json.dumps(data))
        # The library raises bare Exception, for instance for a pre-tokenizer written in Python.
        except Exception as error:
            raise ValueError(f"and this tokenizer cannot be copied to read it as text: {error}") from error
        if any(copy.token_to_id(self._names[text]) != id_ for id_, text in self.texts.items()):
            raise ValueError("and the ids of this tokenizer's added tokens do not survive a copy")
        unknown = data["model"].get("unk_token")
        return copy, data["model"].get("unk_id") if unknown is None else copy.token_to_id(unknown)


def _rename_in_vocabulary(model: dict[str, Any], names: dict[str, str]) -> None:
    """Rename control tokens that the model's own vocabulary has too (SentencePiece, WordPiece): else it finds them."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(text, text): id_ for text, id_ in vocabulary.items()}
    else:  # Unigram: [text, score] in the order of ids
        model["vocab"] = [[names.get(text, text), score] for text, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if not names.keys() & {*pair, "".join(pair)}]
