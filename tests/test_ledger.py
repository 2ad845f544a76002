"""What is committed stays, each answer once, whatever fails or dies and wherever it does."""

import errno
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import BusyError, DataError, OvernightError, WriteError
from pipeline.ledger import ledger as ledger_module
from pipeline.ledger.files import Files, Patience, RunPaths
from pipeline.ledger.history import History
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.witness import Witness
from pipeline.records import Completion, Item, Request, Settings, Unfinished
from tests.faults.crash_states import Killed, Note, Recorder
from tests.faults.small_run import (
    NUM_ITEMS,
    UnsyncedFiles,
    answer,
    finish,
    identity,
    known,
    line,
    open_ledger,
    published,
    run_session,
    summarize,
)

FILES = UnsyncedFiles()


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out.jsonl"


class Clock:
    """Stands in for time.monotonic in the ledger."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(ledger_module.time, "monotonic", lambda: self.now)


def append(ledger, *indexes):
    for index in indexes:
        ledger.append(answer(index), line(index))


# Answers


def test_answers_are_acknowledged_by_the_commit(output):
    with open_ledger(output, FILES) as ledger:
        append(ledger, 3, 1)
        assert not ledger.is_done(1, 0)
        assert (ledger.tally.completed, ledger.tally.failed) == (0, 0)
        ledger.commit()
        assert [ledger.is_done(index, 0) for index in range(5)] == [False, True, False, True, False]
        assert (ledger.tally.completed, ledger.tally.failed) == (1, 1)
        assert RunPaths(output).partial.read_bytes() == line(3) + line(1)
        assert (ledger.num_answers, ledger.is_complete) == (5, False)


def test_an_item_lacks_an_answer_until_its_last_sample_is_there(output):
    job = identity(4, 3)
    with open_ledger(output, FILES, identity=job) as ledger:
        for index, sample in ((0, 0), (0, 1), (0, 2), (1, 2), (1, 0), (3, 0), (3, 1), (3, 2)):
            ledger.append(answer(index, sample), line(index, sample))
        ledger.commit()
        assert [ledger.is_done(1, sample) for sample in range(3)] == [True, False, True]
        assert [ledger.next_unanswered_item(index) for index in range(5)] == [1, 1, 2, None, None]
        ledger.append(answer(1, 1), line(1, 1))
    with open_ledger(output, FILES, identity=job) as ledger:
        assert [ledger.next_unanswered_item(index) for index in range(4)] == [2, 2, 2, None]
        assert ledger.input_sha256 == "4 lines"


def test_what_nobody_asked_for_is_refused(output):
    with open_ledger(output, FILES, identity=identity(5, 2)) as ledger:
        ledger.append(answer(0), line(0))
        ledger.commit()
        ledger.append(answer(1), line(1))
        for index, sample in ((0, 0), (1, 0)):
            with pytest.raises(ValueError, match="answered already"):
                ledger.append(answer(index, sample), line(index, sample))
        for index, sample in ((5, 0), (0, 2), (-1, 0), (0, -1)):
            with pytest.raises(ValueError, match="the run has no item"):
                ledger.append(answer(index, sample), line(0))
        for bad in (b"", b"no line end", b"two\nlines\n", b"\n\n"):
            with pytest.raises(ValueError, match="one line"):
                ledger.append(answer(2), bad)
        ledger.commit()
        assert RunPaths(output).partial.read_bytes() == line(0) + line(1)


# Group commit


def test_a_group_is_committed_when_its_oldest_answer_has_waited_a_second(output, monkeypatch):
    clock = Clock(monkeypatch)
    with open_ledger(output, FILES) as ledger:
        clock.now += 60
        append(ledger, 0)
        assert not ledger.commit_if_due()
        clock.now += 0.9
        append(ledger, 1)
        assert not ledger.commit_if_due()
        clock.now += 0.2
        assert ledger.commit_if_due()
        assert ledger.tally.completed == 2
        clock.now += 60
        assert not ledger.commit_if_due()


def test_a_large_group_is_committed_at_once(output, monkeypatch):
    Clock(monkeypatch)
    with open_ledger(output, FILES) as ledger:
        ledger.append(answer(0), b"x" * (5 << 20) + b"\n")
        assert not ledger.commit_if_due()
        ledger.append(answer(1), b"x" * (3 << 20) + b"\n")
        assert ledger.commit_if_due()


def test_syncs_are_shared_by_many_answers(output, monkeypatch):
    """What makes the ledger cheap: at any rate of answers, two syncs a second."""
    clock = Clock(monkeypatch)
    syncs = []

    class Counting(UnsyncedFiles):
        def sync(self, descriptor):
            syncs.append(descriptor)

    with open_ledger(output, Counting(), identity=identity(20_000)) as ledger:
        syncs.clear()
        for index in range(20_000):
            ledger.append(Completion(Item(index, "in.jsonl", 1, 0), 0, "stop"), b"{}\n")
            clock.now += 1 / 5_000
            ledger.commit_if_due()
        assert 6 <= len(syncs) <= 8


# Admission and unfinished answers


def request(index):
    return Request(answer(index).item, 0, (1,), Settings())


class Told(Witness):
    """Says of every death what it was told to say."""

    def __init__(self, cause):
        super().__init__(Path("none.log"))
        self._told = cause

    def mark(self):
        return {"process": 1}

    def cause(self, mark):
        assert mark == {"process": 1}
        return self._told


CRASHED = Told("crashed")


def suspects(ledger):
    items, index = [], 0
    while (item := ledger.next_suspect_item(index)) is not None:
        items.append(item)
        index = item + 1
    assert ledger.has_suspects == bool(items)
    return items


def test_suspects_are_those_in_flight_at_a_death_until_they_are_answered(output):
    recorder = Recorder(output.parent)
    ledger = open_ledger(output, recorder, witness=CRASHED)
    ledger.admit([(0, 0), (2, 0), (4, 0)])
    append(ledger, 2)
    ledger.commit()
    recorder.die()
    with open_ledger(output, FILES, witness=CRASHED) as ledger:
        assert suspects(ledger) == [0, 4]
        assert [len(ledger.charges(index, 0)) for index in range(NUM_ITEMS)] == [1, 0, 0, 0, 1]
        assert [session.ended for session in ledger.sessions] == ["crashed", "running"]
        append(ledger, 4)
        ledger.commit()
        assert suspects(ledger) == [0]
        ledger.close("stopped")
    with open_ledger(output, FILES, witness=CRASHED) as ledger:
        assert suspects(ledger) == [0]


def test_a_death_that_nothing_explains_makes_no_suspects(output):
    for _ in range(100):
        recorder = Recorder(output.parent)
        ledger = open_ledger(output, recorder, witness=Told(None))
        assert suspects(ledger) == []
        ledger.admit([(0, 0)])
        recorder.die()


def test_requests_are_admitted_before_they_are_handed_on(output):
    recorder = Recorder(output.parent)
    ledger = open_ledger(output, recorder, witness=CRASHED)
    handed = ledger.admitting(request(index) for index in range(5))
    assert [next(handed).item.index for _ in range(3)] == [0, 1, 2]
    recorder.die()
    with open_ledger(output, FILES, witness=CRASHED) as ledger:
        assert suspects(ledger) == [0, 1, 2]  # and none that the engine never saw


def test_admission_takes_as_many_lines_as_answers_take_time(output, monkeypatch):
    clock = Clock(monkeypatch)
    num_items = 3000
    with open_ledger(output, FILES, identity=identity(num_items)) as ledger:
        before = RunPaths(output).journal.read_bytes().count(b"\n")
        for taken in ledger.admitting(request(index) for index in range(num_items)):
            clock.now += 1 / 1000
            ledger.append(answer(taken.item.index), b"{}\n")
        num_lines = RunPaths(output).journal.read_bytes().count(b"\n") - before
    # The first second is taken for slow; then ten lines a second.
    assert num_lines < 150


def test_unfinished_answers_are_found_again_until_they_are_answered(output):
    recorder = Recorder(output.parent)
    ledger = open_ledger(output, recorder)
    journal = RunPaths(output).journal
    ledger.save_unfinished([Unfinished(0, 0, (7,) * 1000), Unfinished(1, 0, (8, 9))])
    size = journal.stat().st_size
    ledger.save_unfinished([Unfinished(0, 0, (*(7,) * 1000, 5)), Unfinished(1, 0, (8, 9))])
    assert journal.stat().st_size - size < 100  # only what is new
    size = journal.stat().st_size
    ledger.save_unfinished([Unfinished(1, 0, (8, 9))])
    ledger.save_unfinished([])
    assert journal.stat().st_size == size
    ledger.save_unfinished([Unfinished(1, 0, (8, 1, 2))])  # started over
    recorder.die()
    with open_ledger(output, FILES) as ledger:
        assert ledger.unfinished == {(0, 0): (*(7,) * 1000, 5), (1, 0): (8, 1, 2)}
        append(ledger, 0)
    with open_ledger(output, FILES) as ledger:
        assert ledger.unfinished == {(1, 0): (8, 1, 2)}


# Sessions


def test_sessions_tell_how_long_they_took_and_how_they_ended(output, monkeypatch):
    clock = Clock(monkeypatch)
    recorder = Recorder(output.parent)
    ledger = open_ledger(output, recorder)
    clock.now += 30
    ledger.loaded(29.5)
    clock.now += 5
    append(ledger, 0, 1)
    ledger.commit()
    clock.now += 5
    recorder.die()
    with open_ledger(output, FILES) as ledger:
        ledger.loaded(1.0)
        clock.now += 2
        append(ledger, 2)
        ledger.close("time_limit")
    with open_ledger(output, FILES) as ledger:
        ledger.loaded(2.0)
        append(ledger, 3, 4)
        clock.now += 3
        told = []

        def listen(_tally, sessions, _sha256):
            told.extend(sessions)
            return {}

        ledger.publish(listen, summary_line=True)
    told = [(each.duration, each.load_s, each.completed, each.ended) for each in told]
    assert told == [(5.0, 29.5, 2, "killed"), (2.0, 1.0, 1, "time_limit"), (3.0, 2.0, 1, "finished")]
    assert abs(ledger.sessions[0].started_at - time.time()) < 60


def test_an_exception_that_nobody_foresaw_is_a_crash_that_keeps_the_answers(output):
    with pytest.raises(ZeroDivisionError), open_ledger(output, FILES) as ledger:
        append(ledger, 0)
        1 / 0  # noqa: B018
    with open_ledger(output, FILES) as ledger:
        assert ledger.sessions[0].ended == "crashed"
        assert ledger.is_done(0, 0)


def test_a_run_is_held_until_it_is_closed(output):
    ledger = open_ledger(output, FILES)
    with pytest.raises(BusyError):
        open_ledger(output, FILES)
    ledger.close("stopped")
    ledger.close("failed")  # once is enough
    with open_ledger(output, FILES) as ledger:
        assert ledger.sessions[0].ended == "stopped"


# Failures


def run_on_failing_disk(output, code, step, count):
    """A whole run on a disk that refuses the operations from `step` on, `count` of them.

    Whether it came to its end, and which answers it had acknowledged.
    """
    recorder = Recorder(output.parent)
    finished = False

    def fail(_operation, _path):
        if step < recorder.num_steps <= step + count:
            raise OSError(code, os.strerror(code))

    recorder.fail = fail
    try:
        run_session(output, recorder)
        finished = True
    except OvernightError as error:
        assert error.exit_code in (73, 74)
    recorder.die()
    notes = [operation.value["done"] for operation in recorder.log if isinstance(operation, Note)]
    return finished, notes[-1] if notes else set()


@pytest.mark.parametrize("count", [1, 1000])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_any_operation_may_fail_once_or_for_ever(tmp_path, code, count):
    finished = False
    step = 0
    while not finished:
        directory = tmp_path / str(step)
        directory.mkdir()
        output = directory / "out.jsonl"
        finished, acknowledged = run_on_failing_disk(output, code, step, count)
        if output.exists():
            assert output.read_bytes() == published()[0]
        assert acknowledged <= finish(output, FILES)["done"]
        assert output.read_bytes() == published()[0]
        step += 1
    assert step > 40


def test_a_failed_commit_is_taken_back_and_can_be_tried_again(output):
    paths = RunPaths(output)

    class Full(UnsyncedFiles):
        left = 1 << 20

        def write(self, descriptor, data):
            fits = data[: self.left]
            self.left -= len(fits)
            super().write(descriptor, fits)
            if len(fits) < len(data):
                raise OSError(errno.ENOSPC, "No space left on device")

    files = Full()
    with open_ledger(output, files) as ledger:
        append(ledger, 0)
        ledger.commit()
        sizes = paths.partial.stat().st_size, paths.journal.stat().st_size
        append(ledger, 1, 2)
        # Room for a part of the group; for the group and a part of its record.
        for room in (5, len(line(1) + line(2)) + 5):
            files.left = room
            with pytest.raises(WriteError, match="No space left"):
                ledger.commit()
            assert (paths.partial.stat().st_size, paths.journal.stat().st_size) == sizes
            assert ledger.tally.completed == 1
        files.left = 1 << 20
        ledger.commit()
        assert ledger.tally.completed == 3


def test_a_full_disk_is_waited_for_and_nothing_is_generated_twice(output):
    class Full(UnsyncedFiles):
        full = False

        def write(self, descriptor, data):
            if self.full:
                super().write(descriptor, data[: len(data) // 2])
                raise OSError(errno.ENOSPC, "No space left on device")
            super().write(descriptor, data)

    files, naps = Full(), []

    def sleep(seconds):
        naps.append(seconds)
        files.full = len(naps) < 5

    ledger = Ledger.open(output, identity(), files=files, patience=Patience(60.0, sleep))
    append(ledger, *range(5))
    files.full = True
    ledger.publish(summarize, summary_line=True)
    ledger.close()
    assert len(naps) == 5
    assert output.read_bytes() == published()[0]


@pytest.mark.parametrize("sync", [1, 2])
def test_a_failed_sync_ends_the_run_and_is_not_repeated(output, sync):
    paths = RunPaths(output)

    class Failing(UnsyncedFiles):
        left = 1000
        failed = None

        def sync(self, descriptor):
            assert descriptor != self.failed
            self.left -= 1
            if self.left == 0:
                self.failed = descriptor
                raise OSError(errno.EIO, "Input/output error")

    files = Failing()
    ledger = open_ledger(output, files)
    append(ledger, 0)
    ledger.commit()
    sizes = paths.partial.stat().st_size, paths.journal.stat().st_size
    append(ledger, 1)
    files.left = sync  # of the partial, of the journal
    with pytest.raises(WriteError, match="Input/output error"):
        ledger.commit()
    assert (paths.partial.stat().st_size, paths.journal.stat().st_size) == sizes
    with pytest.raises(WriteError):
        ledger.commit()
    ledger.close()
    assert files.failed is not None
    assert paths.partial.stat().st_size == sizes[0]
    finish(output, FILES)
    assert output.read_bytes() == published()[0]


@pytest.mark.parametrize("suffix", [".partial", ".journal"])
def test_a_second_writer_is_noticed_and_its_bytes_are_left_alone(output, suffix):
    path = output.with_name(output.name + suffix)
    ledger = open_ledger(output, FILES)
    append(ledger, 0)
    ledger.commit()
    with path.open("ab") as other:
        other.write(b"theirs")
    content = path.read_bytes()
    append(ledger, 1)
    with pytest.raises(DataError, match=r"another program writes to it; nothing more was written"):
        ledger.commit()
    with pytest.raises(DataError):
        ledger.commit()
    assert path.read_bytes() == content
    assert not RunPaths(output).partial.read_bytes().endswith(line(1))


def test_what_interrupts_a_wait_leaves_a_ledger_that_can_be_closed(output):
    class Full(UnsyncedFiles):
        full = False

        def write(self, descriptor, data):
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            super().write(descriptor, data)

    files = Full()

    def sleep(_seconds):
        files.full = False
        raise KeyboardInterrupt

    ledger = Ledger.open(output, identity(), files=files, patience=Patience(60.0, sleep))
    append(ledger, 0)
    files.full = True
    with pytest.raises(KeyboardInterrupt):
        ledger.commit()
    ledger.close("stopped")
    with open_ledger(output, FILES) as ledger:
        assert ledger.is_done(0, 0)
        assert ledger.sessions[0].ended == "stopped"


def test_an_interrupt_at_the_worst_moment_commits_no_answer_twice(output, monkeypatch):
    """The group and its record are on the disk, and the ledger has not taken note of it."""
    ledger = open_ledger(output, FILES)
    append(ledger, 0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(History, "apply", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        ledger.commit()
    ledger.close("stopped")
    assert finish(output, FILES)["done"] == {0}
    assert output.read_bytes() == published()[0]


# Deaths


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_stop_anywhere_and_resume_gives_each_line_once(tmp_path_factory, data):
    """Any mixture of commits, deaths at any operation, failures and stops in good order."""
    output = tmp_path_factory.mktemp("run") / "out.jsonl"
    num_items, num_samples = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 2))
    job = identity(num_items, num_samples)
    pairs = [(index, sample) for index in range(num_items) for sample in range(num_samples)]
    acknowledged = set()
    for _ in range(data.draw(st.integers(0, 4))):
        recorder = Recorder(output.parent, kill_at=data.draw(st.integers(0, 40)))
        try:
            with open_ledger(output, recorder, identity=job) as ledger:
                assert acknowledged <= known(ledger)["done"]
                left = [pair for pair in pairs if not ledger.is_done(*pair)]
                for index, sample in data.draw(st.permutations(left)):
                    ledger.append(answer(index, sample), line(index, sample))
                    if data.draw(st.booleans()):
                        ledger.commit()
                        acknowledged = known(ledger)["done"]
                if data.draw(st.booleans()):
                    ledger.publish(summarize, summary_line=True)
                ledger.close("stopped")
        except (Killed, ValueError):
            pass
        recorder.die()
    with open_ledger(output, FILES, identity=job) as ledger:
        assert acknowledged <= known(ledger)["done"]
        for index, sample in pairs:
            if not ledger.is_done(index, sample):
                ledger.append(answer(index, sample), line(index, sample))
        ledger.publish(summarize, summary_line=True)
    assert output.read_bytes() == published(num_items, num_samples)[0]


def halfway(directory):
    """The files of a run of three commits, the last of them a moment before its death."""
    recorder = Recorder(directory)
    ledger = open_ledger(directory / "out.jsonl", recorder)
    for group in ([1, 0], [4], [2]):
        ledger.admit((index, 0) for index in group)
        append(ledger, *group)
        ledger.commit()
    recorder.die()


@pytest.mark.parametrize("suffix", [".partial", ".journal"])
def test_a_file_cut_at_any_byte_loses_at_most_what_was_behind(tmp_path, suffix):
    halfway(tmp_path)
    output = tmp_path / "out.jsonl"
    path = output.with_name(output.name + suffix)
    before = {each: each.read_bytes() for each in tmp_path.iterdir()}
    ends = {at + shift for at, byte in enumerate(before[path]) if byte == 10 for shift in (-1, 0, 1, 2)}
    for size in sorted({*range(0, len(before[path]), 11), *ends}):
        for each in tmp_path.iterdir():
            each.unlink()
        for each, content in before.items():
            each.write_bytes(content)
        path.write_bytes(before[path][:size])
        try:
            found = finish(output, FILES)
        except DataError:  # a commit is on record whose answers are not there; or there is no header
            assert suffix == ".partial" or b"\n" not in before[path][:size]
            continue
        whole = before[path][:size].count(b'"kind":"commit"')
        assert len(found["done"]) >= [0, 2, 3, 4][whole - (not before[path][:size].endswith(b"\n") and whole > 0)]
        assert output.read_bytes() == published()[0]


@pytest.mark.parametrize("seed", range(2))
def test_a_damaged_byte_is_repaired_or_refused(tmp_path, seed):
    """At places drawn at random, before and after publishing."""
    rng = random.Random(seed)
    output = tmp_path / "out.jsonl"
    halfway(tmp_path)
    if seed:
        finish(output, FILES)
    before = {each: each.read_bytes() for each in tmp_path.iterdir()}
    outcomes = set()
    for _ in range(150):
        for each in tmp_path.iterdir():
            each.unlink()
        for each, content in before.items():
            each.write_bytes(content)
        path = rng.choice([RunPaths(output).partial, RunPaths(output).journal])
        content = before[path]
        at = rng.randrange(len(content))
        new = rng.choice([bytes((content[at] ^ (1 << rng.randrange(8)),)), b"\0", b""])
        path.write_bytes(content[:at] + new + content[at + 1 :])
        try:
            finish(output, FILES)
        except DataError:
            outcomes.add("refused")
        else:
            outcomes.add("repaired")
            assert output.read_bytes() == published()[0]
    assert "refused" in outcomes
    assert seed or "repaired" in outcomes


KILLED_RUN = """
import sys, time
from pathlib import Path
from pipeline.ledger.ledger import Ledger
from tests.faults.small_run import answer, identity, line, summarize
ledger = Ledger.open(Path(sys.argv[1]), identity(400))
print(ledger.tally.completed + ledger.tally.failed, flush=True)
for index in range(400):
    if not ledger.is_done(index, 0):
        time.sleep(0.001)
        ledger.append(answer(index), line(index))
        if index % 5 == 4:
            ledger.commit()
            print(ledger.tally.completed + ledger.tally.failed, flush=True)
