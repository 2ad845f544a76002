"""How many times a fault is injected, with which seeds, and what came of it: the table at the end of `make faults`."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

# Of the counts that docs/reliability.md promises for a full run.
SCALE = float(os.environ.get("FAULT_SCALE", "0.02"))
FIRST_SEED = int(os.environ.get("FAULT_SEED", "0"))


@dataclass
class Trials:
    """What one test has tried of the `num_full` that a full run does; `part` tells the parts of a test apart that
    share its trials."""

    promise: int = 0
    part: int = 0
    num_trials: int = 0
    num_full: int = 0
    controls: dict[str, list[int]] = field(default_factory=dict)  # name → caught, tried

    def seeds(self, promise: int, full: int, parts: int = 1) -> Iterator[random.Random]:
        """A random source for each trial; `full` is how many a full run makes in all parts together.

        The last seed printed is the one that failed: FAULT_SEED begins with it.
        """
        for number in range(self.begin(promise, full, parts)):
            seed = FIRST_SEED + self.part * 1_000_000 + number
            print(f"seed {seed}")  # pytest shows it with a failure
            self.num_trials += 1
            yield random.Random(seed)

    def begin(self, promise: int, full: int, parts: int = 1) -> int:
        """How many trials this part makes now; the caller counts them in `num_trials`."""
        self.promise, self.num_full = promise, round(full / parts)
        return max(1, math.ceil(full * SCALE / parts))

    def tried_all(self, promise: int, count: int) -> None:
        """There are no more than so many to try, and all of them were, whatever the scale."""
        self.promise, self.num_trials, self.num_full = promise, count, count

    def caught_all(self, promise: int, name: str, count: int) -> None:
        """So many broken variants of one kind were tried, and each was caught."""
        self.promise, self.controls[name] = promise, [count, count]

    def is_caught(self, promise: int, name: str, problems: Iterable[str | None], *reasons: str) -> bool:
        """Whether a broken variant is caught, for reasons that begin with one of these.

        `problems` are what trials of it find, tried one by one until two are caught, in a full run more.
        """
        self.promise = promise
        caught = tried = 0
        for problem in problems:
            print(f"{name}: {problem}")
            tried += 1
            caught += problem is not None and problem.startswith(reasons)
            if caught >= max(2, 20 * SCALE):
                break
        self.controls[name] = [caught, tried]
        return caught >= 2


def chances(count: int) -> Iterator[random.Random]:
    """Random sources for the trials of a control."""
    return (random.Random(seed) for seed in range(FIRST_SEED, FIRST_SEED + count))


@dataclass
class Row:
    """One line of the table."""

    promise: int
    name: str
    num_trials: int = 0
    num_full: int = 0
    num_failures: int = 0
    controls: dict[str, list[int]] = field(default_factory=dict)

    def add(self, trials: Trials, *, failed: bool) -> None:
        self.num_trials += trials.num_trials
        self.num_full += trials.num_full
        self.num_failures += failed
        for name, counts in trials.controls.items():
            total = self.controls.setdefault(name, [0, 0])
            total[:] = [a + b for a, b in zip(total, counts, strict=True)]

    @property
    def is_short(self) -> bool:
        """Of a quarter of the full count, below which a run proves little."""
        return 4 * self.num_trials < self.num_full

    def __str__(self) -> str:
        tried = f"{self.num_trials}/{self.num_full}" if self.num_full else ""
        controls = "; ".join(f"{name} {caught}/{tried}" for name, (caught, tried) in self.controls.items())
        return f"{self.promise:>7}  {self.name:<86} {tried:>17} {self.num_failures:>8}  {controls}"


HEADING = f"{'promise':>7}  {'test':<86} {'trials/full':>17} {'failures':>8}  control caught/tried"


def table(outcomes: Iterable[tuple[str, bool, Mapping[str, object]]]) -> list[str]:
    """Lines of the table from node ids, whether each failed, and what its Trials were (as a dict)."""
    rows: dict[str, Row] = {}
    for node, failed, values in outcomes:
        name = node.partition("[")[0].rpartition("/")[2]
        trials = Trials(**values)  # type: ignore[arg-type]
        rows.setdefault(name, Row(trials.promise, name)).add(trials, failed=failed)
    lines = [HEADING, *map(str, sorted(rows.values(), key=lambda row: (row.promise, row.name)))]
    if short := sorted(row.name for row in rows.values() if row.is_short):
        lines.append(f"short of a quarter of the full count: {', '.join(short)}")
    return lines


Outcome = tuple[bool, Mapping[str, object]]  # whether the test failed, and its Trials as a dict


def kept_with_earlier(path: Path, outcomes: Mapping[str, Outcome]) -> dict[str, Outcome]:
    """Add the outcomes, by node id, to those in the file; all that are in it now, of each test the last."""
    with path.open("a+") as file:
        for node, outcome in outcomes.items():
            file.write(json.dumps([node, *outcome]) + "\n")
        file.seek(0)
        return {node: (failed, values) for node, failed, values in map(json.loads, file)}
