"""How a run is getting on, as a textfile for Prometheus' node exporter; written by `prometheus_client`, atomically.

Counts are those of the whole run, over all its sessions, and only of what is committed. The file stays behind when the
run has ended: then `overnight_exit_code` is in it. A process that was killed leaves `overnight_running` at 1, and
`overnight_last_commit_timestamp_seconds` is what tells.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pipeline.source.shard import Shard
from pipeline.spec.keys import JobSpec
from pipeline.summary import Session, Tally

if TYPE_CHECKING:
    from prometheus_client import Metric

_WRITE_S = 1.0


def metrics_path(path: Path, shard: Shard | None) -> Path:
    """Each shard has a file of its own; the suffix stays last, for the exporter reads no other files."""
    if shard is None:
        return path
    return path.with_name(f"{path.stem}.shard-{shard.number}-of-{shard.count}{path.suffix}")


class Metrics:
    """The metrics of one run in the file `path`, nowhere if that is None.

    A file that cannot be written is told once and changes nothing.
    """

    def __init__(self, path: Path | None, labels: Mapping[str, str], say: Callable[[str], None]) -> None:
        self._path = path
        self._labels = labels
        self._say = say
        self._written_at = 0.0
        self._has_failed = False
        self._tally = Tally()
        self._sessions: Sequence[Session] = ()
        self._num_answers = self._slots = self._num_in_flight = 0
        self._committed_at: float | None = None
        self._exit_code: int | None = None

    @classmethod
    def of(cls, spec: JobSpec, shard: Shard | None, say: Callable[[str], None]) -> Self:
        """Those of the job or of its shard."""
        path = spec.run.metrics
        labels = {"job_name": spec.name, "shard": "" if shard is None else str(shard)}
        return cls(None if path is None else metrics_path(Path(path), shard), labels, say)

    def begin(self, num_answers: int, slots: int, tally: Tally, sessions: Sequence[Session]) -> None:
        """A session begins that is to bring the run to so many answers, in so many slots."""
        self._num_answers, self._slots = num_answers, slots
        self._take(tally, sessions)
        self._write()

    def show(self, tally: Tally, sessions: Sequence[Session], num_in_flight: int, *, slots: int | None = None) -> None:
        """What a commit has come to, and how many `slots` there are now if that may be another number; written at most
        once a second."""
        self._slots = self._slots if slots is None else slots
        self._num_in_flight = num_in_flight
        self._committed_at = time.time()
        self._take(tally, sessions)
        if time.monotonic() - self._written_at >= _WRITE_S:
            self._write()

    def end(self, exit_code: int) -> None:
        self._exit_code = exit_code
        self._num_in_flight = 0
        self._write()

    def collect(self) -> Iterator[Metric]:
        """What `prometheus_client` asks for."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        names, values = list(self._labels), list(self._labels.values())

        def counter(name: str, about: str, value: float) -> Metric:
            family = CounterMetricFamily(f"overnight_{name}", about, labels=names)
            family.add_metric(values, value)
            return family

        def gauge(name: str, about: str, value: float) -> Metric:
            family = GaugeMetricFamily(f"overnight_{name}", about, labels=names)
            family.add_metric(values, value)
            return family

        tally, sessions = self._tally, self._sessions
        duration = sum(session.duration for session in sessions)
        yield counter("answers_completed", "Lines answered.", tally.completed)
        yield counter("answers_failed", "Lines answered with an error.", tally.failed)
        errors = CounterMetricFamily(
            "overnight_errors", "Lines answered with an error, by type.", labels=[*names, "type"]
        )
        for kind, count in sorted(tally.errors.items()):
            errors.add_metric([*values, kind], count)
        yield errors
        yield counter("input_tokens", "Tokens of the prompts answered.", tally.input_tokens)
        yield counter("output_tokens", "Tokens generated, reasoning included.", tally.output_tokens)
        yield counter("reasoning_tokens", "Tokens of reasoning among them.", tally.reasoning_tokens)
        yield counter("out_of_memory_events", "Times that memory ran out.", tally.out_of_memory_events)
        yield counter("generation_seconds", "Generation time of all sessions.", duration)
        yield counter("load_seconds", "Loading time of all sessions.", sum(session.load_s for session in sessions))
        yield gauge("answers_wanted", "Answers that the run has to give.", self._num_answers)
        rate = tally.output_tokens / duration if duration > 0 else 0.0
        yield gauge("output_tokens_per_second", "Mean over all sessions; take a rate() for the pace now.", rate)
        yield gauge("slots", "Sequences that may be decoded together.", self._slots)
        yield gauge("slots_in_use", "Answers in flight at the last commit.", self._num_in_flight)
        yield gauge("running", "1 until the run's process has ended in good order.", self._exit_code is None)
        if self._committed_at is not None:
            about = "When the last answers reached the disk."
            yield gauge("last_commit_timestamp_seconds", about, self._committed_at)
        if self._exit_code is not None:
            yield gauge(
                "exit_code", "0 all answered, 3 some failed, 75 stopped; others as documented.", self._exit_code
            )

    def _take(self, tally: Tally, sessions: Sequence[Session]) -> None:
        self._tally = replace(tally, errors=dict(tally.errors))
        self._sessions = list(sessions)

    def _write(self) -> None:
        if self._path is None:
            return
        from prometheus_client import CollectorRegistry, write_to_textfile

        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)  # pyright: ignore[reportArgumentType] - all it asks for is `collect`
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_to_textfile(str(self._path), registry)
        except OSError as error:
            if not self._has_failed:
                self._say(f"{self._path}: metrics cannot be written: {error.strerror}; the run goes on without")
            self._has_failed = True
        self._written_at = time.monotonic()
