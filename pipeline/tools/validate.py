"""`overnight validate`: every problem of a job and of its input lines, found without a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.errors import Problem
from pipeline.source.inputs import expand_inputs
from pipeline.source.line_parser import validate_lines
from pipeline.source.lines import digest_inputs
from pipeline.spec.keys import JobSpec


@dataclass(frozen=True, slots=True)
class Validation:
    """What was looked at; `num_bad` of the lines have a problem."""

    num_lines: int
    num_bad: int
    num_files: int

    def __str__(self) -> str:
        files = "1 file" if self.num_files == 1 else f"{self.num_files} files"
        verdict = f"{self.num_bad} are bad" if self.num_bad else "all are good"
        return f"{self.num_lines} lines in {files}: {verdict} (length is checked by `plan` and by the run)"

    def to_json(self) -> dict[str, Any]:
        return {"object": "validation", **asdict(self)}


def validate_job(spec: JobSpec, tell: Callable[[Problem], None], say: Callable[[str], object] = str) -> Validation:
    """Read every line of the input, `tell` each problem as it is found, and say how many lines there were.

    `say` is told, once, of what looks like a mistake in lines that are good.

    Raises NotFoundError for input that is not there, SpecError for a wrong template, DataError for a damaged file.
    """
    files = expand_inputs(spec.input.path)
    digest = digest_inputs(files, max_bytes=spec.input.max_bytes)
    num_bad = 0
    for problem in validate_lines(spec, files, say):
        num_bad += 1
        tell(problem)
    return Validation(digest.num_items, num_bad, len(files))
