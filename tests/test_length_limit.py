"""Prompt and answer always fit the context; what is cut is content, and as little of it as asked."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.prompting.length_limit import LengthLimit, OverLength, PromptRefused
from pipeline.records import Message, Settings

FRAME = 3  # tokens around each turn


def encode(messages: Sequence[Message]) -> list[int]:
    """One token for each character, and a frame of three zeros around each turn."""
    return [token for turn in messages for token in (0, *map(ord, turn.content), 0, 0)]


def cut(content: str, num_tokens: int, at_start: bool) -> tuple[str, int]:
    num_tokens = min(num_tokens, len(content))
    return (content[num_tokens:] if at_start else content[: len(content) - num_tokens]), num_tokens


def fit(
    messages: Sequence[Message], context_length: int, max_new_tokens: int, over_length: OverLength
) -> tuple[Sequence[int], Settings]:
    limit = LengthLimit(context_length, over_length)
    return limit.fit(messages, Settings(max_new_tokens=max_new_tokens), encode, cut)


turns = st.lists(
    st.builds(
        Message,
        st.sampled_from(["user", "assistant", "user", "system"]),
        st.text(st.characters(min_codepoint=97, max_codepoint=122), max_size=20),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=500, deadline=None)
@given(
    messages=turns,
    spare=st.integers(-12, 4),  # around the boundary
    max_new_tokens=st.integers(1, 30),
    over_length=st.sampled_from(["error", "truncate-start", "truncate-end"]),
)
def test_prompt_and_answer_fit_and_only_content_is_cut(
    messages: list[Message], spare: int, max_new_tokens: int, over_length: OverLength
) -> None:
    num_tokens = len(encode(messages))
    context_length = max(1, num_tokens + spare)
    is_over = num_tokens >= context_length
    room = min(max_new_tokens, max(1, context_length // 2))
    kept = sum(FRAME + len(turn.content) * (turn.role == "system") for turn in messages)
    try:
        ids, fitted = fit(messages, context_length, max_new_tokens, over_length)
    except PromptRefused as refused:
        assert refused.error.type == "prompt_too_long"
        assert is_over
        assert over_length == "error" or kept >= context_length - room
        assert f"{num_tokens} tokens" in str(refused)
        assert f"context of {context_length} " in str(refused)
        return
    if not is_over:
        assert ids == encode(messages)
        assert fitted.max_new_tokens == min(max_new_tokens, context_length - num_tokens)
        return
    assert over_length != "error"
    assert len(ids) == context_length - room  # not one token more is cut than asked
    assert fitted.max_new_tokens == room
    assert list(ids).count(0) == FRAME * len(messages)
    # What is left of the turns that may be cut is the end, or the start, of what they said.
    said = "".join(turn.content for turn in messages if turn.role != "system")
    left = len(said) - (num_tokens - len(ids))
    expected = said[len(said) - left :] if over_length == "truncate-start" else said[:left]
    systems = "".join(turn.content for turn in messages if turn.role == "system")
    assert sorted(ids) == sorted(encode([Message("user", expected + systems)]) + [0] * (FRAME * (len(messages) - 1)))


@pytest.mark.parametrize(("num_tokens", "max_new_tokens"), [(9, 1), (8, 2), (1, 9), (1, 5)])
def test_an_answer_may_fill_the_context_to_its_last_token(num_tokens: int, max_new_tokens: int) -> None:
    ids, fitted = LengthLimit(10, "error").fit([], Settings(max_new_tokens=30), lambda _: [7] * num_tokens, cut)
    assert len(ids) + fitted.max_new_tokens == 10
    _, fitted = LengthLimit(10, "error").fit(
        [], Settings(max_new_tokens=max_new_tokens), lambda _: [7] * num_tokens, cut
    )
    assert fitted.max_new_tokens == max_new_tokens


@pytest.mark.parametrize("over_length", ["truncate-start", "truncate-end"])
def test_the_answer_is_left_its_room_or_half_the_context(over_length: OverLength) -> None:
    messages = [Message("user", "a" * 500)]
    ids, fitted = fit(messages, 100, 20, over_length)
    assert (len(ids), fitted.max_new_tokens) == (80, 20)
    ids, fitted = fit(messages, 100, 1000, over_length)
    assert (len(ids), fitted.max_new_tokens) == (50, 50)


def test_instructions_are_never_cut() -> None:
    messages = [Message("system", "s" * 30), Message("developer", "d" * 10), Message("user", "u" * 100)]
    ids, _ = fit(messages, 100, 10, "truncate-start")
    assert (list(ids).count(ord("s")), list(ids).count(ord("d"))) == (30, 10)
    with pytest.raises(PromptRefused, match="without any content it has 49"):
        fit(messages, 50, 10, "truncate-start")


def test_a_prompt_without_a_token_is_refused() -> None:
    with pytest.raises(PromptRefused) as caught:
        LengthLimit(10, "error").fit([Message("user", "")], Settings(), lambda _: [], cut)
    assert caught.value.error.type == "empty_prompt"


def test_a_cut_that_makes_other_tokens_is_repeated_until_it_fits() -> None:
    def grudging(content: str, num_tokens: int, at_start: bool) -> tuple[str, int]:
        return cut(content, max(1, num_tokens // 2), at_start)[0], num_tokens  # claims more than it cut

    ids, _ = LengthLimit(50, "truncate-end").fit(
        [Message("user", "a" * 500)], Settings(max_new_tokens=10), encode, grudging
    )
    assert len(ids) == 40
