"""One holder at a time, across processes and inside one; a dead holder holds nothing."""

import os
import signal
import subprocess
import sys
import time

import pytest

from pipeline.errors import BusyError, OutputError
from pipeline.ledger.lock import RunLock, lock_holder

HOLD = """
import subprocess, sys, time
from pathlib import Path
from pipeline.ledger.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
if "orphan" in sys.argv:
    child = subprocess.Popen(["sleep", "60"], close_fds=False, pass_fds=(lock._descriptor,))
    print(child.pid, flush=True)
print("held", flush=True)
time.sleep(60)
"""


def start_holder(path, *options):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path), *options], stdout=subprocess.PIPE, text=True)
    lines = []
    while (line := holder.stdout.readline().strip()) != "held":
        assert line, "the holder failed"
        lines.append(int(line))
    return holder, lines


def stop(holder):
    holder.kill()
    holder.wait()
    holder.stdout.close()


def test_a_lock_excludes_within_the_process_and_is_given_back(tmp_path):
    path = tmp_path / "x.lock"
    lock = RunLock(path)
    with pytest.raises(BusyError, match=f"process {os.getpid()} is working on this run"):
        RunLock(path)
    lock.release()
    RunLock(path).release()


def test_a_lock_is_known_by_its_file_whatever_the_path(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    lock = RunLock(tmp_path / "x.lock")
    with pytest.raises(BusyError):
        RunLock(tmp_path / "link" / "x.lock")
    lock.release()


def test_a_lock_excludes_other_processes_and_names_the_holder(tmp_path):
    path = tmp_path / "x.lock"
    holder, _ = start_holder(path)
    try:
        assert lock_holder(path) == holder.pid
        with pytest.raises(BusyError, match=f"process {holder.pid} is working"):
            RunLock(path)
    finally:
        stop(holder)
    assert lock_holder(path) is None
    RunLock(path).release()


def test_an_orphan_of_a_killed_holder_does_not_keep_the_lock(tmp_path):
    path = tmp_path / "x.lock"
    holder, (orphan,) = start_holder(path, "orphan")
    try:
        stop(holder)
        os.kill(orphan, 0)
        RunLock(path).release()
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_asking_for_the_holder_neither_drops_our_lock_nor_touches_the_file(tmp_path):
    path = tmp_path / "x.lock"
    lock = RunLock(path)
    before = path.stat().st_mtime_ns
    time.sleep(0.01)
    assert lock_holder(path) == os.getpid()
    imports = "import sys; from pathlib import Path; from pipeline.ledger.lock import lock_holder"
    query = f"{imports}; print(lock_holder(Path(sys.argv[1])))"
    answer = subprocess.run([sys.executable, "-c", query, str(path)], capture_output=True, text=True, check=True)
    assert int(answer.stdout) == os.getpid()
    lock.release()
    RunLock(path).release()
    assert (path.stat().st_mtime_ns, path.read_bytes()) == (before, b"")


def test_nobody_holds_a_lock_that_was_never_taken(tmp_path):
    assert lock_holder(tmp_path / "x.lock") is None
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_cannot_be_created_says_so(tmp_path):
    with pytest.raises(OutputError, match="cannot be created"):
        RunLock(tmp_path / "missing" / "x.lock")


def test_a_forked_child_does_not_think_that_it_holds_the_lock(tmp_path):
    path = tmp_path / "x.lock"
    program = """
import os, sys
from pathlib import Path
from pipeline.errors import BusyError
from pipeline.ledger.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
parent = os.getpid()
if os.fork() == 0:
    try:
        RunLock(Path(sys.argv[1]))
    except BusyError as error:
        os._exit(0 if f"process {parent} " in str(error) else 1)
    os._exit(2)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    assert subprocess.run([sys.executable, "-c", program, str(path)]).returncode == 0
