"""What a dead process left behind is read as what ended it, and nothing else is."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from pipeline.ledger.witness import Witness, note_death
from pipeline.records import Json

PROGRAM = """
import ctypes, json, os, signal, sys, time
from pathlib import Path
from pipeline.ledger.witness import Witness, note_death
from pipeline.stop import Stop
from pipeline.watch import Watch
witness = Witness(Path(sys.argv[1]))
print(json.dumps(witness.mark()), flush=True)
watch = Watch(Stop(), stall_timeout_s=0.5, memory=lambda: None, say=print)
with witness.listening() as log, watch.watching(log):
    exec(sys.argv[2])
"""


def end_of(log: Path, does: str) -> tuple[int, str | None, str]:
    """How a process that does this ends, what a witness says of it, and what it wrote on standard error."""
    run = subprocess.run([sys.executable, "-c", PROGRAM, log, does], capture_output=True, text=True, timeout=60)
    return run.returncode, Witness(log).cause(json.loads(run.stdout.splitlines()[0])), run.stderr


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT"])
def test_a_fatal_signal_is_a_crash(tmp_path: Path, name: str) -> None:
    log = tmp_path / "x.log"
    code, cause, _ = end_of(log, f"os.kill(os.getpid(), signal.{name})")
    assert (code, cause) == (-signal.Signals[name], "crashed")
    assert "most recent call first" in log.read_text()


@pytest.mark.parametrize("hang", ["time.sleep(60)", "ctypes.PyDLL(None).sleep(60)"], ids=["GIL released", "GIL held"])
def test_a_hang_ends_with_a_traceback_and_counts_as_a_stall(tmp_path: Path, hang: str) -> None:
    log = tmp_path / "x.log"
    began = time.monotonic()
    code, cause, _ = end_of(log, hang)
    assert (code, cause) == (1, "stalled")
    assert time.monotonic() - began < 30
    assert 'File "<string>"' in log.read_text()


def test_what_moves_is_not_ended(tmp_path: Path) -> None:
    does = "until = time.monotonic() + 1.5\nwhile time.monotonic() < until:\n    watch.beat()\n    time.sleep(0.01)"
    assert end_of(tmp_path / "x.log", does)[:2] == (0, None)
    assert not (tmp_path / "x.log").exists()  # nothing to tell


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_being_killed_is_no_evidence(tmp_path: Path, name: str) -> None:
    code, cause, _ = end_of(tmp_path / "x.log", f"os.kill(os.getpid(), signal.{name})")
    assert (code, cause) == (-signal.Signals[name], None)


def test_only_what_the_session_itself_left_is_its_evidence(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    assert end_of(log, "os.abort()")[1] == "crashed"
    assert end_of(log, "os.kill(os.getpid(), signal.SIGKILL)")[1] is None


def test_what_a_parent_saw_is_evidence_where_it_is_a_crash(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    mark = Witness(log).mark()
    for number in (signal.SIGKILL, signal.SIGTERM):
        note_death(log, number)
    assert Witness(log).cause(mark) is None and not log.exists()
    note_death(log, signal.SIGSYS)
    assert Witness(log).cause(mark) == "crashed"
    assert Witness(log).cause(Witness(log).mark()) is None


def counted(count: int, of: str = "this boot, this group") -> Mapping[str, Json]:
    return {"of": of, "count": count}


def test_a_process_killed_for_memory_is_known_by_the_counter_of_its_own_group(tmp_path: Path) -> None:
    mark = Witness(tmp_path / "x.log", oom_kills=lambda: counted(3)).mark()

    def cause(now: Mapping[str, Json] | None) -> str | None:
        return Witness(tmp_path / "x.log", oom_kills=lambda: now).cause(mark)

    assert cause(counted(4)) == "out_of_memory"
    assert cause(counted(3)) is None
    assert cause(counted(4, of="another group")) is None
    assert cause(None) is None
