"""A run is told from its files, refused where they are not its own, and left alone when it is done."""

import json
import os
import subprocess
import sys
import time

import pytest

from pipeline.errors import BusyError, DataError, OutputError, SpecError
from pipeline.ledger.files import RunPaths
from pipeline.ledger.identity import Identity
from pipeline.ledger.recovery import find_finished, read_run
from tests.faults.small_run import (
    UnsyncedFiles,
    answer,
    finish,
    identity,
    line,
    lines,
    open_ledger,
    published,
    summarize,
)

FILES = UnsyncedFiles()


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out.jsonl"


def stop_halfway(output, **options):
    with open_ledger(output, FILES, **options) as ledger:
        for index in (2, 0):
            ledger.append(answer(index), line(index))
        ledger.close("stopped")


def snapshot(directory):
    """Everything that a run must not touch: content, times, names."""
    return {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino, path.stat().st_nlink)
        for path in directory.iterdir()
    } | {".": directory.stat().st_mtime_ns}


def test_states_of_a_run(output):
    assert read_run(output).state == "absent"
    ledger = open_ledger(output, FILES)
    found = read_run(output)
    assert (found.state, found.process) == ("running", os.getpid())
    ledger.append(answer(0), line(0))
    ledger.close("stopped")
    found = read_run(output)
    assert (found.state, found.history.num_done, found.history.sessions[0].ended) == ("stopped", 1, "stopped")
    finish(output, FILES)
    found = read_run(output)
    assert (found.state, found.history.tally.failed) == ("finished", 1)
    output.with_name("out.jsonl.summary.json").unlink()
    assert read_run(output).state == "publishing"
    output.write_bytes(b"a stranger's\n")
    assert read_run(output).state == "publishing"
    RunPaths(output).journal.write_bytes(b"rubbish\n")
    found = read_run(output)
    assert (found.state, found.history) == ("damaged", None)
    assert "readable first line" in str(found.problem)


