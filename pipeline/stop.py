"""When a run ends early: signals and the time limit, as one question that the loop asks between steps."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

from pipeline.errors import StoppedError

# USR1 is what Slurm sends ahead of its limit (--signal=USR1@120), XCPU what a CPU limit sends, HUP a closed terminal.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)
GRACE_S = 30.0  # how long answers in flight may go on after a signal


class Stop:
    """Whether to stop admitting (`requested`) and whether to abandon what is in flight (`overdue`).

    The time limit counts from the moment the process took up the job, loading included, and the grace ends with it:
    with 3 h, admission ends early enough that answers in flight may still finish by then.
    """

    def __init__(self, *, time_limit_s: float | None = None, grace_s: float = GRACE_S) -> None:
        self._grace_s = grace_s
        self._interrupts = False
        self.reason: str | None = None
        if time_limit_s is None:
            self._limit_at = self._deadline = float("inf")
        else:
            self._deadline = time.monotonic() + time_limit_s
            self._limit_at = self._deadline - min(grace_s, 0.1 * time_limit_s)

    def request(self, reason: str) -> None:
        """Stop admitting now; what is in flight has the grace to finish."""
        if self.reason is None:
            self.reason = reason
            self._deadline = min(self._deadline, time.monotonic() + self._grace_s)

    @property
    def requested(self) -> bool:
        if self.reason is None and time.monotonic() >= self._limit_at:
            self.reason = "time_limit"
        return self.reason is not None

    @property
    def overdue(self) -> bool:
        return self.requested and time.monotonic() >= self._deadline

    @contextmanager
    def interrupting(self) -> Generator[None]:
        """Within this block, where nothing is in flight (loading), a signal raises StoppedError at once."""
        if self.requested:
            raise StoppedError(f"stopped ({self.reason}); run the same command again to resume")
        self._interrupts = True
        try:
            yield
        finally:
            self._interrupts = False

    @contextmanager
    def signals(self) -> Generator[None]:
        """Turn signals into requests to stop; a second one ends the process at once with 75.

        Nothing acknowledged is lost by that: the ledger is safe at every instant. A signal that is ignored at the
        start (nohup's HUP) stays ignored. Outside a program's main thread, where Python gives no signals, this does
        nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, _frame: FrameType | None) -> None:
            if self.reason is not None and self.reason != "time_limit":
                os._exit(StoppedError.exit_code)
            self.request(signal.Signals(number).name)
            if self._interrupts:
                raise StoppedError(f"stopped by {self.reason} while loading; run the same command again to resume")

        previous = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in previous.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, handle)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