ledger.publish(summarize, summary_line=True)
ledger.close()
print("published", flush=True)
"""


def kill_and_resume(output, rng, num_kills):
    """Real processes, killed at a random moment after so many acknowledged commits; how often one was killed."""
    killed = 0
    for _ in range(num_kills):
        with subprocess.Popen(
            [sys.executable, "-c", KILLED_RUN, str(output)], stdout=subprocess.PIPE, text=True
        ) as child:
            for _ in range(rng.randrange(1, 30)):
                acknowledged = child.stdout.readline().strip()
            time.sleep(rng.uniform(0, 0.01))
            child.kill()
            rest = child.stdout.read().split()
        killed += "published" not in [acknowledged, *rest]
        acknowledged = [word for word in [acknowledged, *rest] if word.isdigit()]
        if acknowledged:
            with open_ledger(output, FILES, identity=identity(400)) as ledger:
                assert ledger.tally.completed + ledger.tally.failed >= int(acknowledged[-1])
    finish(output, FILES, identity=identity(400))
    assert output.read_bytes() == published(400)[0]
    return killed


def test_a_killed_process_loses_nothing_that_it_acknowledged(output):
    assert kill_and_resume(output, random.Random(0), 5) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_killed_processes_lose_nothing_that_they_acknowledged(output, seed):
    kill_and_resume(output, random.Random(seed), 8)


# Scale


@pytest.mark.slow
def test_millions_of_items_are_resumed_and_published_in_time_and_memory(output):
    """Ten million items in half a minute and with sixteen bytes each, measured on two million."""
    program = """
