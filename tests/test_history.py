"""What a journal says has happened, session by session."""

import pytest

from pipeline.errors import DataError
from pipeline.ledger.files import DISK, GrowingFile, Patience
from pipeline.ledger.history import VERSION, Charge, read_published, replay
from pipeline.ledger.identity import Header
from pipeline.ledger.journal import Journal, write_runs
from pipeline.summary import Tally
from tests.faults.small_run import answer, identity

SESSION = {"kind": "session", "started_at": 1.0, "death": None, "mark": {}}
LOADED = {"kind": "loaded", "load_s": 2.5}
PUBLISH = {
    "kind": "publish",
    "sha256": "abc",
    "num_bytes": 9,
    "summary": {"failed": 0},
    "input": Header.of(identity(10)).to_record()["input"],
    "elapsed_s": 9.0,
}


def header(num_items=10, version=VERSION):
    return {"kind": "header", "version": version, **Header.of(identity(num_items)).to_record()}


def admit(*numbers):
    return {"kind": "admit", "numbers": write_runs(numbers)}


def commit(start, end, *numbers, elapsed_s=0.0, failed=()):
    tally = Tally()
    for number in numbers:
        tally.add(answer(3 if number in failed else 0))
    record = {"kind": "commit", "start": start, "end": end, "sha256": "", "numbers": write_runs(numbers)}
    return {**record, "failed": write_runs(failed), "tally": tally.to_json(), "elapsed_s": elapsed_s}


def unfinished(*answers):
    return {"kind": "unfinished", "answers": list(answers), "elapsed_s": 0.0}


def end(ended, elapsed_s=0.0):
    return {"kind": "end", "ended": ended, "elapsed_s": elapsed_s}


def history_of(path, *records):
    path.unlink(missing_ok=True)
    journal = Journal(GrowingFile(DISK, path, Patience(0.0)))
    for record in records:
        journal.append(record)
    return replay(path)[0]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.journal"


def test_commits_add_up(path):
    history = history_of(path, header(), SESSION, commit(0, 10, 4, 2), commit(10, 30, 0, 1, 3, failed=(3,)))
    assert list(history.done) == [1, 1, 1, 2, 1, 0, 0, 0, 0, 0]
    assert (history.num_done, history.committed_bytes, history.is_complete) == (5, 30, False)
    assert (history.tally.completed, history.tally.failed) == (4, 1)


@pytest.mark.parametrize(
    "bad",
    [
        commit(11, 20, 5),  # a gap
        commit(0, 10, 5),  # once more
        commit(10, 10, 5),  # nothing
        commit(10, 20, 4),  # answered before
        commit(10, 20, 5, 5),  # twice in one
        commit(10, 20, 10),  # nobody asked
        {"kind": "commit"},
        {"kind": "telepathy"},
        {"kind": "input", "input": Header.of(identity(9)).to_record()["input"]},
    ],
)
def test_a_record_that_makes_no_sense_is_refused(path, bad):
    with pytest.raises(DataError, match="cannot be used"):
        history_of(path, header(), SESSION, commit(0, 10, 4), bad)


def test_a_journal_of_another_version_or_kind_is_refused(path):
    with pytest.raises(DataError, match=f"version {VERSION + 1}.*knows version {VERSION}"):
        history_of(path, header(version=VERSION + 1))
    assert history_of(path, header(version=1), SESSION).is_running
    with pytest.raises(DataError, match="newer version of overnight"):
        history_of(path, header(), SESSION, {"kind": "telepathy"})
    with pytest.raises(DataError, match="no journal"):
        history_of(path, SESSION)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="no readable first line"):
        replay(path)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        replay(path)


def test_sessions_are_told_apart(path):
    history = history_of(
        path,
        header(),
        SESSION,
        LOADED,
        commit(0, 10, 0, 1, elapsed_s=3.0),
        SESSION,  # the first was killed
        commit(10, 20, 2, elapsed_s=1.0),
        end("time_limit", 2.0),
        SESSION,
        LOADED,
    )
    told = [(each.duration, each.load_s, each.completed, each.ended) for each in history.sessions]
    assert told == [(3.0, 2.5, 2, "killed"), (2.0, 0.0, 1, "time_limit"), (0.0, 2.5, 0, "running")]


