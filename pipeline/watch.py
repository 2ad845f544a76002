"""An eye on a run between its steps: a run that hangs is ended, and one that eats the memory up stops by itself."""

from __future__ import annotations

import faulthandler
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from pipeline.stop import Stop

LOW_MEMORY = "low_memory"
STALLED_CODE = 1  # what the interpreter's timer ends the process with
_LOOK_S = 1.0  # between two looks at the memory
_REARM_S = 1.0  # least time between two settings of the timer, each of which starts a thread
_MOST_RESERVE = 256 << 20  # half of what the plan leaves free at least
_RESERVE_SHARE = 50  # a fiftieth of what was free at the beginning, where that is less


class Watch:
    """`beat` says that something has moved; after `stall_timeout_s` without, the process is ended with code 1.

    The interpreter's own timer does that, from C and without the GIL. `memory` gives the bytes that may still be
    allocated, None where nothing tells. When less than the reserve is left, the run is asked to stop at once, before
    the kernel kills it.
    """

    def __init__(
        self,
        stop: Stop,
        *,
        stall_timeout_s: float,
        memory: Callable[[], int | None],
        say: Callable[[str], None],
    ) -> None:
        self._stop = stop
        self._stall_timeout_s = stall_timeout_s
        self._rearm_s = min(_REARM_S, stall_timeout_s / 10)
        self._memory = memory
        self._say = say
        self._reserve = min(_MOST_RESERVE, (memory() or 0) // _RESERVE_SHARE)
        self._log: int | None = None  # while hangs are watched for
        self._armed_at = 0.0
        self._looked_at = 0.0

    @contextmanager
    def watching(self, log: int) -> Generator[None]:
        """Hangs within this block end the process, with the traceback of all threads in `log`, a file descriptor."""
        self._log = log
        self._arm(log, time.monotonic())
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            self._log = None

    def beat(self) -> None:
        now = time.monotonic()
        if self._log is not None and now - self._armed_at >= self._rearm_s:
            self._arm(self._log, now)
        if now - self._looked_at >= _LOOK_S:
            self._looked_at = now
            self._look_at_memory()

    def sleep(self, seconds: float) -> None:
        """Sleep in vain, while a full disk has no room: no hang, and StoppedError as soon as a stop is asked for."""
        self.beat()
        self._stop.sleep(seconds)

    def _arm(self, log: int, now: float) -> None:
        faulthandler.dump_traceback_later(self._stall_timeout_s, exit=True, file=log)
        self._armed_at = now

    def _look_at_memory(self) -> None:
        left = self._memory()
        if left is not None and left < self._reserve and self._stop.reason != LOW_MEMORY:
            self._say(f"only {left >> 20} MiB of memory are left: the run stops before the system kills it")
            self._stop.request(LOW_MEMORY, grace_s=0.0)
