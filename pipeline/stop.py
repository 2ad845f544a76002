"""When a run ends early: signals and the time limit, as one question that the loop asks between steps."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Literal

from pipeline.errors import StoppedError

# USR1 is what Slurm sends ahead of its limit (--signal=USR1@120), XCPU what a CPU limit sends, HUP a closed terminal.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)
GRACE_S = 1.0  # how long answers in flight may go on after a signal: what is unfinished then is saved, not lost
_KEPT_BACK_S = 30.0  # of a time limit, for answers in flight and the last commit
_NAP_S = 0.1
_ECHO_S = 0.5  # the same signal within this time is the same request


def leave_at_once() -> None:
    """From here on, until a Stop takes over and again when it is through, a signal ends the process with 75.

    For while a program starts: nothing has begun that would have to be ended in good order. What is ignored stays so.
    """
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _leave)


def _leave(_number: int, _frame: FrameType | None) -> None:
    os._exit(StoppedError.exit_code)


class Stop:
    """Whether to stop admitting (`requested`) and whether to abandon what is in flight (`overdue`)."""

    def __init__(self, *, time_limit_s: float | None = None, grace_s: float = GRACE_S) -> None:
        self._began = time.monotonic()
        self._grace_s = grace_s
        self._doing: str | None = None  # what a signal interrupts at once
        self._last_signal = (0, 0.0)  # number and time
        self._limit_at = self._deadline = float("inf")
        self.reason: str | None = None  # a signal's name, time_limit or low_memory
        self.limit(time_limit_s)

    def limit(self, time_limit_s: float | None) -> None:
        """Be overdue so many seconds after this object was made, loading included, and stop admitting earlier.

        With 3 h, admission ends half a minute before, so that answers in flight may still finish by then.
        """
        if time_limit_s is not None:
            self._deadline = self._began + time_limit_s
            self._limit_at = self._deadline - min(_KEPT_BACK_S, 0.1 * time_limit_s)

    def request(self, reason: str, *, grace_s: float | None = None) -> None:
        """Stop admitting now; what is in flight has the grace to finish."""
        if self.reason is None or self.reason == "time_limit":
            self.reason = reason
            grace_s = self._grace_s if grace_s is None else grace_s
            self._deadline = min(self._deadline, time.monotonic() + grace_s)

    @property
    def requested(self) -> bool:
        if self.reason is None and time.monotonic() >= self._limit_at:
            self.reason = "time_limit"
        return self.reason is not None

    @property
    def overdue(self) -> bool:
        return self.requested and time.monotonic() >= self._deadline

    @property
    def ended(self) -> Literal["stopped", "time_limit", "low_memory"]:
        """How a session that this has stopped ended, in the ledger's words."""
        return self.reason if self.reason in ("time_limit", "low_memory") else "stopped"

    def refuse_if_requested(self, doing: str) -> None:
        """Raise StoppedError where a stop was asked for while the run was `doing` what can be given up at once."""
        if self.requested:
            raise StoppedError(f"stopped ({self.reason}) while {doing}; run the same command again to resume")

    def sleep(self, seconds: float) -> None:
        """Sleep while the disk is full; StoppedError as soon as a stop is asked for."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.refuse_if_requested("waiting for room on the disk")
            time.sleep(min(left, _NAP_S))

    @contextmanager
    def interrupting(self, doing: str) -> Generator[None]:
        """Within this block, where nothing is in flight, a signal raises StoppedError at once."""
        self.refuse_if_requested(doing)
        self._doing = doing
        try:
            yield
        finally:
            self._doing = None

    @contextmanager
    def signals(self) -> Generator[None]:
        """Turn signals into requests to stop; a second one ends the process at once with 75.

        Nothing acknowledged is lost by that: the ledger is safe at every instant. A signal that is ignored at the
        start (nohup's HUP) stays ignored. A scheduler that sends a signal to all processes of a job and a supervisor
        that passes it on make one request together. Outside a program's main thread, where Python gives no signals,
        this does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in previous.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, self._handle)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        last_number, last_time = self._last_signal
        self._last_signal = (number, now)
        if last_number:
            if number == last_number and (now - last_time < _ECHO_S or number == signal.SIGXCPU):
                return  # the kernel repeats XCPU with every second of processor time
            os._exit(StoppedError.exit_code)
        self.request(signal.Signals(number).name)
        if self._doing is not None:
            self.refuse_if_requested(self._doing)