def session(death):
    return {**SESSION, "death": death}


def test_suspects_are_what_was_in_flight_at_a_death_with_evidence(path):
    died = [header(), SESSION, admit(0, 1, 2, 3), commit(0, 10, 1), admit(4)]
    assert history_of(path, *died).suspects == {}
    together = (Charge("stalled", alone=False),)
    history = history_of(path, *died, session("stalled"))
    assert history.suspects == dict.fromkeys([0, 2, 3, 4], together)
    assert history.sessions[0].ended == "stalled"
    # Answered by a later session, they are suspect no more; the rest stays so, however often it is stopped.
    later = [*died, session("stalled"), admit(0), commit(10, 20, 0), admit(2), end("stopped"), SESSION]
    assert history_of(path, *later).suspects == dict.fromkeys([2, 3, 4], together)
    # Nothing is held against an item when nobody knows what ended the process.
    unexplained = [*later, admit(2), session(None), admit(2), session(None)]
    assert history_of(path, *unexplained).suspects == dict.fromkeys([2, 3, 4], together)
    assert history_of(path, *unexplained).sessions[-2].ended == "killed"
    alone = [*later, admit(2), session("crashed")]
    assert history_of(path, *alone).suspects[2] == (*together, Charge("crashed", alone=True))


def test_what_was_in_flight_alone_is_charged_so_though_others_were_before(path):
    records = [header(), SESSION, admit(0, 1), commit(0, 10, 0), session("out_of_memory")]
    assert history_of(path, *records).suspects == {1: (Charge("out_of_memory", alone=True),)}


@pytest.mark.parametrize("ended", ["stopped", "time_limit", "low_memory", "failed"])
def test_a_session_that_ended_in_good_order_makes_no_suspects_and_a_crash_does(path, ended):
    assert history_of(path, header(), SESSION, admit(0, 1), end(ended), SESSION).suspects == {}
    assert set(history_of(path, header(), SESSION, admit(0, 1), end("crashed"), SESSION).suspects) == {0, 1}


def test_unfinished_tokens_grow_are_replaced_and_dropped_once_answered(path):
    records = [header(), SESSION, unfinished([0, 0, [5, 6]], [1, 0, [7]]), unfinished([0, 2, [8]])]
    assert history_of(path, *records).unfinished == {0: (5, 6, 8), 1: (7,)}
    assert history_of(path, *records, unfinished([0, 1, [9]])).unfinished == {0: (5, 9), 1: (7,)}
    assert history_of(path, *records, end("stopped"), SESSION, commit(0, 10, 0)).unfinished == {1: (7,)}


def test_a_grown_input_reopens_a_published_run(path):
    grown = {"kind": "input", "input": Header.of(identity(12)).to_record()["input"]}
    history = history_of(path, header(2), SESSION, commit(0, 10, 0, 1), PUBLISH)
    assert (history.is_published, history.is_complete, history.sessions[-1].ended) == (True, True, "finished")
    history = history_of(path, header(2), SESSION, commit(0, 10, 0, 1), PUBLISH, grown)
    assert (history.is_published, history.is_complete, len(history.done)) == (False, False, 12)
    assert history.header.input.num_items == 12


def test_a_published_run_is_told_by_the_ends_of_its_journal(path):
    history_of(path, header(), SESSION, commit(0, 10, *range(10)), PUBLISH)
    told, published = read_published(path)
    assert (told.input.num_items, published.sha256, published.summary) == (10, "abc", {"failed": 0})
    for records in (
        [header(), SESSION],
        [header(), SESSION, PUBLISH, SESSION],
        [SESSION, PUBLISH],
        [header(version=9), PUBLISH],
    ):
        path.unlink()
        journal = Journal(GrowingFile(DISK, path, Patience(0.0)))
        for record in records:
            journal.append(record)
        assert read_published(path) is None
    path.unlink()
    assert read_published(path) is None
