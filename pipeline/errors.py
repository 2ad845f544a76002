"""Every error a user can meet, and the exit code that each one ends the process with.

    OvernightError            70  a fault of ours
    ├── UsageError            64  wrong usage of a command
    ├── DataError             65  input changed, a file of the run is damaged, bad lines found by validate
    ├── NotFoundError         66  job file, input, template or model not found or not readable
    ├── MachineError          69  this machine cannot run the plan
    ├── OutputError           73  the output cannot be created, or is somebody else's file
    ├── WriteError            74  an I/O error while writing; what was acknowledged is safe
    ├── StoppedError          75  stopped early; the same command resumes
    │   └── BusyError         75  another process holds the run
    └── SpecError             78  the job file is wrong, or changed in a way that would mix answers

A class is named for what the caller would do about it. The codes are those of sysexits(3) where it has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

EXIT_OK = 0
EXIT_SOME_FAILED = 3


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: where it is and what to do about it."""

    message: str
    file: str | None = None
    line: int | None = None  # from 1
    column: int | None = None  # from 1
    field: str | None = None  # dotted, as in `--set`: generation.top_p

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)
        return ": ".join(part for part in (place, self.field, self.message) if part)


class OvernightError(Exception):
    """A failure with an exit code; its text is shown to the user as it is, one problem a line."""

    exit_code = 70

    def __init__(self, problems: str | Problem | Sequence[Problem]) -> None:
        if isinstance(problems, str):
            problems = Problem(problems)
        if isinstance(problems, Problem):
            problems = (problems,)
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class UsageError(OvernightError):
    """The command line asks for something that has no meaning."""

    exit_code = 64


class DataError(OvernightError):
    """The input changed since the run began, a file of the run is damaged, or input lines are bad."""

    exit_code = 65


class NotFoundError(OvernightError):
    """A file or model that the job names is not there or cannot be read."""

    exit_code = 66


class MachineError(OvernightError):
    """This machine cannot run the plan (memory, device)."""

    exit_code = 69


class OutputError(OvernightError):
    """The output cannot be created, or a file that is not ours is in its place."""

    exit_code = 73


class WriteError(OvernightError):
    """The disk refused a write; everything acknowledged before it is safe."""

    exit_code = 74


class StoppedError(OvernightError):
    """The run was stopped before its end; the same command resumes it."""

    exit_code = 75


class BusyError(StoppedError):
    """Another process holds the run."""


class SpecError(OvernightError):
    """The job file is wrong, or was changed in a way that would mix answers."""

    exit_code = 78
