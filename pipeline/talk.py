"""What the program says on standard error: lines for people, or with `--log-json` JSON objects for what collects logs.

A process has one standard error, so which of the two it gets is a matter of the process.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from typing import Any, Literal

from pipeline.errors import OvernightError

_FORM: dict[str, bool] = {"json": False}


def use_json(wanted: bool = True) -> None:
    """From now on everything said is one JSON object a line, with `time` (UTC), `level`, `event` and its fields."""
    _FORM["json"] = wanted


def is_json() -> bool:
    """Whether a bar or bare text would spoil what reads standard error."""
    return _FORM["json"]


def say(text: str) -> None:
    """One line for the user."""
    if is_json():
        log("message", message=text)
    else:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def complain(error: OvernightError) -> None:
    """All problems of an error that ends the command."""
    for problem in error.problems:
        if is_json():
            place = {"file": problem.file, "line": problem.line, "column": problem.column, "field": problem.field}
            log("error", level="error", message=problem.message, exit_code=error.exit_code, **place)
        else:
            sys.stderr.write(f"overnight: {problem}\n")


def confess(trace: str) -> None:
    """A fault of ours, with its traceback."""
    if is_json():
        log("fault", level="error", message=trace.rstrip().rpartition("\n")[2], traceback=trace)
    else:
        sys.stderr.write(trace)


def log(event: str, *, level: Literal["info", "error"] = "info", **fields: Any) -> None:
    """One event with its fields, as JSON."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    sys.stderr.write(json.dumps({"time": now, "level": level, "event": event, **fields}, ensure_ascii=False) + "\n")
    sys.stderr.flush()
