"""Unfinished answers go on where they were; suspects run alone; what memory cost is told."""

import signal
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import pytest

from pipeline.engines.echo import EchoEngine, Misbehaviour
from pipeline.ledger.ledger import Ledger
from pipeline.output.native import render
from pipeline.prompting.encoder import BytesEncoder
from pipeline.records import Completion, Prompt, Request, Settings, Unfinished
from pipeline.runner import Runner
from pipeline.stop import Stop
from tests.command import kill_after, overnight, read_output, start, wait_until, without_times, write_job
from tests.faults.small_run import NUM_ITEMS, answer, identity


class Scripted:
    """An engine whose every answer takes four tokens, one a step, and that notes what it was given."""

    slots = 1
    out_of_memory_events = 0

    def __init__(self, *, raises_at: int | None = None) -> None:
        self.given: list[tuple[int, tuple[int, ...]]] = []
        self.most_together = 0
        self._raises_at = raises_at
        self._in_flight: dict[int, list[int]] = {}

    def generate(self, requests: Iterator[Request]) -> Generator[Completion | None]:
        try:
            for request in requests:
                self.given.append((request.item.index, request.generated))
                self._in_flight[request.item.index] = list(request.generated)
            self.most_together = max(self.most_together, len(self._in_flight))
            for index, tokens in list(self._in_flight.items()):
                while len(tokens) < 4:
                    if index == self._raises_at:
                        raise RuntimeError("the device is gone")
                    tokens.append(len(tokens))
                    yield None
                del self._in_flight[index]
                yield answer(index)
        finally:
            self._in_flight = {}

    def unfinished(self) -> Sequence[Unfinished]:
        return [Unfinished(index, 0, tuple(tokens)) for index, tokens in self._in_flight.items() if tokens]

    def close(self) -> None:
        pass


def run(output: Path, engine: object, *, steps: int = 10**6, saves: bool = True, max_attempts: int = 3) -> None:
    """One session over the small run's items, stopped after so many steps as a signal does."""
    stop = Stop(grace_s=0.0)
    left = iter(range(steps - 1))

    def beat() -> None:
        if next(left, None) is None:
            stop.request("SIGTERM")

    prompts = [Prompt(answer(index).item, "word", None, Settings()) for index in range(NUM_ITEMS)]
    with Ledger.open(output, identity()) as ledger:
        runner = Runner(
            encode=BytesEncoder(context_length=1000, over_length="error").encode,
            engine=engine,  # type: ignore[arg-type]
            ledger=ledger,
            render=render,
            num_samples=1,
            stop=stop,
            beat=beat,
            observe=lambda _tally, _num_in_flight: None,
            max_attempts=max_attempts,
            save_unfinished_s=3600 if saves else None,
        )
        if ledger.has_suspects:
            runner.run_alone(prompts)
        runner.run(prompts)
        if not ledger.is_complete:
            ledger.close("stopped")


def test_a_stop_saves_unfinished_answers_and_the_next_session_goes_on_with_them(tmp_path: Path) -> None:
    run(tmp_path / "x", Scripted(), steps=7)  # the first answer and two tokens of the second
    later = Scripted()
    run(tmp_path / "x", later)
    assert later.given[0] == (1, (0, 1))
    assert [index for index, _ in later.given] == [1, 2, 3, 4]


def test_where_answers_must_not_depend_on_an_interruption_nothing_is_saved(tmp_path: Path) -> None:
    run(tmp_path / "x", Scripted(), steps=7, saves=False)
    later = Scripted()
    run(tmp_path / "x", later, saves=False)
    assert later.given[0] == (1, ())


def test_what_was_in_flight_at_a_fault_is_tried_alone_and_given_up_in_the_end(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="gone"):
        run(tmp_path / "x", Scripted(raises_at=2))
    for _ in range(2):
        engine = Scripted(raises_at=2)
        with pytest.raises(RuntimeError, match="gone"):
            run(tmp_path / "x", engine)
        assert engine.most_together == 1
    last = Scripted(raises_at=2)
    run(tmp_path / "x", last)
    assert 2 not in [index for index, _ in last.given]
    with Ledger.open(tmp_path / "x", identity()) as ledger:
        assert ledger.is_complete
        assert ledger.tally.errors == {"crashed": 1, "broken": 1}  # `answer` breaks another by itself


def test_an_item_is_not_given_up_before_it_was_alone(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        run(tmp_path / "x", Scripted(raises_at=2), max_attempts=1)
    engine = Scripted()
    run(tmp_path / "x", engine, max_attempts=1)
    assert engine.most_together == 1  # alone, and answered
    with Ledger.open(tmp_path / "x", identity()) as ledger:
        assert ledger.tally.errors == {"broken": 1}


def test_every_time_that_memory_ran_out_is_in_the_tally(tmp_path: Path) -> None:
    engine = EchoEngine(slots=4, misbehaviour=Misbehaviour(oom_at=2))
    run(tmp_path / "x", engine)
    with Ledger.open(tmp_path / "x", identity()) as ledger:
        assert engine.out_of_memory_events >= 2  # beside others, and alone
        assert ledger.tally.out_of_memory_events == engine.out_of_memory_events
        assert ledger.tally.errors == {"out_of_memory": 1}


LONG = [{"prompt": " ".join(f"word{i}" for i in range(40 + n))} for n in range(3)]


def test_answers_longer_than_every_session_come_to_their_end(tmp_path: Path) -> None:
    """Killed without warning again and again: only what was saved can bring the run forward."""
    generation = {"temperature": 1.0, "max_new_tokens": 1000}
    (tmp_path / "once").mkdir()
    assert overnight("run", write_job(tmp_path / "once", LONG, generation=generation)).returncode == 0
    expected, _ = read_output(tmp_path / "once" / "out.jsonl")
    job = write_job(
        tmp_path,
        LONG,
        generation=generation,
        model={"engine": "echo", "echo": {"delay": "1s"}},
        run={"save_unfinished": "100ms"},
    )
    journal = tmp_path / "out.jsonl.journal"
    for _ in range(50):
        size = journal.stat().st_size if journal.exists() else 0
        process = start("run", job)

        def saved_or_done(process=process, size=size) -> bool:
            if process.poll() is not None:
                return True
            return journal.exists() and journal.read_bytes()[size:].count(b'"unfinished"') >= 4

        wait_until(saved_or_done)
        if kill_after(process, 0) == 0:
            break
    answers, summary = read_output(tmp_path / "out.jsonl")
    assert without_times(answers) == without_times(expected)
    durations = [session["duration"] for session in summary["sessions"]]
    assert len(durations) > 3 and max(durations) < 1.0  # none of the answers fits in a session
    assert {session["ended"] for session in summary["sessions"][:-1]} == {"killed"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGXCPU])
def test_a_signal_ends_the_run_within_the_grace_however_long_an_answer_takes(tmp_path: Path, number: int) -> None:
    job = write_job(tmp_path, LONG, model={"engine": "echo", "echo": {"delay": "1h"}}, run={"save_unfinished": "100ms"})
    process = start("run", job)
    journal = tmp_path / "out.jsonl.journal"
    wait_until(lambda: journal.exists() and b'"admit"' in journal.read_bytes())
    assert kill_after(process, 0, number) == 75
