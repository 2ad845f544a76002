"""What is shown of an answer while it is under way is, piece by piece, the finished answer and nothing else."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pipeline.engines.draft import Draft, Piece
from pipeline.engines.reply import Reply
from pipeline.records import Request
from tests.test_reply import TIMING, TOKENIZERS, byte_level, request, vocabulary

STOPS = [(), ("STOP",), ("\n\n", "the end"), ("e",), ("\n",), ("lo wo", "lo there")]


def play(
    tokens: Sequence[int], asked: Request, tokenizer: Tokenizer, step: int = 1
) -> tuple[Draft, list[Piece], Reply]:
    """Let a reply take the tokens, showing after every `step` of them, as far as it does not end."""
    words = vocabulary(tokenizer)
    draft = Draft(asked, words.decode, SimpleNamespace(open_id=words.open_id, close_id=words.close_id))
    reply = Reply(asked, words)
    pieces: list[Piece] = []
    for number, token in enumerate(tokens):
        reply.push(token)
        if reply.finish_reason is not None:
            break
        if number % step == 0:
            pieces += draft.push(reply.tokens)
    return draft, pieces, reply


def shown(pieces: Sequence[Piece], part: str) -> str:
    return "".join(piece.text for piece in pieces if piece.part == part)


@pytest.mark.parametrize("make", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=50)
def test_the_pieces_are_the_answer(make: Callable[[], Tokenizer], data: st.DataObject) -> None:
    tokenizer = make()
    any_token = st.integers(0, tokenizer.get_vocab_size() - 1)
    some_text = st.sampled_from(["the end", "STOP", "\n\n", "hello", "日本語", "<think>", "</think>", "<end>"])
    parts = data.draw(st.lists(any_token.map(lambda one: [one]) | some_text.map(lambda text: ids(tokenizer, text))))
    asked = request(
        reasoning_open=data.draw(st.booleans()), stop=data.draw(st.sampled_from(STOPS)), max_new_tokens=10_000
    )
    tokens = [token for part in parts for token in part]
    draft, pieces, reply = play(tokens, asked, tokenizer, data.draw(st.integers(1, 3)))
    while reply.finish_reason is None:
        reply.push(tokenizer.token_to_id("<end>"))
    completion = reply.completion(TIMING)
    assume("\ufffd" not in f"{completion.text}{completion.reasoning}")  # such bytes may change the text before them
    before_the_end = {part: shown(pieces, part) for part in ("reasoning", "answer")}
    assert completion.text is not None and completion.text.startswith(before_the_end["answer"])
    assert (completion.reasoning or "").startswith(before_the_end["reasoning"])
    pieces += draft.finish(completion)
    assert shown(pieces, "answer") == completion.text == draft.answer
    assert shown(pieces, "reasoning") == (completion.reasoning or "")
    order = [piece.part for piece in pieces]
    assert order == sorted(order, reverse=True)  # reasoning before the answer


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_text_is_shown_while_the_answer_is_under_way() -> None:
    tokenizer = byte_level()
    tokens = ids(tokenizer, "<think>hello\n</think>\n\nthe ST")
    _, pieces, _ = play(tokens, request(stop=("STOP",)), tokenizer)
    assert shown(pieces, "reasoning") == "hello"
    assert shown(pieces, "answer") == "the "  # ST may become STOP
