"""Fold completions into the throughput summary; tallies of groups, sessions and shards add up."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pipeline.records import Completion

# A value v falls into bucket ceil(log_g(v)); answering with the bucket's middle is within 1 % of v for
# g = (1 + 0.01) / (1 - 0.01) (DDSketch: Masson, Rim, Lee, VLDB 2019). Buckets of equal base simply add.
_ACCURACY = 0.01
BUCKET_RATIO = (1 + _ACCURACY) / (1 - _ACCURACY)
_LOG_BASE = math.log(BUCKET_RATIO)
_SMALLEST = 1e-9  # seconds; anything shorter, zero too, counts as this


@dataclass(slots=True)
class Histogram:
    """A mergeable distribution of durations in seconds, or of lengths in tokens: exact count and sum, quantiles
    within 1 %."""

    count: int = 0
    sum: float = 0.0
    buckets: dict[int, int] = field(default_factory=dict[int, int])

    def add(self, value: float) -> None:
        bucket = math.ceil(math.log(max(value, _SMALLEST)) / _LOG_BASE)
        self.buckets[bucket] = self.buckets.get(bucket, 0) + 1
        self.count += 1
        self.sum += value

    def merge(self, other: Histogram) -> None:
        for bucket, count in other.buckets.items():
            self.buckets[bucket] = self.buckets.get(bucket, 0) + count
        self.count += other.count
        self.sum += other.sum

    def values(self) -> Iterator[tuple[float, int]]:
        """Ascending values, each within 1 % of those that it stands for, with their counts."""
        for bucket in sorted(self.buckets):
            yield 2 * BUCKET_RATIO**bucket / (BUCKET_RATIO + 1), self.buckets[bucket]

    def mean(self) -> float:
        """Seconds; 0 of nothing."""
        return self.sum / self.count if self.count else 0.0

    def quantile(self, fraction: float) -> float:
        """Seconds, the value that `fraction` (0 to 1) of all values do not exceed; 0 of nothing."""
        rank = fraction * (self.count - 1)
        seen = 0
        for value, count in self.values():
            seen += count
            if seen > rank:
                return value
        return 0.0

    def to_json(self) -> dict[str, Any]:
        return {"count": self.count, "sum": self.sum, "buckets": sorted(self.buckets.items())}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Histogram:
        return cls(value["count"], value["sum"], {int(bucket): count for bucket, count in value["buckets"]})


_COUNTS = ("completed", "failed", "input_tokens", "output_tokens", "reasoning_tokens", "out_of_memory_events")
_HISTOGRAMS = ("ttft", "tpot", "e2el")


@dataclass(slots=True)
class Tally:
    """What a set of answers adds up to. Histograms are in seconds, of completed answers only."""

    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    out_of_memory_events: int = 0  # met on the way, most of them cured by a smaller batch
    ttft: Histogram = field(default_factory=Histogram)  # time to first token
    tpot: Histogram = field(default_factory=Histogram)  # time per output token after the first
    e2el: Histogram = field(default_factory=Histogram)  # end-to-end latency
    errors: dict[str, int] = field(default_factory=dict[str, int])  # failed answers by error type

    def add(self, completion: Completion) -> None:
        if completion.error is not None:
            self.failed += 1
            self.errors[completion.error.type] = self.errors.get(completion.error.type, 0) + 1
            return
        self.completed += 1
        usage, timing = completion.usage, completion.timing
        if usage is not None:
            self.input_tokens += usage.prompt_tokens
            self.output_tokens += usage.completion_tokens
            self.reasoning_tokens += usage.reasoning_tokens
        if timing is not None:
            self.ttft.add(timing.time_to_first_token_s)
            self.e2el.add(timing.total_s)
            if usage is not None and usage.completion_tokens > 1:
                self.tpot.add(timing.decode_s / (usage.completion_tokens - 1))

    def merge(self, other: Tally) -> None:
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in _HISTOGRAMS:
            getattr(self, name).merge(getattr(other, name))
        for kind, count in other.errors.items():
            self.errors[kind] = self.errors.get(kind, 0) + count

    def to_json(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in _COUNTS}
        histograms = {name: getattr(self, name).to_json() for name in _HISTOGRAMS}
        return {**counts, **histograms, "errors": dict(sorted(self.errors.items()))}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Tally:
        counts: dict[str, Any] = {name: value[name] for name in _COUNTS}
        histograms: dict[str, Any] = {name: Histogram.from_json(value[name]) for name in _HISTOGRAMS}
        return cls(**counts, **histograms, errors=dict(value["errors"]))


@dataclass(frozen=True, slots=True)
class Session:
    """One process's share of a run. `duration` is generation time in seconds, loading apart."""

    started_at: float  # Unix time
    duration: float
    load_s: float
    completed: int
    # In good order: finished | stopped | time_limit | low_memory | failed (refused by the disk, say).
    # By a fault: crashed | stalled | out_of_memory | killed (unexplained). Not yet: running.
    ended: str

    def to_json(self) -> dict[str, Any]:
        return {
            "started_at": timestamp(self.started_at),
            "duration": round(self.duration, 3),
            "load_s": round(self.load_s, 3),
            "completed": self.completed,
            "ended": self.ended,
        }


def timestamp(unix_time: float) -> str:
    """Unix seconds → ISO 8601 in UTC with milliseconds: 2026-01-01T00:00:00.000Z."""
    moment = datetime.fromtimestamp(unix_time, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z"


def unix_time(text: str) -> float:
    """The inverse of `timestamp`. Raises ValueError."""
    return datetime.fromisoformat(text).timestamp()


def summarize(tally: Tally, sessions: Sequence[Session], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The summary record of FORMATS.

    `facts` supplies what is not counted (job, engine, load_strategy, fingerprints, versions) and is laid in after the
    figures. Rates divide by the generation time of all sessions; field names and units follow `vllm bench serve`
    (tokens or requests per second, latencies in milliseconds).
    """
    duration = sum(session.duration for session in sessions)
    num_tokens = tally.input_tokens + tally.output_tokens

    def rate(count: int) -> float:
        return round(count / duration, 4) if duration > 0 else 0.0

    latencies: dict[str, float] = {}
    for name in _HISTOGRAMS:
        histogram: Histogram = getattr(tally, name)
        latencies[f"mean_{name}_ms"] = round(histogram.mean() * 1e3, 4)
        latencies[f"median_{name}_ms"] = round(histogram.quantile(0.5) * 1e3, 4)
        latencies[f"p99_{name}_ms"] = round(histogram.quantile(0.99) * 1e3, 4)
    return {
        "object": "summary",
        "job": facts["job"],
        "completed": tally.completed,
        "failed": tally.failed,
        "duration": round(duration, 3),
        "load_s": round(sum(session.load_s for session in sessions), 3),
        "total_input_tokens": tally.input_tokens,
        "total_output_tokens": tally.output_tokens,
        "total_reasoning_tokens": tally.reasoning_tokens,
        "request_throughput": rate(tally.completed),
        "output_throughput": rate(tally.output_tokens),
        "total_token_throughput": rate(num_tokens),
        **latencies,
        "errors": dict(sorted(tally.errors.items())),
        "out_of_memory_events": tally.out_of_memory_events,
        "sessions": [session.to_json() for session in sessions],
        **{key: value for key, value in facts.items() if key != "job"},
    }
