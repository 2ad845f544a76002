"""A published file back to records."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from pipeline.columnar import is_columnar
from pipeline.compression import DamagedStreamError, decompressing
from pipeline.errors import DataError, NotFoundError, Problem
from pipeline.output.parquet import read_parquet


def read_results(path: Path | str) -> Iterator[dict[str, Any]]:
    """The answers in an output file, one record a line or row in the order of the file; the summary line is left out.

    Raises NotFoundError if the file cannot be read, DataError with file and line where a line is no record, or where
    the file is damaged.
    """
    import jsonlines

    try:
        if is_columnar(str(path)):
            yield from read_parquet(Path(path))
            return
        # As bytes, so that a line ends with a line end and nothing else.
        with (
            Path(path).open("rb") as raw,
            decompressing(raw, Path(path).name) as file,
            jsonlines.Reader(file) as reader,
        ):
            for record in cast("Iterator[dict[str, Any]]", reader.iter(type=dict)):
                if record.get("object") != "summary":
                    yield record
    except jsonlines.InvalidLineError as error:
        reason = f"this is no record of an output: {error.__cause__ or 'it is no JSON object'}"
        raise DataError(Problem(reason, file=str(path), line=error.lineno)) from None
    except DamagedStreamError as error:
        raise DataError(Problem(str(error), file=str(path))) from None
    except OSError as error:
        raise NotFoundError(Problem(f"cannot be read: {error.strerror}", file=str(path))) from None