import resource, sys, time
from pathlib import Path
from pipeline.ledger.files import Patience
from pipeline.ledger.identity import Identity
from pipeline.ledger.ledger import Ledger
from pipeline.records import Completion, Item
from tests.faults.small_run import identity
output, count = Path(sys.argv[1]), int(sys.argv[2])
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
with Ledger.open(output, identity(count)) as ledger:
    for index in range(count):
        answer = Completion(Item(index, "in", 1, 0), 0, "stop")
        ledger.append(answer, b'{"index":%d,"text":"%s"}\\n' % (index, b"x" * 80))
        ledger.commit_if_due()
started = time.process_time()
with Ledger.open(output, identity(count)) as ledger:
    resume_s = time.process_time() - started
    ledger.publish(lambda tally, sessions, sha256: {}, summary_line=False)
print(peak(), resume_s, time.process_time() - started)
"""

    def measure(count):
        command = [sys.executable, "-c", program, str(output.with_name(str(count))), str(count)]
        return map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())

    count = 2_000_000
    small_peak, _, _ = measure(100_000)
    peak, resume_s, total_s = measure(count)
    assert (peak - small_peak) / (count - 100_000) <= 16
    assert resume_s < 30 * count / 10_000_000
    assert total_s < 90 * count / 10_000_000


def test_real_syncs_are_in_the_way_of_nothing(output):
    with open_ledger(output, Files()) as ledger:
        append(ledger, *range(5))
        ledger.publish(summarize, summary_line=True)
    assert output.read_bytes() == published()[0]
