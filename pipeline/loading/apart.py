"""Makes a model in a process of its own: what that does to the libraries' settings, and its memory, end with it.

After auto-round has quantized in a process, the same process generated seven times slower than a fresh one (measured
on two cores; it then kept to one of them).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from pipeline import errors
from pipeline.errors import OvernightError, Problem
from pipeline.loading.prepared import Progress


def apart(function: str) -> Callable[[Path, Progress], None]:
    """`function` (`package.module:name`, taking a directory and a progress callback) as one that runs in a child.

    Its OvernightError is raised here; any other end but success is an OvernightError with the last words of the child.
    """

    def write(directory: Path, progress: Progress) -> None:
        sources = str(Path(__file__).parents[2])
        search = os.pathsep.join(filter(None, [sources, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", __name__, function, str(directory)]
        # One thread: the quantizer's many small steps wait for each other. 35 s against 96 to 147 s beside other work.
        environment = os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
        with tempfile.TemporaryFile() as log:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )
            try:
                failure = _listen(child, progress)
            finally:
                child.kill()
                child.wait()
            log.seek(0)
            last_words = log.read()[-2000:].decode(errors="replace")
        if failure is not None:
            raise failure
        if child.returncode:
            raise OvernightError(f"the process that makes the model ended with {child.returncode}: {last_words}")

    return write


def _listen(child: subprocess.Popen[str], progress: Progress) -> OvernightError | None:
    """Pass on what the child says until it ends; the error that it reports, if any."""
    failure: OvernightError | None = None
    assert child.stdout is not None
    with child.stdout as lines:
        for line in lines:
            said = json.loads(line)
            if "error" in said:
                failure = getattr(errors, said["error"])([Problem(**problem) for problem in said["problems"]])
            else:
                progress(said["stage"], said["fraction"])
    child.wait()
    return failure


def _main(function: str, directory: str) -> int:
    # Libraries that print would spoil what is said to the parent.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def progress(stage: str, fraction: float) -> None:
        out.write(json.dumps({"stage": stage, "fraction": fraction}) + "\n")

    module, name = function.split(":")
    try:
        getattr(import_module(module), name)(Path(directory), progress)
    except OvernightError as error:
        problems = [asdict(problem) for problem in error.problems]
        out.write(json.dumps({"error": type(error).__name__, "problems": problems}) + "\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
