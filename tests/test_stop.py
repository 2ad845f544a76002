"""Signals and the time limit become one question; an ignored signal stays ignored."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from pipeline.errors import StoppedError
from pipeline.stop import SIGNALS, Stop


def test_the_time_limit_stops_admission_before_it_abandons_what_is_in_flight() -> None:
    stop = Stop(time_limit_s=0.4, grace_s=30)
    assert not stop.requested
    time.sleep(0.37)
    assert stop.requested and stop.reason == "time_limit"
    assert not stop.overdue
    time.sleep(0.05)
    assert stop.overdue


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_request_with_a_grace(number: signal.Signals) -> None:
    stop = Stop(grace_s=0.05)
    with stop.signals():
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested and stop.reason == number.name
        assert not stop.overdue
        time.sleep(0.06)
        assert stop.overdue
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_while_loading_a_signal_ends_at_once() -> None:
    stop = Stop()
    with stop.signals(), pytest.raises(StoppedError, match=r"SIGTERM.*loading"), stop.interrupting("loading"):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)


def test_a_hangup_ignored_by_nohup_stays_ignored_and_a_second_signal_exits_with_75() -> None:
    program = """
import os, signal, time
from pipeline.stop import Stop
signal.signal(signal.SIGHUP, signal.SIG_IGN)
stop = Stop()
with stop.signals():
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.requested
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == StoppedError.exit_code


@pytest.mark.parametrize(("command", "code"), [("run", StoppedError.exit_code), ("status", -signal.SIGTERM)])
def test_a_signal_while_a_run_is_still_being_imported_is_heeded_too(command: str, code: int) -> None:
    program = f"""
import os, signal, sys
from importlib.abc import MetaPathFinder
class Signal(MetaPathFinder):
    def find_spec(self, name, *_):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, Signal())
sys.argv = ["overnight", {command!r}, "none.yaml"]
from pipeline.__main__ import main
main()
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == code


def test_the_same_signal_twice_at_once_is_one_request() -> None:
    """What a scheduler sends to a whole job and a supervisor passes on arrives twice."""
    stop = Stop()
    with stop.signals():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGTERM"


def test_the_kernel_repeats_its_warning_of_a_processor_limit() -> None:
    """It sends XCPU for every second beyond the soft limit, which is no second request."""
    program = """
import resource, time
from pipeline.stop import Stop
resource.setrlimit(resource.RLIMIT_CPU, (1, 10))
stop = Stop(grace_s=30)
with stop.signals():
    while time.process_time() < 2.5:
        pass
assert stop.reason == "SIGXCPU" and not stop.overdue
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_a_wait_for_room_on_the_disk_ends_with_the_stop() -> None:
    stop = Stop()
    began = time.monotonic()
    stop.sleep(0.01)
    threading.Timer(0.2, stop.request, ["SIGTERM"]).start()
    with pytest.raises(StoppedError, match="SIGTERM"):
        stop.sleep(30)
    assert time.monotonic() - began < 10


def test_a_limit_counts_from_the_beginning_and_a_request_may_have_no_grace() -> None:
    stop = Stop()
    stop.limit(3600)
    assert not stop.requested
    stop.request("low_memory", grace_s=0)
    assert stop.overdue and stop.ended == "low_memory"
    late = Stop()
    late.limit(0)
    assert late.overdue and late.ended == "time_limit"