def test_a_running_run_of_another_process_is_seen(output):
    stop_halfway(output)
    program = f"""
import time
from pathlib import Path
from tests.faults.small_run import *
ledger = open_ledger(Path({str(output)!r}), UnsyncedFiles())
print("open", flush=True)
time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "open\n"
        before = snapshot(output.parent)
        found = read_run(output)
        assert (found.state, found.process, found.history.num_done) == ("running", child.pid, 2)
        with pytest.raises(BusyError, match=f"process {child.pid} "):
            open_ledger(output, FILES)
        with pytest.raises(BusyError):
            open_ledger(output, FILES, fresh=True)
        assert snapshot(output.parent) == before
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    assert read_run(output).state == "stopped"


def test_a_finished_run_is_told_at_once_and_left_alone(output):
    finish(output, FILES)
    before = snapshot(output.parent)
    time.sleep(0.01)

    def measure(_prefix):
        raise AssertionError("the input need not be read")

    job = identity()
    summary = find_finished(output, Identity(job.fields, 1, job.files, measure), files=FILES)
    assert summary == json.loads(published()[1])
    assert read_run(output).state == "finished"
    assert snapshot(output.parent) == before


def test_what_is_not_finished_is_not_called_so(output):
    assert find_finished(output, identity(), files=FILES) is None
    stop_halfway(output)
    assert find_finished(output, identity(), files=FILES) is None
    finish(output, FILES)
    for path in (RunPaths(output).summary, output):
        kept = path.read_bytes()
        path.unlink()
        assert find_finished(output, identity(), files=FILES) is None
        path.write_bytes(kept)
    assert find_finished(output, identity(), files=FILES) is not None


def test_a_finished_run_of_another_job_or_input_is_refused(output):
    finish(output, FILES)
    before = snapshot(output.parent)
    with pytest.raises(SpecError, match=r"model.path"):
        find_finished(output, identity(**{"model.path": "other"}), files=FILES)
    with pytest.raises(DataError, match="the input has changed"):
        find_finished(output, identity(6), files=FILES)
    with pytest.raises(OutputError, match=r"run.resume is never"):
        find_finished(output, identity(), resume="never", files=FILES)
    # An input that grew is something to do.
    assert find_finished(output, identity(6, before=5), resume="always", files=FILES) is None
    assert snapshot(output.parent) == before


def test_a_changed_job_or_input_changes_nothing(output):
    stop_halfway(output)
    with RunPaths(output).partial.open("ab") as partial:
        partial.write(b"torn")  # what recovery would cut
    before = snapshot(output.parent)
    with pytest.raises(SpecError, match=r"model.path: was \"echo\" when the run began and is \"other\" now"):
        open_ledger(output, FILES, identity=identity(**{"model.path": "other"}))
    with pytest.raises(SpecError, match=r"generation.num_samples"):
        open_ledger(output, FILES, identity=identity(num_samples=2))
    with pytest.raises(DataError, match="the input has changed"):
        open_ledger(output, FILES, identity=identity(6))
    with pytest.raises(DataError, match="the input has changed"):
        open_ledger(output, FILES, identity=identity(6, before=5))
    with pytest.raises(DataError, match="the input has changed"):
        open_ledger(output, FILES, identity=identity(4), resume="always")
    with pytest.raises(OutputError, match=r"run.resume is never"):
        open_ledger(output, FILES, resume="never")
    assert snapshot(output.parent) == before


@pytest.mark.parametrize("suffix", ["", ".summary.json"])
def test_a_stranger_in_our_place_is_refused_and_kept(output, suffix):
    theirs = output.with_name(output.name + suffix)
    theirs.write_bytes(b"theirs")
    with pytest.raises(OutputError, match="exists and is not of this run"):
        open_ledger(output, FILES)
    theirs.unlink()
    stop_halfway(output)
    theirs.write_bytes(b"theirs")
    with pytest.raises(OutputError, match="exists and is not of this run"):
        open_ledger(output, FILES)
    assert theirs.read_bytes() == b"theirs"
    theirs.unlink()
    finish(output, FILES)


def test_a_dangling_link_is_a_stranger_too(output):
    output.symlink_to("nowhere")
    with pytest.raises(OutputError, match="not of this run"):
        open_ledger(output, FILES)


def test_a_changed_output_is_refused(output):
    finish(output, FILES)
    output.write_bytes(b"edited\n")
    assert read_run(output).state == "damaged"
    with pytest.raises(DataError, match="has changed since it was published"):
        open_ledger(output, FILES)
    assert output.read_bytes() == b"edited\n"


def test_an_output_that_was_moved_away_is_published_again(output):
    finish(output, FILES)
    output.rename(output.with_name("taken"))
    assert read_run(output).state == "publishing"
    finish(output, FILES)
    assert output.read_bytes() == published()[0]
    assert find_finished(output, identity(), files=FILES) is not None


def test_missing_files_of_a_run_are_noticed(output):
    stop_halfway(output)
    paths = RunPaths(output)
    paths.journal.rename(output.with_name("kept"))
    with pytest.raises(DataError, match=r"partial: holds answers, and the journal"):
        open_ledger(output, FILES)
    output.with_name("kept").rename(paths.journal)
    paths.partial.unlink()
    with pytest.raises(DataError, match=r"partial: cannot be read"):
        open_ledger(output, FILES)
    assert not paths.partial.exists()


def test_fresh_moves_the_earlier_run_aside(output):
    paths = RunPaths(output)
    ours = (paths.output, paths.partial, paths.journal, paths.summary)
    for number in (1, 2):
        finish(output, FILES, fresh=number > 1, identity=identity(name=f"run {number}"))
        earlier = {path.name: path.read_bytes() for path in ours}
        with open_ledger(output, FILES, fresh=True) as ledger:
            assert ledger.tally.completed == 0
        for name, data in earlier.items():
            # Of the run before, and of the one that has just been begun and closed.
            assert output.with_name(f"{name}.old-{2 * number - 1}").read_bytes() == data
        assert not output.exists()


def test_fresh_without_an_earlier_run_moves_nothing(output):
    open_ledger(output, FILES, fresh=True).close()
    assert not list(output.parent.glob("*.old-*"))


def test_fresh_moves_a_stranger_aside(output):
    output.write_bytes(b"theirs")
    finish(output, FILES, fresh=True)
    assert output.with_name("out.jsonl.old-1").read_bytes() == b"theirs"
    assert output.read_bytes() == published()[0]


def test_a_grown_input_is_gone_on_with_if_allowed(output):
    finish(output, FILES, identity=identity(3))
    assert output.read_bytes() == published(3)[0]
    grown = identity(9, before=3)
    with open_ledger(output, FILES, identity=grown, resume="always") as ledger:
        assert not RunPaths(output).summary.exists()
        assert output.read_bytes() == published(3)[0]  # until the new one takes its place
        assert [ledger.is_done(index, 0) for index in range(9)] == [True] * 3 + [False] * 6
        for index in range(3, 9):
            ledger.append(answer(index), line(index))
        ledger.publish(summarize, summary_line=True)
    assert output.read_bytes().startswith(lines(9))
    # From now on this is the input.
    assert find_finished(output, identity(9), files=FILES) is not None
    with pytest.raises(DataError, match="had 9 items"):
        find_finished(output, identity(3), files=FILES)


def test_a_path_that_cannot_be_made_says_so(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot be created"):
        open_ledger(tmp_path / "file" / "out.jsonl", FILES)
    (tmp_path / "out.jsonl").mkdir()
    with pytest.raises(OutputError, match="not of this run"):
        open_ledger(tmp_path / "out.jsonl", FILES)
