"""`overnight run --supervise`: starts the run again whenever its process dies, until it ends by itself.

The supervisor loads no model and no input: it starts the same command without `--supervise`, passes signals on, and
after a death reads how far the journal got. What killed the process is for the next one to judge; the supervisor only
adds what a parent alone can see, the signal that ended its child.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from pipeline.errors import DataError, OvernightError, Problem, StoppedError
from pipeline.ledger.files import RunPaths
from pipeline.ledger.journal import whole_lines
from pipeline.ledger.witness import note_death
from pipeline.source.shard import Shard, run_output
from pipeline.spec.keys import JobSpec
from pipeline.spec.units import format_duration
from pipeline.stop import SIGNALS
from pipeline.watch import LOW_MEMORY, STALLED_CODE

# A process that ends with one of these may do better in a new one; every other code would only be repeated.
_WORTH_ANOTHER = frozenset({OvernightError.exit_code, STALLED_CODE})
# Before another process, and four times as long after each that saved nothing.
_PAUSE_S, _MEMORY_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0, 60.0
_FEWEST_DEATHS = 2  # that a line may need which was not alone at the first
_PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass(frozen=True, slots=True)
class _Mark:
    """How far a journal is; more `saved` than before is progress, more sessions that a process got as far as that."""

    file: tuple[int, int] | None = None  # device and inode; None where there is no journal
    num_saved: int = 0  # records that save answers, whole or unfinished
    num_sessions: int = 0
    ended: str | None = None  # the last session, in good order

    @classmethod
    def of(cls, journal: Path) -> _Mark:
        num_saved = num_sessions = 0
        ended: str | None = None
        try:
            stat = journal.stat()
            for line in whole_lines(journal):
                text = line.text or b""
                if text.startswith((b'{"kind":"commit"', b'{"kind":"unfinished"')):
                    num_saved += 1
                elif text.startswith(b'{"kind":"session"'):
                    num_sessions, ended = num_sessions + 1, None
                elif text.startswith(b'{"kind":"end"'):
                    ended = line.record["ended"]
        except (OSError, DataError):  # for the next process to refuse
            return cls()
        return cls((stat.st_dev, stat.st_ino), num_saved, num_sessions, ended)


class _Relay:
    """Passes the signals that stop a run on to its process, and knows whether one has come."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self.stopped: str | None = None  # the name of the first signal

    @contextmanager
    def signals(self) -> Generator[None]:
        """Within this block; a signal that is ignored at the start (nohup's HUP) stays ignored, here and there."""
        previous = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in previous.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, self._handle)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def run(self, command: Sequence[str], environment: dict[str, str]) -> int:
        """The exit code of the command, negative for a signal that killed it."""
        self._child = subprocess.Popen(
            command,
            env=environment,
            # Nobody restarts the child of a dead supervisor: it is to stop in good order.
            preexec_fn=_stop_with(os.getpid()),  # noqa: PLW1509 - there is one thread
        )
        if self.stopped is not None:  # it came while the process was made
            self._child.send_signal(signal.Signals[self.stopped])
        return self._child.wait()

    def pause(self, seconds: float) -> None:
        """Wait, or less if a signal comes."""
        until = time.monotonic() + seconds
        while self.stopped is None and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.stopped = self.stopped or signal.Signals(number).name
        if self._child is not None and self._child.returncode is None:
            self._child.send_signal(number)


def supervise(
    spec: JobSpec,
    words: Sequence[str],
    say: Callable[[str], None] | None,
    *,
    shard: Shard | None = None,
    fresh: bool = False,
) -> int:
    """Run `overnight run WORDS` until it ends by itself or is stopped, starting it again after each death.

    `spec` is the job that `words` name, and `shard` its part, without a time limit, which is kept for all processes
    together; `fresh` is given on until the earlier run's files are aside. The exit code is that of the last process. A
    death is a signal that kills, a stall, a fault of ours (70) or a stop for lack of memory. Raises OvernightError
    (StoppedError for a lack of memory) after more than `run.max_attempts` deaths in a row, two at least, between which
    nothing was saved: by then every answer that can be blamed has been given up, and the next death would be no other.
    StoppedError for a signal that comes while no process runs.
    """
    began = time.monotonic()
    paths = RunPaths(run_output(spec.output.file, shard))
    relay = _Relay()
    mark = first = _Mark.of(paths.journal)
    num_fruitless = 0
    with relay.signals():
        while True:
            limit: list[str] = []
            if spec.run.time_limit is not None:
                left_s = max(0.0, began + spec.run.time_limit - time.monotonic())
                limit = ["--time-limit", format_duration(round(left_s, 3))]
            is_fresh = fresh and mark.file == first.file  # nothing is moved aside yet
            code = relay.run(_command([*words, *limit, *(["--fresh"] if is_fresh else [])]), _environment())
            before, mark = mark, _Mark.of(paths.journal)
            if mark.file != before.file:  # another journal
                before = _Mark()
            has_begun = mark.num_sessions > before.num_sessions
            if has_begun and code < 0:
                note_death(paths.log, -code)
            is_low = has_begun and code == StoppedError.exit_code and mark.ended == LOW_MEMORY
            if relay.stopped is not None or -code in SIGNALS:
                return StoppedError.exit_code if code < 0 else code
            if code >= 0 and code not in _WORTH_ANOTHER and not is_low:
                return code
            num_fruitless = 0 if mark.num_saved > before.num_saved else num_fruitless + 1
            told = "little memory left" if is_low else _ending(code)
            if num_fruitless > max(spec.run.max_attempts, _FEWEST_DEATHS):
                raise _given_up(paths, num_fruitless, told, StoppedError if is_low else OvernightError)
            if say is not None:
                say(f"the process of the run ended ({told}); starting it again")
            relay.pause(min(_LONGEST_PAUSE_S, (_MEMORY_PAUSE_S if is_low else _PAUSE_S) * 4**num_fruitless))
            if relay.stopped is not None:
                raise StoppedError(f"stopped ({relay.stopped}); run the same command again to resume")


def _command(words: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "pipeline", "run", *words]


def _environment() -> dict[str, str]:
    """This very package, wherever it was imported from."""
    sources = str(Path(__file__).parents[2])
    search = os.pathsep.join(filter(None, [sources, os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": search}


def _stop_with(parent: int) -> Callable[[], None]:
    """For the new process: SIGTERM when its parent dies. Linux only; elsewhere the child goes on alone."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)

    def ask() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            if os.getppid() != parent:  # it died just now
                os._exit(StoppedError.exit_code)

    return ask


def _ending(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return "nothing moved any more" if code == STALLED_CODE else f"exit code {code}"


def _given_up(paths: RunPaths, num_deaths: int, told: str, kind: type[OvernightError]) -> OvernightError:
    log = f"; {paths.log} has its last words" if paths.log.exists() else ""
    message = f"given up: {num_deaths} processes in a row ended and had saved nothing, the last one: {told}{log}"
    return kind(Problem(message, file=str(paths.output)))
