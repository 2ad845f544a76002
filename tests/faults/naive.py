"""What a program without a ledger does: append answers to a file, and go on behind what can be parsed of it.

The negative control of several promises: the same tests must catch it, or they prove nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pipeline.job
from pipeline.ledger.files import RunPaths
from pipeline.ledger.history import Charge
from pipeline.records import Completion, Request
from pipeline.summary import Session, Tally


class _Descriptor(io.RawIOBase):
    """A file without a buffer whose calls are those that a test can make to fail."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return os.write(self._descriptor, data)


class NaiveLedger:
    """Serves the loop as Ledger does. Nothing is synced or checked, and what cannot be parsed is skipped."""

    has_suspects = False
    unfinished: Mapping[tuple[int, int], tuple[int, ...]] = {}
    sessions: Sequence[Session] = (Session(0.0, 0.0, 0.0, 0, "finished"),)
    input_sha256 = ""
    is_buffered = False

    def __init__(self, output: Path, num_items: int, num_samples: int) -> None:
        self._output = output
        self._path = RunPaths(output).partial
        self._num_samples = num_samples
        self.items = range(num_items)
        self.num_answers = num_items * num_samples
        self.tally = Tally()
        self._lines = self._parse()
        self._file = io.BufferedWriter(_Descriptor(self._path))

    def _parse(self) -> dict[int, bytes]:
        lines: dict[int, bytes] = {}
        for line in self._path.read_bytes().split(b"\n") if self._path.exists() else ():
            try:
                record = json.loads(line)
                lines[record["index"] * self._num_samples + record["sample"]] = line
            except ValueError:
                continue
        return lines

    @classmethod
    def open(cls, output: Path, identity: Any, **_: Any) -> Self:
        return cls(output, identity.measure(None).num_items, identity.num_samples)

    @property
    def is_complete(self) -> bool:
        return len(self._lines) == self.num_answers

    def is_done(self, index: int, sample: int) -> bool:
        return index * self._num_samples + sample in self._lines

    def next_unanswered_item(self, index: int) -> int | None:
        numbers = range(index * self._num_samples, self.num_answers)
        return next((number // self._num_samples for number in numbers if number not in self._lines), None)

    def admitting(self, requests: Iterator[Request]) -> Iterator[Request]:
        return requests

    def charges(self, _index: int, _sample: int) -> Sequence[Charge]:
        return ()

    def append(self, completion: Completion, line: bytes) -> None:
        self._lines[completion.item.index * self._num_samples + completion.sample] = line
        try:
            self._file.write(line)
            if not self.is_buffered:
                self._file.flush()
        except OSError:
            self._file.flush()  # once more

    def commit(self) -> None:
        pass

    def commit_if_due(self) -> bool:
        self.commit()
        return True

    def publish(self, summarize: Callable[..., Mapping[str, Any]], **_options: Any) -> Mapping[str, Any]:
        self._file.close()
        lines = b"".join(line + b"\n" for _, line in sorted(self._parse().items()))
        failed = lines.count(b'"error":{')
        digest = hashlib.sha256(lines).hexdigest()
        summary = {"object": "summary", "completed": self.num_answers, "failed": failed, "output_sha256": digest}
        self._output.write_bytes(lines + json.dumps(summary).encode() + b"\n")
        RunPaths(self._output).summary.write_text(json.dumps(summary))
        return {**summary, "duration": 0.0, "load_s": 0.0, "output_throughput": 0.0, "request_throughput": 0.0}

    def close(self, _ended: str = "failed") -> None:
        self._file.close()

    def __getattr__(self, _name: str) -> Callable[..., None]:
        """Whatever else the loop tells its ledger is forgotten."""
        return lambda *_arguments, **_options: None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class BufferedLedger(NaiveLedger):
    """The same through the buffer that a file of Python has by default."""

    is_buffered = True


def use_naive_ledger() -> None:
    pipeline.job.Ledger = NaiveLedger


def use_buffered_ledger() -> None:
    pipeline.job.Ledger = BufferedLedger
