"""The echo engine is deterministic, bounded by its slots, and misbehaves exactly as told."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engines.echo import EchoEngine, Misbehaviour
from pipeline.records import Completion, Item, Request, Settings


def request(index: int, text: str, *, sample: int = 0, **settings: object) -> Request:
    item = Item(index=index, file="in.jsonl", line=index + 1, offset=0)
    return Request(
        item=item,
        sample=sample,
        token_ids=tuple(text.encode()),
        settings=replace(Settings(), **settings),  # type: ignore[arg-type]
    )


def answers(requests: list[Request], *, slots: int = 4, misbehaviour: Misbehaviour | None = None) -> list[Completion]:
    engine = EchoEngine(slots=slots, misbehaviour=misbehaviour)
    return [answer for answer in engine.generate(iter(requests)) if answer is not None]


@given(st.lists(st.text(min_size=1, max_size=40), max_size=20), st.integers(1, 6))
def test_every_request_is_answered_once_with_its_own_text(texts: list[str], slots: int) -> None:
    got = answers([request(i, text, max_new_tokens=1000) for i, text in enumerate(texts)], slots=slots)
    assert {a.item.index: a.text for a in got} == dict(enumerate(texts))
    assert len(got) == len(texts)


def test_it_takes_no_more_than_its_slots_and_finishes_short_answers_first() -> None:
    taken: list[int] = []

    def pull() -> Iterator[Request]:
        for index, text in enumerate(["a long answer indeed", "short", "mid length", "x"]):
            taken.append(index)
            yield request(index, text)

    stream = EchoEngine(slots=2).generate(pull())
    first = next(stream)
    assert first is not None and first.item.index == 1
    assert taken == [0, 1]
    assert [a.item.index for a in stream if a is not None] == [2, 3, 0]


def test_counts_and_finish_reasons_are_true() -> None:
    ended, cut, stopped = sorted(
        answers(
            [
                request(0, "héllo"),
                request(1, "hé", max_new_tokens=2),
                request(2, "one two three", stop=("two",)),
            ]
        ),
        key=lambda a: a.item.index,
    )
    assert ended.usage is not None and cut.usage is not None
    assert (ended.text, ended.finish_reason, ended.usage.completion_tokens) == ("héllo", "stop", 7)
    assert (cut.text, cut.finish_reason, cut.usage.completion_tokens) == ("h", "length", 2)
    assert (stopped.text, stopped.finish_reason) == ("one ", "stop")


def test_the_random_stream_depends_on_seed_index_and_sample_alone() -> None:
    text = "a b c d e f g h i j k l m n o p"
    alone = answers([request(5, text, temperature=1.0, seed=3)])[0].text
    crowd = answers([request(i, text, temperature=1.0, seed=3) for i in range(9)], slots=3)
    assert next(a.text for a in crowd if a.item.index == 5) == alone
    assert len({a.text for a in crowd}) == 9
    assert answers([request(5, text, temperature=1.0, seed=3, sample=1)])[0].text != alone
    assert answers([request(5, text, temperature=1.0, seed=4)])[0].text != alone


def test_it_fails_and_runs_out_of_memory_where_told() -> None:
    got = answers([request(i, "x") for i in range(6)], misbehaviour=Misbehaviour(fail_every=3, oom_at=0))
    kinds = {a.item.index: a.error.type for a in got if a.error is not None}
    assert kinds == {0: "out_of_memory", 2: "echo_failure", 5: "echo_failure"}


def test_a_slow_echo_gives_a_heartbeat() -> None:
    stream = EchoEngine(slots=1, misbehaviour=Misbehaviour(delay_s=0.12)).generate(iter([request(0, "x")]))
    got = list(stream)
    assert None in got
    assert got[-1] is not None and got[-1].timing is not None
    assert got[-1].timing.decode_s == pytest.approx(0.12)
