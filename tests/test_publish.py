"""The output appears whole or not at all, in the order of the input, and is the one that was decided on."""

import errno
import hashlib
import json
import os
import random
from pathlib import Path
from typing import ClassVar

import pytest

from pipeline.errors import DataError, OutputError, WriteError
from pipeline.ledger.files import Files, RunPaths
from pipeline.ledger.recovery import find_finished
from pipeline.output.native import Native
from tests.faults.small_run import UnsyncedFiles, answer, identity, line, lines, open_ledger, published, summarize


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out.jsonl"


class FailingOnce(UnsyncedFiles):
    """Raises once, at an operation on a path that ends so."""

    def __init__(self, operation, suffix, code=errno.EIO):
        self.operation, self.suffix, self.code = operation, suffix, code

    def _step(self, operation, path):
        if operation == self.operation and path.name.endswith(self.suffix):
            self.operation = None
            raise OSError(self.code, os.strerror(self.code))

    def link(self, source, target):
        self._step("link", target)
        super().link(source, target)

    def rename_new(self, source, target):
        self._step("rename_new", target)
        super().rename_new(source, target)

    def rename(self, source, target):
        self._step("rename", target)
        super().rename(source, target)


def answered(output, files=None, num_items=5, num_samples=1, group=2):
    """A ledger with every answer committed, in no order."""
    job = identity(num_items, num_samples)
    ledger = open_ledger(output, files or UnsyncedFiles(), identity=job)
    numbers = [number for number in range(num_items * num_samples) if not ledger.is_done(*divmod(number, num_samples))]
    random.Random(0).shuffle(numbers)
    for count, number in enumerate(numbers):
        pair = divmod(number, num_samples)
        ledger.append(answer(*pair), line(*pair))
        if count % group == 0:
            ledger.commit()
    ledger.commit()
    return ledger


@pytest.mark.parametrize(("num_items", "num_samples"), [(0, 1), (1, 1), (5, 1), (40, 3)])
def test_the_output_is_in_order_and_ends_with_its_summary(output, num_items, num_samples):
    with answered(output, num_items=num_items, num_samples=num_samples) as ledger:
        assert ledger.is_complete
        assert not output.exists()
        summary = ledger.publish(summarize, summary_line=True)
    assert (output.read_bytes(), RunPaths(output).summary.read_bytes()) == published(num_items, num_samples)
    assert json.loads(RunPaths(output).summary.read_bytes()) == summary
    assert summary["output_sha256"] == hashlib.sha256(lines(num_items, num_samples)).hexdigest()
    names = sorted(path.name.removeprefix("out.jsonl") for path in output.parent.iterdir())
    assert names == ["", ".journal", ".lock", ".partial", ".summary.json"]


def test_the_summary_line_can_be_left_out(output):
    with answered(output) as ledger:
        ledger.publish(summarize, summary_line=False)
    assert output.read_bytes() == lines()
    assert RunPaths(output).summary.read_bytes() == published()[1]
    assert find_finished(output, identity()) is not None


def test_publishing_commits_what_is_open_and_refuses_to_leave_anything_out(output):
    with open_ledger(output, UnsyncedFiles()) as ledger:
        for index in range(4):
            ledger.append(answer(index), line(index))
        with pytest.raises(ValueError, match="1 answers are missing"):
            ledger.publish(summarize, summary_line=True)
        assert not output.exists()
        ledger.append(answer(4), line(4))
        ledger.publish(summarize, summary_line=True)
    assert output.read_bytes() == published()[0]


def test_without_hard_links_it_is_renamed_into_place(output):
    class NoLinks(UnsyncedFiles):
        def link(self, source, target):
            raise PermissionError(errno.EPERM, "Operation not permitted")

    with answered(output, NoLinks()) as ledger:
        ledger.publish(summarize, summary_line=True)
    assert output.read_bytes() == published()[0]


def test_a_file_system_that_cannot_publish_is_refused_before_any_work(output):
    class Neither(UnsyncedFiles):
        def link(self, source, target):
            raise PermissionError(errno.EPERM, "Operation not permitted")

        def rename_new(self, source, target):
            raise OSError(errno.EINVAL, "Invalid argument")

    with pytest.raises(OutputError, match=r"journal: cannot be created"):
        answered(output, Neither())


def test_a_stranger_that_came_meanwhile_is_kept_and_the_answers_too(output):
    with answered(output) as ledger:
        output.write_bytes(b"theirs")
        with pytest.raises(OutputError, match="not of this run"):
            ledger.publish(summarize, summary_line=True)
    assert output.read_bytes() == b"theirs"
    with pytest.raises(OutputError, match="not of this run"):
        answered(output)
    output.unlink()
    with answered(output) as ledger:
        ledger.publish(summarize, summary_line=True)
    assert output.read_bytes() == published()[0]


def test_a_stranger_that_comes_at_the_very_last_moment_is_kept(output):
    class Race(UnsyncedFiles):
        def link(self, source, target):
            if target == output:
                target.write_bytes(b"theirs")
            super().link(source, target)

    with answered(output, Race()) as ledger, pytest.raises(OutputError, match="not of this run"):
        ledger.publish(summarize, summary_line=True)
    assert output.read_bytes() == b"theirs"


