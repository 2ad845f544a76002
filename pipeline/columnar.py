"""Parquet and Arrow files by a file's name: their rows as lines of JSON, in the memory of a few rows at a time.

A row becomes one object with its columns in the order of the schema: bytes as URL-safe base64, dates and times as ISO
8601 (with microseconds at most), decimals as strings, NaN and infinities as null, maps as lists of pairs. The same rows
give the same lines whatever their row groups, encoding and compression, so that a table is identified by what it says.

pyarrow (extra `data`) is loaded when a table is read.
"""

# pyright: basic
from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import IO, TYPE_CHECKING, Any

from pydantic_core import to_json

from pipeline.compression import DamagedStreamError

if TYPE_CHECKING:
    import pyarrow

SUFFIXES = (".parquet", ".arrow")
_MAX_ROWS = 1024  # at a time
_BATCH_BYTES = 4 << 20
_READ_BYTES = 1 << 20
_ARROW_FILE = b"ARROW1"  # how Arrow's file format begins; what `datasets` saves is the stream format
_SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}(-[0-9a-f]+)?\.parquet")


class DirectoryRefused(Exception):  # noqa: N818 - the answer to a path, not a fault
    """A directory that does not say which tables it stands for; the text says what to name instead."""


def is_columnar(name: str) -> bool:
    """Whether a file of this name holds a table."""
    return name.lower().endswith(SUFFIXES)


def missing_library(name: str) -> str | None:
    """What to install before a file of this name can be read or written; None where nothing lacks."""
    if is_columnar(name) and importlib.util.find_spec("pyarrow") is None:
        return f"{PurePath(name).suffix} needs `pip install 'overnight[data]'`"
    return None


def tables_in(directory: Path) -> list[Path]:
    """The tables that a directory stands for: a data set saved with `datasets`, or shards of Parquet, in their order.

    Raises DirectoryRefused for any other directory, and where there are several splits.
    """
    if (splits := directory / "dataset_dict.json").is_file():
        names = json.loads(splits.read_bytes()).get("splits", [])
        raise DirectoryRefused(f"holds several splits; name one: {_alternatives(directory, names)}")
    if (state := directory / "state.json").is_file():
        names = [entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]]
        return [directory / PurePath(name).name for name in names]
    shards = sorted(directory.glob("*.parquet")) or sorted(directory.glob("data/*.parquet"))
    if not shards:
        raise DirectoryRefused(f"this is a directory; name the files in it, for example with {directory / '*.jsonl'}")
    prefixes = sorted({match["split"] for shard in shards if (match := _SHARD.fullmatch(shard.name))})
    if len(prefixes) > 1:
        folder = shards[0].parent
        globs = _alternatives(folder, [f"{prefix}-*.parquet" for prefix in prefixes])
        raise DirectoryRefused(f"holds several splits; name one: {globs}")
    return shards


def _alternatives(directory: Path, names: list[str]) -> str:
    return " or ".join(str(directory / name) for name in names)


def rows_as_lines(raw: IO[bytes], name: str) -> Iterator[bytes]:
    """The rows of the open file as lines of JSON, many in a piece. Raises DamagedStreamError, and OSError as `raw`."""
    import pyarrow

    try:
        for batch in _batches(raw, name):
            _validate(batch)
            for start in range(0, batch.num_rows, _MAX_ROWS):
                yield b"".join(_lines(batch.slice(start, _MAX_ROWS)))
    except MemoryError:  # before ArrowException, of which it may be one
        raise _damaged(name, "it asks for more memory than there is") from None
    except (pyarrow.ArrowException, ValueError, KeyError) as error:
        raise _damaged(name, error) from None
    except OSError as error:
        if error.errno is None:  # pyarrow's own, of data that no codec understands
            raise _damaged(name, error) from None
        raise


def _batches(raw: IO[bytes], name: str) -> Iterator[pyarrow.RecordBatch]:
    if name.lower().endswith(".parquet"):
        yield from _parquet_batches(raw)
        return
    import pyarrow.ipc

    begins = raw.read(len(_ARROW_FILE))
    raw.seek(0)
    if begins == _ARROW_FILE:
        with pyarrow.ipc.open_file(raw) as file:
            _check(file.schema)
            for number in range(file.num_record_batches):
                yield file.get_batch(number)
    else:
        with pyarrow.ipc.open_stream(raw) as stream:
            _check(stream.schema)
            yield from stream


def _parquet_batches(raw: IO[bytes]) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow.parquet

    # Neither whole row groups nor whole columns of them are held: pages are read as rows are asked for.
    with pyarrow.parquet.ParquetFile(raw, pre_buffer=False, buffer_size=_READ_BYTES) as file:
        _check(file.schema_arrow)
        metadata = file.metadata
        num_bytes = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
        num_rows = _BATCH_BYTES * metadata.num_rows // max(num_bytes, 1)
        yield from file.iter_batches(batch_size=min(max(num_rows, 1), _MAX_ROWS), use_threads=False)


def _check(schema: pyarrow.Schema) -> None:
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise ValueError(f"two columns have the name {twice[0]!r}")


def _validate(batch: pyarrow.RecordBatch) -> None:
    """Raises ArrowInvalid for offsets that point anywhere, which reading would follow.

    Text is looked at as bytes here: what is no UTF-8 is the matter of its row, except within lists and structs.
    """
    import pyarrow

    binaries = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    for column in batch.columns:
        binary = binaries.get(column.type)
        (column if binary is None else column.view(binary)).validate(full=True)


def _lines(batch: pyarrow.RecordBatch) -> Iterator[bytes]:
    batch = _without_nanoseconds(batch)
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except UnicodeDecodeError:
        # Text that is no UTF-8: that row goes on as it is, for its line to be refused.
        if batch.num_rows == 1:
            yield _broken_line(batch)
            return
        for row in range(batch.num_rows):
            yield from _lines(batch.slice(row, 1))
        return
    for row in rows:
        yield to_json(row, inf_nan_mode="null", bytes_mode="base64") + b"\n"


def _without_nanoseconds(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """Python's times have microseconds."""
    import pyarrow

    for position, field in enumerate(batch.schema):
        kind = field.type
        if pyarrow.types.is_timestamp(kind) and kind.unit == "ns":
            coarse = pyarrow.timestamp("us", kind.tz)
        elif pyarrow.types.is_duration(kind) and kind.unit == "ns":
            coarse = pyarrow.duration("us")
        elif pyarrow.types.is_time64(kind) and kind.unit == "ns":
            coarse = pyarrow.time64("us")
        else:
            continue
        column = batch.column(position).cast(coarse, safe=False)
        batch = batch.set_column(position, pyarrow.field(field.name, coarse), column)
    return batch


def _broken_line(row: pyarrow.RecordBatch) -> bytes:
    """A row with text that is no UTF-8 as a line that says so by its bytes."""
    import pyarrow

    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            column.to_pylist()
        except UnicodeDecodeError:
            text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
            data: bytes = column.cast(pyarrow.large_binary())[0].as_py() if text else b"\xff"
            return b"{" + to_json(name) + b':"' + data.replace(b"\n", b" ") + b'"}\n'
    raise AssertionError("every column can be read")


def _damaged(name: str, reason: object) -> DamagedStreamError:
    kind = "Parquet" if name.lower().endswith(".parquet") else "Arrow"
    return DamagedStreamError(f"is cut short, damaged, or no {kind} data at all: {reason}")
