"""Answers as rows of a Parquet file, one for each sample: the fields of a native line are the columns.

`id` is text: a string as it is, any other value as JSON. `input` is the input line as JSON. The summary is in the
file's metadata under `overnight.summary`.
"""

# pyright: basic
from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json, to_json

from pipeline.compression import DamagedStreamError
from pipeline.output.forms import Companions, Conclude

if TYPE_CHECKING:
    import pyarrow

SUMMARY_KEY = "overnight.summary"
_GROUP_ROWS = 16_384
_GROUP_BYTES = 16 << 20  # of native lines


@cache
def schema() -> pyarrow.Schema:
    """The columns, in the order of a native line."""
    import pyarrow as pa

    counts = pa.struct([(name, pa.int64()) for name in ("prompt_tokens", "completion_tokens", "reasoning_tokens")])
    seconds = ("queue_s", "prefill_s", "time_to_first_token_s", "decode_s", "total_s", "tokens_per_second")
    timing = pa.struct([("started_at", pa.timestamp("ms", "UTC")), *((name, pa.float64()) for name in seconds)])
    place = [("line", pa.int64()), ("offset", pa.int64()), ("attempts", pa.int64())]
    error = pa.struct([*((name, pa.string()) for name in ("type", "message", "file")), *place])
    return pa.schema(
        [
            pa.field("index", pa.int64(), nullable=False),
            ("id", pa.string()),
            pa.field("sample", pa.int32(), nullable=False),
            ("completion", pa.string()),
            ("reasoning", pa.string()),
            pa.field("finish_reason", pa.string(), nullable=False),
            ("usage", counts),
            ("timing", timing),
            ("error", error),
            ("input", pa.string()),
        ]
    )


class Parquet:
    """The same bytes for the same lines and version of pyarrow."""

    companions: Companions = MappingProxyType({})
    has_lines = False

    def encode(self, lines: Iterable[bytes], conclude: Conclude, *, summary_line: bool) -> Iterator[bytes]:
        """The digest that `conclude` is given covers the native lines."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        sink = _Sink()
        digest = hashlib.sha256()
        with pq.ParquetWriter(sink, schema(), compression="zstd") as writer:
            for group in _groups(lines):
                for line in group:
                    digest.update(line)
                writer.write_batch(pa.RecordBatch.from_pylist([_row(from_json(line)) for line in group], schema()))
                yield sink.take()
            summary = conclude(digest.hexdigest())
            if summary_line:
                writer.add_key_value_metadata({SUMMARY_KEY: summary.decode().rstrip("\n")})
        yield sink.take()


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """The native records of a published file, `id` as text. Raises DamagedStreamError for any other file, OSError."""
    import pyarrow
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=1024, use_threads=False):
                yield from map(_record, batch.to_pylist())
    except (pyarrow.ArrowException, ValueError, LookupError) as error:
        raise DamagedStreamError(f"is damaged, or no table of answers: {error}") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise DamagedStreamError(f"is cut short or damaged: {error}") from None


class _Sink(io.RawIOBase):
    """Takes what a writer writes and hands it on."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self._pieces.append(bytes(data))
        return len(self._pieces[-1])

    def take(self) -> bytes:
        data = b"".join(self._pieces)
        self._pieces.clear()
        return data


def _groups(pieces: Iterable[bytes]) -> Iterator[Sequence[bytes]]:
    """Lines that become one row group, each with its line end."""
    group: list[bytes] = []
    num_bytes = 0
    for piece in pieces:
        for line in piece.split(b"\n")[:-1]:
            group.append(line + b"\n")
            num_bytes += len(line)
            if len(group) == _GROUP_ROWS or num_bytes >= _GROUP_BYTES:
                yield group
                group, num_bytes = [], 0
    if group:
        yield group


def _row(record: dict[str, Any]) -> dict[str, Any]:
    id_, timing, line = record["id"], record["timing"], record["input"]
    if timing is not None:
        timing = {**timing, "started_at": datetime.fromisoformat(timing["started_at"])}
    return {
        **record,
        "id": id_ if id_ is None or isinstance(id_, str) else to_json(id_).decode(),
        "timing": timing,
        "input": None if line is None else to_json(line).decode(),
    }


def _record(row: dict[str, Any]) -> dict[str, Any]:
    timing, line = row["timing"], row["input"]
    if timing is not None:
        text = timing["started_at"].astimezone(UTC).isoformat(timespec="milliseconds")
        timing = {**timing, "started_at": text.replace("+00:00", "Z")}
    return {"object": "completion", **row, "timing": timing, "input": None if line is None else from_json(line)}