def test_a_stranger_of_the_right_size_is_kept(output):
    with answered(output, FailingOnce("link", "out.jsonl")) as ledger, pytest.raises(WriteError):
        ledger.publish(summarize, summary_line=True)
    theirs = b"x" * len(published()[0])
    output.write_bytes(theirs)
    with answered(output) as ledger, pytest.raises(OutputError, match="not of this run"):
        ledger.publish(summarize, summary_line=True)
    assert output.read_bytes() == theirs


@pytest.mark.parametrize(("operation", "suffix"), [("link", "out.jsonl"), ("rename", ".summary.json")])
def test_what_was_decided_is_published_by_the_next_process(output, operation, suffix):
    """The summary has times in it: a second decision would be another file."""
    asked = []

    def summarize_with_a_counter(tally, sessions, sha256):
        asked.append(1)
        return {**summarize(tally, sessions, sha256), "asked": len(asked), "sessions": len(sessions)}

    with answered(output, FailingOnce(operation, suffix)) as ledger, pytest.raises(WriteError):
        ledger.publish(summarize_with_a_counter, summary_line=True)
    with answered(output) as ledger:
        assert ledger.is_complete
        summary = ledger.publish(summarize_with_a_counter, summary_line=True)
        assert ledger.publish(summarize_with_a_counter, summary_line=True) == summary  # once more does no harm
    assert (summary["asked"], summary["sessions"]) == (1, 1)
    assert output.read_bytes() == lines() + RunPaths(output).summary.read_bytes()
    assert find_finished(output, identity()) == summary


def test_another_output_than_the_one_decided_on_is_refused(output):
    with answered(output) as ledger:
        ledger.publish(summarize, summary_line=True)
    output.unlink()
    with answered(output) as ledger, pytest.raises(DataError, match="names an output that these answers do not make"):
        ledger.publish(summarize, summary_line=False)
    assert not output.exists()


def test_a_full_disk_while_publishing_leaves_no_rest_and_no_output(output):
    class Full(UnsyncedFiles):
        def write(self, descriptor, data):
            if b'"index"' in data and self.full:
                super().write(descriptor, data[:10])
                raise OSError(errno.ENOSPC, "No space left on device")
            super().write(descriptor, data)

    files = Full()
    files.full = False
    with answered(output, files) as ledger:
        files.full = True
        with pytest.raises(WriteError, match="No space left"):
            ledger.publish(summarize, summary_line=True)
        files.full = False
    assert not output.exists()
    assert not RunPaths(output).unpublished.exists()
    with answered(output) as ledger:
        ledger.publish(summarize, summary_line=True)
    assert output.read_bytes() == published()[0]


def test_a_rest_that_is_a_second_name_of_the_output_is_not_written_through(output):
    """A process that died between link and unlink has left two names of one file."""
    with answered(output) as ledger:
        ledger.publish(summarize, summary_line=True)
    RunPaths(output).summary.unlink()
    os.link(output, RunPaths(output).unpublished)
    with answered(output) as ledger:
        ledger.publish(summarize, summary_line=True)
    assert output.read_bytes() == published()[0]
    assert RunPaths(output).summary.read_bytes() == published()[1]


def test_the_real_disk_will_do(output):
    with answered(output, Files()) as ledger:
        ledger.publish(summarize, summary_line=True)
    assert output.read_bytes() == published()[0]


class Shouted(Native):
    """Native lines, and beside them the same in capitals."""

    companions: ClassVar = {".loud": lambda lines: (piece.upper() for piece in lines)}


class Dying(UnsyncedFiles):
    """Ends the process, as SIGKILL would, before one operation of all that follow its arming."""

    left = None

    def __getattribute__(self, name):
        attribute = super().__getattribute__(name)
        if callable(attribute) and not name.startswith("_") and self.left is not None:
            self.left -= 1
            if self.left < 0:
                os._exit(9)
        return attribute


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_at_any_step_it_ends_with_all_that_belongs_to_the_output(tmp_path):
    states = set()
    for steps in range(100):
        output = tmp_path / str(steps) / "out.jsonl"
        pid = os.fork()
        if not pid:
            try:
                files = Dying()
                ledger = answered(output, files)
                files.left = steps
                ledger.publish(summarize, summary_line=True, form=Shouted())
            finally:
                os._exit(0)
        _, status = os.waitpid(pid, 0)
        states.add(frozenset(path.name for path in output.parent.iterdir()))
        with open_ledger(output, UnsyncedFiles(), companions=Shouted.companions) as ledger:
            ledger.publish(summarize, summary_line=True, form=Shouted())
        assert output.read_bytes() + lines().upper() == published()[0] + Path(f"{output}.loud").read_bytes()
        assert find_finished(output, identity()) is not None
        assert not list(output.parent.glob("*.unpublished"))
        if os.waitstatus_to_exitcode(status) == 0:
            break
    assert 15 < steps < 99 and len(states) >= 5  # each file has come at a step of its own
