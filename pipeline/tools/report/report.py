"""`overnight report`: reads the files of a run and writes the page, and the picture if one is wanted."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import OutputError, Problem, UsageError
from pipeline.ledger.files import RunPaths
from pipeline.source.shard import Shard, run_output
from pipeline.spec.keys import JobSpec
from pipeline.tools.report.charts import Charts
from pipeline.tools.report.page import render_page
from pipeline.tools.report.record import RunRecord
from pipeline.tools.report.words import Words

_HTML, _PNG = b"<!doctype html>", b"\x89PNG"  # what an earlier report begins with


def report_job(
    spec: JobSpec,
    *,
    shard: Shard | None = None,
    page: Path | None = None,
    png: Path | None = None,
    show_text: bool = False,
) -> Path:
    """Write the report of the job's run, or of a shard's, finished or not, and return where it is: `page`, or
    OUTPUT.report.html.

    `png` asks for the drawings as a picture too. Prompts and answers are on the page only with `show_text`. Raises
    NotFoundError where there is no run or no matplotlib, DataError where the run's files are damaged, UsageError for a
    name that is one of theirs, OutputError where the report cannot be written.
    """
    output = run_output(spec.output.file, shard)
    paths = RunPaths(output)
    page = page or output.with_name(f"{output.name}.report.html")
    for path in filter(None, (page, png)):
        if path.absolute() in {each.absolute() for each in _files_of(paths)}:
            raise UsageError(Problem("is a file of the run; give the report another name", str(path)))
    _refuse_stranger(page, _HTML)
    if png is not None:
        _refuse_stranger(png, _PNG)
    record = RunRecord(output)
    text = render_page(record, spec.name, show_text=show_text)
    # What a file holds may be anything, also half of a surrogate pair in a name.
    _write(page, lambda path: path.write_bytes(text.encode(errors="replace")))
    if png is not None:
        title = f"{spec.name}: {Words(record, show_text=False).state()}"
        _write(png, lambda path: Charts(record).write_png(path, title))
    return page


def _refuse_stranger(path: Path, beginning: bytes) -> None:
    """OutputError for a file that is no earlier report: an input, say, whose name was given by mistake."""
    try:
        if not path.exists() or (path.is_file() and _begins_with(path, beginning)):
            return
    except OSError as error:
        raise OutputError(Problem(f"cannot be read: {error.strerror}", str(path))) from None
    raise OutputError(Problem("exists and is no report; give the report another name, or move it away", str(path)))


def _begins_with(path: Path, beginning: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(beginning)) == beginning


def _files_of(paths: RunPaths) -> list[Path]:
    return [paths.output, paths.summary, paths.journal, paths.partial, paths.lock, paths.log, paths.upload]


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Whole or not at all, in the place of an earlier report."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(new)
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(Problem(f"cannot be written: {error.strerror}", str(path))) from None
