"""What a process that died leaves behind, and what it says about its end; nothing of it is needed to resume.

At its beginning a session notes how far X.log and the system's counter of processes killed for memory are. Whoever
takes up the run after its death compares: the interpreter writes to X.log when it crashes and when it is ended because
nothing moved; a supervisor adds what the interpreter could not. Anything else (SIGKILL by a person, a power cut) is no
evidence.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from pipeline.ledger.files import creating
from pipeline.records import Json

Cause = Literal["crashed", "stalled", "out_of_memory"]

# What faulthandler writes first: before the traceback of a fatal signal, and when its timer ends the process.
_CRASH, _STALL = b"Fatal Python error", b"Timeout ("
_SEEN = b"Fatal signal: "  # what a supervisor writes
_FATAL = frozenset(
    getattr(signal, name)
    for name in ("SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV", "SIGSYS", "SIGTRAP")
    if hasattr(signal, name)
)


def note_death(log: Path, number: int) -> None:
    """Write to a run's log that its process was killed by signal `number`, where that is a crash: the interpreter
    itself says nothing where its own stack is gone. What cannot be written is no evidence."""
    if number in _FATAL:
        with suppress(OSError), log.open("ab") as file:
            file.write(_SEEN + signal.Signals(number).name.encode() + b", as its supervisor saw\n")


def nothing_counted() -> None:
    return None


class Witness:
    """Notes and compares for the run whose log is `log`.

    `oom_kills` gives the counter, and whose it is: counters of two owners are never compared.
    """

    def __init__(
        self,
        log: Path,
        *,
        oom_kills: Callable[[], Mapping[str, Json] | None] = nothing_counted,
        memory_held: Callable[[], int | None] = nothing_counted,
    ) -> None:
        self._log = log
        self._oom_kills = oom_kills
        self.memory_held = memory_held  # bytes that this process holds now; None where nothing tells

    def mark(self) -> Mapping[str, Json]:
        """What to note at the beginning of a session."""
        return {"log_bytes": self._log_bytes(), "oom_kills": self._oom_kills()}

    def cause(self, mark: Mapping[str, Any]) -> Cause | None:
        """Why the process that noted `mark` died; None where nothing tells."""
        written = self._log_from(mark["log_bytes"])
        if _STALL in written:
            return "stalled"
        if _CRASH in written or _SEEN in written:
            return "crashed"
        before, now = mark["oom_kills"], self._oom_kills()
        if before is not None and now is not None and before["of"] == now["of"] and now["count"] > before["count"]:
            return "out_of_memory"
        return None

    @contextmanager
    def listening(self) -> Generator[int]:
        """Within this block the interpreter's last words go to the log, whose descriptor this gives.

        A log in which nothing was ever written does not stay.
        """
        enabled_before = faulthandler.is_enabled()
        with creating(self._log):
            descriptor = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            faulthandler.enable(descriptor)
            yield descriptor
        finally:
            faulthandler.cancel_dump_traceback_later()
            faulthandler.disable()
            if enabled_before and sys.__stderr__ is not None:
                faulthandler.enable(sys.__stderr__)
            os.close(descriptor)
            if not self._log_bytes():
                with suppress(OSError):
                    self._log.unlink()

    def _log_bytes(self) -> int:
        try:
            return self._log.stat().st_size
        except OSError:
            return 0

    def _log_from(self, offset: int) -> bytes:
        try:
            with self._log.open("rb") as file:
                file.seek(offset)
                return file.read(1 << 20)
        except OSError:
            return b""
