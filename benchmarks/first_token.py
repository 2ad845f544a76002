"""Where the time from the start of the process to the first token of a job goes.

    python benchmarks/first_token.py jobs/quickstart.yaml --repeats 5

Each repeat is a process of its own that runs the job into a temporary directory and ends at its first token. Every
moment counts for one part only: an import for the package of the module, all else for the step that it is part of.
"""
# pyright: basic

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

PACKAGES = {"pipeline": "our modules", "torch": "import torch", "transformers": "import transformers"}
OTHER_PACKAGES = "import other libraries"
REST = "input, plan, ledger"
START = "the interpreter"
TOTAL = "first token after"
CPU = "processor time"


class Parts:
    """Seconds by part; one part within another interrupts it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open = [REST]
        self._since = time.perf_counter()

    def enter(self, part: str) -> None:
        self._count()
        self._open.append(part)

    def leave(self) -> None:
        self._count()
        self._open.pop()

    def _count(self) -> None:
        now = time.perf_counter()
        self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    def within(self, part: Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            self.enter(part(*args))
            try:
                return function(*args, **named)
            finally:
                self.leave()

        return call


def age_s() -> float:
    """Seconds since this process was started (field 22 of proc(5)'s stat, in ticks after the start of the system)."""
    with open("/proc/self/stat", encoding="utf-8") as stat:  # noqa: PTH123 - pathlib is not imported yet
        ticks = int(stat.read().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def run(job: str) -> None:
    """The child: parts as one line of JSON on standard output, then the end."""
    started = age_s()
    parts = Parts()
    # Where imports are found and run; no public name tells how long each takes.
    bootstrap: Any = importlib._bootstrap  # type: ignore[attr-defined]
    bootstrap._find_and_load = parts.within(
        lambda name, *_: PACKAGES.get(name.partition(".")[0], OTHER_PACKAGES), bootstrap._find_and_load
    )
    from pipeline import loading
    from pipeline.cli import app
    from pipeline.engines import row
    from pipeline.engines.packed_model import PackedModel
    from pipeline.engines.slots import SlotEngine
    from pipeline.prompting import encoder

    def within(owner: Any, name: str, part: str) -> None:
        setattr(owner, name, parts.within(lambda *_: part, getattr(owner, name)))

    within(encoder, "load_tokenizer", "tokenizer and template")
    within(encoder.PromptEncoder, "__init__", "tokenizer and template")
    within(loading, "load_model", "weights and model")
    within(PackedModel, "fuse", "fewer passes, tried")
    within(SlotEngine, "self_check", "self-check")
    within(SlotEngine, "_compute", "first step")

    def push(*_: Any) -> None:
        parts.leave()
        figures = {START: started, **parts.seconds, TOTAL: age_s(), CPU: time.process_time()}
        os.write(1, json.dumps(figures).encode())
        os._exit(0)

    row.Row.push = push
    with tempfile.TemporaryDirectory() as directory:
        app(["run", job, "--quiet", "--set", f"output.path={directory}/out.jsonl"])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("job")
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    chosen = arguments.parse_args()
    if chosen.child:
        run(chosen.job)
    command = [sys.executable, __file__, "--child", chosen.job]
    runs = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(chosen.repeats)]
    for part in runs[0]:
        seconds = [one[part] for one in runs]
        print(f"| {part} | {statistics.median(seconds):.2f} | {min(seconds):.2f} to {max(seconds):.2f} |")


if __name__ == "__main__":
    main()
