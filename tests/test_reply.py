"""Reasoning, end, stop strings, text and counts of an answer follow from its tokens alone, whatever the tokenizer."""

from collections.abc import Callable, Sequence
from functools import cache

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipeline.engines.reply import Detokenizer, Reply, Vocabulary
from pipeline.records import Completion, Item, Request, Settings, Timing

CORPUS = ["Hello world, hello there!\n\n", "The end. STOP here; the end of it all.", "äöü € ✓ 日本語 🙂 naïve café"] * 3
TIMING = Timing(started_at=0.0, queue_s=0.0, prefill_s=0.0, decode_s=0.0)
SPECIAL = ["<end>", "<other>", "<think>", "</think>"]


@cache
def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3, Qwen: a token is bytes, a character may span tokens, a token may end within a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@cache
def sentence_piece() -> Tokenizer:
    """As Llama 2 and Gemma: spaces are marks, the first of a text is dropped, unknown characters fall back to bytes."""
    alphabet = ["▁", *"abcdefghijklmnoprstuvwxyzHTSOP.,;!\n"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("l", "l"), ("o", "▁"), ("S", "T"), ("ST", "O"), ("STO", "P")]
    names = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *alphabet, *("".join(m) for m in merges)]
    vocabulary = {name: place for place, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", *SPECIAL])
    return tokenizer


TOKENIZERS = [byte_level, sentence_piece]


def vocabulary(tokenizer: Tokenizer, *, thinking: bool = True) -> Vocabulary:
    return Vocabulary(
        decode=lambda token_ids: tokenizer.decode(list(token_ids), skip_special_tokens=True),
        end_ids=frozenset({tokenizer.token_to_id("<end>"), tokenizer.token_to_id("<other>")}),
        open_id=tokenizer.token_to_id("<think>") if thinking else None,
        close_id=tokenizer.token_to_id("</think>") if thinking else None,
    )


def request(*, reasoning_open: bool = False, generated: Sequence[int] = (), **settings: object) -> Request:
    item = Item(index=3, file="in.jsonl", line=4, offset=0)
    return Request(
        item=item,
        sample=1,
        token_ids=(1, 2, 3),
        settings=Settings(**settings),  # type: ignore[arg-type]
        reasoning_open=reasoning_open,
        generated=tuple(generated),
    )


def answer(tokens: Sequence[int], words: Vocabulary, request: Request) -> Completion:
    """Push until the answer ends; the model would go on for ever."""
    reply = Reply(request, words)
    for token in [*tokens, *[0] * 10_000]:
        if reply.finish_reason is not None:
            break
        reply.push(token)
    return reply.completion(TIMING)


def ids(text: str, tokenizer: Callable[[], Tokenizer] = byte_level) -> list[int]:
    return tokenizer().encode(text).ids


def summary(completion: Completion) -> tuple[str | None, str | None, str, int, int]:
    assert completion.usage is not None
    usage = completion.usage
    return (
        completion.reasoning,
        completion.text,
        completion.finish_reason,
        usage.completion_tokens,
        usage.reasoning_tokens,
    )


# Detokenizing


def shared_pieces(tokens: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    detokenizer = Detokenizer(decode)
    return [detokenizer.push(token) for token in tokens]


@given(st.lists(st.integers(0, 339), max_size=40))
def test_pieces_of_any_bytes_join_to_the_whole_text(tokens: list[int]) -> None:
    words = vocabulary(byte_level())
    assert "".join(shared_pieces(tokens, words.decode)) == words.decode(tokens).rstrip("\ufffd")


texts = st.text(st.sampled_from(" \n.,;!abehlotTSOP€äß日🙂\u0301\ufffd")) | st.sampled_from(CORPUS)


@given(st.sampled_from(TOKENIZERS), st.lists(texts, max_size=4))
@example(sentence_piece, [" ", " a"])
def test_pieces_of_texts_join_to_the_whole_text(make: Callable[[], Tokenizer], parts: list[str]) -> None:
    words = vocabulary(make())
    tokens = [token for part in parts for token in make().encode(part).ids]
    assert "".join(shared_pieces(tokens, words.decode)) == words.decode(tokens).rstrip("\ufffd")


def test_a_special_token_does_not_swallow_the_space_after_it() -> None:
    words = vocabulary(sentence_piece())
    tokens = [*ids("the", sentence_piece), sentence_piece().token_to_id("<other>"), *ids("the", sentence_piece)]
    assert "".join(shared_pieces(tokens, words.decode)) == words.decode(tokens) == "the the"


def test_detokenizing_is_linear() -> None:
    """Every token is decoded a bounded number of times, even in a long run of bytes that are no text."""
    decoded = 0
    words = vocabulary(byte_level())

    def decode(tokens: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(tokens)
        return words.decode(tokens)

    half_a_character = ids("€")[:1]
    tokens = [*ids("Hello world " * 200), *half_a_character * 2000]
    shared_pieces(tokens, decode)
    assert decoded < 150 * len(tokens)


# Stop strings

stops = st.lists(st.text(st.sampled_from(" \n.abehlotSTOP€🙂"), min_size=1, max_size=4), min_size=1, max_size=3)


def naive(tokens: Sequence[int], stop: Sequence[str], words: Vocabulary) -> tuple[str, int, str]:
    """The definition: the first number of tokens whose text, but for an unfinished character, holds a stop string."""
    for count in range(1, len(tokens) + 1):
        text = words.decode(tokens[:count])
        settled = text if count == len(tokens) else text.rstrip("\ufffd")
        places = [settled.find(string) for string in stop if string in settled]
        if places:
            return text[: min(places)], count, "stop"
    return words.decode(tokens), len(tokens), "length"


@given(st.sampled_from(TOKENIZERS), st.lists(texts, min_size=1, max_size=4), stops)
@example(byte_level, ["The end. STOP here"], ["OP h", "P"])
@example(byte_level, ["a€", "b"], ["€"])
@example(byte_level, ["a q7x b"], ["q7x"])
@example(sentence_piece, ["STOP"], ["TO", "S"])
@example(sentence_piece, ["the 日 the"], ["日 "])
def test_stop_strings_cut_as_the_definition_says(
    make: Callable[[], Tokenizer], parts: list[str], stop: list[str]
) -> None:
    tokens = [token for part in parts for token in make().encode(part).ids]
    assume(tokens)
    words = vocabulary(make())
    found = answer(tokens, words, request(stop=tuple(stop), max_new_tokens=len(tokens)))
    text, count, reason = naive(tokens, stop, words)
    assert summary(found) == (None, text, reason, count, 0)


@given(st.lists(st.integers(4, 339), min_size=1, max_size=30), stops)
def test_stop_strings_in_any_bytes_cut_as_the_definition_says(tokens: list[int], stop: list[str]) -> None:
    words = vocabulary(byte_level())
    found = answer(tokens, words, request(stop=tuple(stop), max_new_tokens=len(tokens)))
    text, count, reason = naive(tokens, stop, words)
    assert summary(found) == (None, text, reason, count, 0)


def test_a_stop_string_in_what_no_further_token_will_settle_is_found_at_the_limit() -> None:
    tokens = [*ids("a"), ids("€")[0]]
    found = answer(tokens, vocabulary(byte_level()), request(stop=("\ufffd",), max_new_tokens=2))
    assert summary(found) == (None, "a", "stop", 2, 0)


def test_a_stop_string_within_the_reasoning_is_no_stop() -> None:
    close = byte_level().token_to_id("</think>")
    tokens = [*ids("STOP or not"), close, *ids("\n\nyes STOP no")]
    found = answer(tokens, vocabulary(byte_level()), request(reasoning_open=True, stop=("STOP",)))
    assert (found.reasoning, found.text, found.finish_reason) == ("STOP or not", "yes ", "stop")


def test_the_newlines_between_reasoning_and_answer_are_no_stop_and_no_part_of_one() -> None:
    close = byte_level().token_to_id("</think>")
    tokens = [*ids("hm\n"), close, *ids("\n\nyes\n\nmore")]
    found = answer(tokens, vocabulary(byte_level()), request(reasoning_open=True, stop=("\n\n", "\nyes")))
    assert (found.reasoning, found.text, found.finish_reason) == ("hm", "yes", "stop")


# The end


@pytest.mark.parametrize("name", ["<end>", "<other>"])
def test_an_end_token_ends_the_answer_and_is_counted_but_not_shown(name: str) -> None:
    tokens = [*ids("Hello"), byte_level().token_to_id(name)]
    found = answer(tokens, vocabulary(byte_level()), request())
    assert summary(found) == (None, "Hello", "stop", len(tokens), 0)
    assert (found.item.index, found.sample, found.error, found.timing) == (3, 1, None, TIMING)
    assert found.usage is not None
    assert found.usage.prompt_tokens == 3


def test_an_end_token_that_is_not_special_is_not_shown_either() -> None:
    tokens = ids("Hello.")
    words = Vocabulary(decode=vocabulary(byte_level()).decode, end_ids=frozenset(ids(".")))
    assert answer(tokens, words, request()).text == "Hello"


def test_the_limit_ends_the_answer_with_length() -> None:
    tokens = ids("Hello world, hello there!")
    found = answer(tokens, vocabulary(byte_level()), request(max_new_tokens=2))
    assert summary(found) == (None, byte_level().decode(tokens[:2]), "length", 2, 0)


def test_the_end_at_the_limit_is_still_the_end() -> None:
    tokens = [*ids("Hello"), byte_level().token_to_id("<end>")]
    assert answer(tokens, vocabulary(byte_level()), request(max_new_tokens=len(tokens))).finish_reason == "stop"


def test_ignored_end_tokens_leave_no_trace_in_the_text() -> None:
    end = byte_level().token_to_id("<end>")
    found = answer(
        [end, *ids("a"), end, *ids("b")], vocabulary(byte_level()), request(ignore_eos=True, max_new_tokens=4)
    )
    assert summary(found) == (None, "ab", "length", 4, 0)


def test_stop_strings_work_where_end_tokens_are_ignored() -> None:
    end = byte_level().token_to_id("<end>")
    tokens = [*ids("ab"), end, *ids("c")]
    assert answer(tokens, vocabulary(byte_level()), request(ignore_eos=True, stop=("bc",))).text == "a"


def test_an_answer_without_reasoning_keeps_its_newlines() -> None:
    tokens = [*ids("\n\nHello\n"), byte_level().token_to_id("<end>")]
    assert answer(tokens, vocabulary(byte_level()), request()).text == "\n\nHello\n"


# Reasoning


def test_reasoning_in_the_prompt_lasts_to_the_closing_tag_and_its_tags_are_counted() -> None:
    words = vocabulary(byte_level())
    tokens = [*ids("\nhm\n"), words.close_id, *ids("\n\nyes\n"), byte_level().token_to_id("<end>")]
    found = answer(tokens, words, request(reasoning_open=True))  # type: ignore[arg-type]
    assert summary(found) == ("hm", "yes", "stop", len(tokens), len(ids("\nhm\n")) + 1)


def test_reasoning_opened_by_the_first_token_counts_both_tags() -> None:
    words = vocabulary(byte_level())
    tokens = [words.open_id, *ids("hm"), words.close_id, *ids("yes"), byte_level().token_to_id("<end>")]
    found = answer(tokens, words, request())  # type: ignore[arg-type]
    assert summary(found) == ("hm", "yes", "stop", len(tokens), len(ids("hm")) + 2)


def test_tags_that_decode_to_text_are_in_neither_text() -> None:
    """As in Qwen3, whose tags are not special tokens."""
    (open_id,), (close_id,) = ids("["), ids("]")
    words = Vocabulary(
        vocabulary(byte_level()).decode, frozenset({byte_level().token_to_id("<end>")}), open_id, close_id
    )
    tokens = [*ids("[hm]yes"), byte_level().token_to_id("<end>")]
    assert summary(answer(tokens, words, request())) == ("hm", "yes", "stop", len(tokens), len(ids("[hm]")))


def test_a_tag_later_than_the_first_token_opens_nothing() -> None:
    words = vocabulary(byte_level())
    tokens = [*ids("a"), words.open_id, *ids("b"), words.close_id, *ids("c"), byte_level().token_to_id("<end>")]
    assert summary(answer(tokens, words, request())) == (None, "abc", "stop", len(tokens), 0)  # type: ignore[arg-type]


def test_only_the_first_closing_tag_closes() -> None:
    words = vocabulary(byte_level())
    tokens = [*ids("a"), words.close_id, *ids("b"), words.close_id, *ids("c"), byte_level().token_to_id("<end>")]
    found = answer(tokens, words, request(reasoning_open=True))  # type: ignore[arg-type]
    assert summary(found) == ("a", "bc", "stop", len(tokens), len(ids("a")) + 1)


def test_a_model_without_thinking_has_no_reasoning() -> None:
    tokens = [*ids("hm"), byte_level().token_to_id("</think>"), *ids("yes"), byte_level().token_to_id("<end>")]
    assert answer(tokens, vocabulary(byte_level(), thinking=False), request()).reasoning is None


def test_reasoning_never_closed_leaves_an_empty_answer_that_ends_with_length() -> None:
    words = vocabulary(byte_level())
    tokens = ids("hm, let me think")
    found = answer(tokens, words, request(reasoning_open=True, max_new_tokens=len(tokens), stop=("let",)))
    assert summary(found) == ("hm, let me think", "", "length", len(tokens), len(tokens))


def test_reasoning_that_the_model_ends_without_closing_ends_with_length_too() -> None:
    words = vocabulary(byte_level())
    tokens = [*ids("hm"), byte_level().token_to_id("<end>")]
    found = answer(tokens, words, request(reasoning_open=True))
    assert summary(found) == ("hm", "", "length", len(tokens), len(tokens) - 1)


def test_reasoning_closed_at_once_is_empty_and_not_absent() -> None:
    words = vocabulary(byte_level())
    tokens = [words.close_id, *ids("yes"), byte_level().token_to_id("<end>")]
    found = answer(tokens, words, request(reasoning_open=True))  # type: ignore[arg-type]
    assert summary(found) == ("", "yes", "stop", len(tokens), 1)


@given(budget=st.integers(0, 12), in_prompt=st.booleans(), natural=st.none() | st.integers(0, 12))
def test_the_thinking_budget_closes_the_reasoning_and_is_never_passed(
    budget: int, in_prompt: bool, natural: int | None
) -> None:
    """The model would think for `natural` tokens (None: for ever), then close the tag by itself."""
    words = vocabulary(byte_level())
    assert words.open_id is not None
    assert words.close_id is not None
    reply = Reply(request(reasoning_open=in_prompt, thinking_budget=budget, max_new_tokens=20), words)
    if not in_prompt:
        reply.push(words.open_id)
    own = ids("x")
    num_thoughts = 0
    while reply.in_reasoning and reply.finish_reason is None:
        token = words.close_id if num_thoughts == natural else own[0]
        num_thoughts += 1
        reply.push(token if reply.forced_token is None else reply.forced_token)
    assert reply.forced_token is None
    while reply.finish_reason is None:
        reply.push(ids("y")[0])
    found = reply.completion(TIMING)
    assert found.usage is not None
    least = 1 if in_prompt else 2  # the tags themselves
    wanted = budget if natural is None else min(budget, natural + least)
    assert found.usage.reasoning_tokens == max(wanted, least)
    assert found.text == "y" * (20 - found.usage.reasoning_tokens)
    assert set(found.reasoning or "") <= {"x"}


# Resume


@given(texts, stops, st.integers(0, 30), st.booleans(), st.none() | st.integers(0, 8))
def test_an_answer_resumed_anywhere_is_the_same(
    text: str, stop: list[str], cut: int, reasoning_open: bool, budget: int | None
) -> None:
    words = vocabulary(byte_level())
    tokens = [*ids(text), byte_level().token_to_id("</think>"), *ids(text), byte_level().token_to_id("<end>")]
    settings = {"stop": tuple(stop), "max_new_tokens": 30, "thinking_budget": budget}
    whole = answer(tokens, words, request(reasoning_open=reasoning_open, **settings))
    resumed = request(reasoning_open=reasoning_open, generated=tokens[:cut], **settings)
    assert answer(tokens[cut:], words, resumed) == whole


def test_an_answer_that_was_finished_when_the_session_ended_is_finished_at_once() -> None:
    tokens = [*ids("Hello"), byte_level().token_to_id("<end>")]
    reply = Reply(request(generated=tokens), vocabulary(byte_level()))
    assert reply.finish_reason == "stop"
    assert reply.completion(TIMING).text == "Hello"


def test_an_unfinished_answer_has_no_completion() -> None:
    with pytest.raises(ValueError, match="not finished"):
        Reply(request(), vocabulary(byte_level())).completion(TIMING)
