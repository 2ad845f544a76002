"""`overnight bench`: the throughput of a job on fixed data, repeated, and rules that say whether its figures count."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.errors import DataError, NotFoundError, Problem
from pipeline.forecast.forecast import Speed
from pipeline.forecast.speeds import SpeedBook, lengths_of
from pipeline.job import library_versions
from pipeline.probe import probe_machine
from pipeline.source.inputs import expand_inputs
from pipeline.source.lines import digest_inputs
from pipeline.spec.fingerprint import fingerprint
from pipeline.spec.keys import JobSpec
from pipeline.tools.contestant import Contestant, Introduction, Pass

Say = Callable[[str], None]

# The rules, in the manner of MLPerf's: a figure counts if enough was done, for long enough, alike each time.
MIN_PASSES = 3
MIN_REQUESTS = 64
MIN_SLOTFULS = 2  # requests for each slot, so that slots are refilled
MIN_DURATION_S = 10.0
MAX_SPREAD = 0.05


@dataclass(frozen=True, slots=True)
class Rule:
    """One condition of a valid benchmark, and what was found."""

    name: str
    wanted: str
    found: str
    holds: bool


@dataclass(frozen=True, slots=True)
class Result:
    """One engine over all passes. Rates are medians over the passes, in tokens or requests a second."""

    introduction: Introduction
    prefills: Sequence[Pass]
    wholes: Sequence[Pass]

    @property
    def duration_s(self) -> float:
        return median(one.duration_s for one in self.wholes)

    @property
    def prefill_s(self) -> float:
        """To the first token of every request, nothing else going on."""
        return median(one.duration_s for one in self.prefills)

    @property
    def slots(self) -> int:
        """Sequences that were decoded together."""
        return self.wholes[-1].slots

    @property
    def spread(self) -> float:
        """Between the slowest and the fastest pass, as a part of the median."""
        durations = [one.duration_s for one in self.wholes]
        return (max(durations) - min(durations)) / self.duration_s

    @property
    def output_throughput(self) -> float:
        return self.wholes[0].output_tokens / self.duration_s

    @property
    def prefill_throughput(self) -> float:
        return self.prefills[0].prompt_tokens / self.prefill_s

    @property
    def decode_throughput(self) -> float | None:
        """Tokens after each request's first, over the time that the prefill alone does not explain.

        None where that time is within the spread of the passes.
        """
        first, whole = self.prefills[0].output_tokens, self.wholes[0].output_tokens
        decode_s = self.duration_s - self.prefill_s
        return (whole - first) / decode_s if decode_s > max(self.spread, 0.01) * self.duration_s else None

    @property
    def same_answers(self) -> bool:
        return len({one.answers_sha256 for one in self.wholes}) == 1

    def speed(self, lengths_of: str) -> Speed:
        """What the next plan may learn from this."""
        one = self.introduction
        return Speed(
            measured_at=time.time(),
            source="bench",
            num_answers=one.num_requests,
            prompt_tokens=self.wholes[-1].prompt_tokens,
            output_tokens=self.wholes[-1].output_tokens,
            concurrency=min(self.slots, one.num_requests),
            generation_s=self.duration_s,
            prefill_s=self.prefill_s,
            load_s=one.load_s,
            lengths_of=lengths_of,
        )

    def rules(self) -> list[Rule]:
        """What makes the figures count."""
        num_failed = max(one.num_failed for one in self.wholes) + self.introduction.num_rejected
        num_requests = self.introduction.num_requests
        enough = max(MIN_REQUESTS, MIN_SLOTFULS * self.slots)
        return [
            Rule("passes", f"at least {MIN_PASSES}", str(len(self.wholes)), len(self.wholes) >= MIN_PASSES),
            Rule("requests", f"at least {enough}", str(num_requests), num_requests >= enough),
            Rule(
                "duration",
                f"at least {MIN_DURATION_S:g} s a pass",
                f"{self.duration_s:.1f} s",
                self.duration_s >= MIN_DURATION_S,
            ),
            Rule("spread", f"at most {MAX_SPREAD:.0%}", f"{self.spread:.1%}", self.spread <= MAX_SPREAD),
            Rule("failures", "none", str(num_failed), num_failed == 0),
            Rule("answers", "the same in every pass", "the same" if self.same_answers else "differ", self.same_answers),
        ]

    def to_json(self) -> dict[str, Any]:
        whole = self.wholes[-1]
        return {
            **{name: value for name, value in asdict(self.introduction).items() if name != "speed_key"},
            "slots": self.slots,
            "durations_s": [round(one.duration_s, 4) for one in self.wholes],
            "prefill_durations_s": [round(one.duration_s, 4) for one in self.prefills],
            "duration_s": round(self.duration_s, 4),
            "spread": round(self.spread, 4),
            "prompt_tokens": whole.prompt_tokens,
            "output_tokens": whole.output_tokens,
            "output_throughput": round(self.output_throughput, 3),
            "total_token_throughput": round((whole.prompt_tokens + whole.output_tokens) / self.duration_s, 3),
            "request_throughput": round(self.introduction.num_requests / self.duration_s, 4),
            "prefill_throughput": round(self.prefill_throughput, 3),
            "decode_throughput": _rounded(self.decode_throughput, 3),
            "occupancy": _rounded(whole.occupancy, 4),
            "peak_host_bytes": whole.peak_host_bytes,
            "answers_sha256": whole.answers_sha256,
        }


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What `overnight bench` found."""

    facts: Mapping[str, Any]  # job, data, machine, versions
    ours: Result
    baseline: Result | None

    @property
    def valid(self) -> bool:
        return all(rule.holds for rule in self.ours.rules())

    @property
    def ratio(self) -> float | None:
        """Our output tokens a second over the baseline's."""
        return self.ours.output_throughput / self.baseline.output_throughput if self.baseline else None

    @property
    def same_as_baseline(self) -> float | None:
        """The part of answers that are those of the baseline. Low precision lets near ties fall differently."""
        if self.baseline is None:
            return None
        pairs = zip(self.ours.wholes[-1].answer_digests, self.baseline.wholes[-1].answer_digests, strict=True)
        same = [mine == theirs for mine, theirs in pairs]
        return sum(same) / len(same)

    def to_json(self) -> dict[str, Any]:
        value: dict[str, Any] = {"object": "benchmark", **self.facts, "valid": self.valid}
        value["rules"] = [asdict(rule) for rule in self.ours.rules()]
        value |= self.ours.to_json()
        value["baseline"] = self.baseline and self.baseline.to_json()
        if self.ratio is not None and self.same_as_baseline is not None:
            value["ratio"] = round(self.ratio, 4)
            value["same_as_baseline"] = round(self.same_as_baseline, 4)
        return value

    def __str__(self) -> str:
        results = [self.ours] if self.baseline is None else [self.ours, self.baseline]
        columns = [["", *_ROWS], *([result.introduction.engine, *_cells(result)] for result in results)]
        widths = [max(map(len, column)) for column in columns]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in zip(*columns, strict=True)
        ]
        if self.ratio is not None:
            lines.append(
                f"ratio of output tokens a second: {self.ratio:.2f}; same answers: {self.same_as_baseline:.0%}"
            )
        broken = [rule for rule in self.ours.rules() if not rule.holds]
        lines.append("INVALID: " + "; ".join(map(_complaint, broken)) if broken else "VALID")
        return "\n".join(lines)


_ROWS = (
    "output tokens/s",
    "prefill tokens/s",
    "decode tokens/s",
    "requests/s",
    "median pass",
    "spread",
    "slot occupancy",
    "load",
    "peak memory",
)


def _cells(result: Result) -> list[str]:
    value = result.to_json()
    return [
        f"{value['output_throughput']:.1f}",
        f"{value['prefill_throughput']:.1f}",
        "-" if value["decode_throughput"] is None else f"{value['decode_throughput']:.1f}",
        f"{value['request_throughput']:.2f}",
        f"{value['duration_s']:.2f} s",
        f"{value['spread']:.1%}",
        "-" if value["occupancy"] is None else f"{value['occupancy']:.1%}",
        f"{value['load_s']:.1f} s",
        f"{value['peak_host_bytes'] / 1e9:.2f} GB",
    ]


def _complaint(rule: Rule) -> str:
    return f"{rule.name}: {rule.found}, wanted {rule.wanted}"


def bench_job(
    spec: JobSpec, *, num_passes: int = MIN_PASSES, limit: int | None = None, stock: bool = False, say: Say
) -> Benchmark:
    """Measure the job's engine on the job's input, and stock transformers in turn with it if wanted.

    Each pass through the data is a prefill of all requests and then all of them whole; a warm-up comes before and does
    not count. Nothing is written. Raises what `run` raises before it generates, and DataError for an input without a
    line that can be answered or a job that the baseline cannot do.
    """
    files = expand_inputs(spec.input.path)
    data = digest_inputs(files, max_bytes=spec.input.max_bytes)
    with ExitStack() as stack:
        contestants: list[Contestant] = []
        for is_stock in (False, True) if stock else (False,):
            contestants.append(stack.enter_context(Contestant(spec, limit=limit, stock=is_stock)))
        for contestant in contestants:
            contestant.measure("warm-up")
        prefills: list[list[Pass]] = [[] for _ in contestants]
        wholes: list[list[Pass]] = [[] for _ in contestants]
        for number in range(num_passes):
            for place, contestant in enumerate(contestants):
                prefills[place].append(contestant.measure("prefill"))
                wholes[place].append(contestant.measure("whole"))
                one = wholes[place][-1]
                say(
                    f"pass {number + 1} of {num_passes}, {contestant.introduction.engine}: "
                    f"{one.output_tokens / one.duration_s:.1f} output tokens/s"
                )
        results = [
            Result(contestant.introduction, *passes)
            for contestant, *passes in zip(contestants, prefills, wholes, strict=True)
        ]
    versions = library_versions(results[0].introduction.engine)
    SpeedBook(results[0].introduction.speed_key, versions).write(results[0].speed(lengths_of(spec)))
    facts = {
        "job": spec.name,
        "spec_fingerprint": fingerprint(spec),
        "input_sha256": data.sha256,
        "num_items": data.num_items if limit is None else min(limit, data.num_items),
        "machine": probe_machine().name,
        "versions": versions,
    }
    return Benchmark(facts, results[0], results[1] if stock else None)


# --- two benchmarks


def compare(before: Path, after: Path) -> str:
    """What changed between two results of `overnight bench`, files as it prints them.

    Raises NotFoundError and DataError for files that are none, and DataError where they measured different work.
    """
    old, new = _read(before), _read(after)
    differing = [key for key in ("input_sha256", "num_requests", "spec_fingerprint") if old[key] != new[key]]
    if differing:
        message = f"measured other work than {before}: {', '.join(differing)} differ; only equal work can be compared"
        raise DataError(Problem(message, str(after)))
    lines = [f"{before} -> {after}"]
    for name in ("output_throughput", "prefill_throughput", "decode_throughput", "request_throughput"):
        if old[name] and new[name]:
            lines.append(f"{name}: {old[name]:.2f} -> {new[name]:.2f}, {new[name] / old[name]:.3f} x")
    noise = max(old["spread"], new["spread"])
    ratio = new["output_throughput"] / old["output_throughput"]
    verdict = "faster" if ratio > 1 + noise else "slower" if ratio < 1 - noise else "no difference beyond the spread"
    lines.append(f"{verdict} (spread {noise:.1%})")
    same = old["answers_sha256"] == new["answers_sha256"]
    lines.append(f"answers: {'the same' if same else 'differ'}")
    lines += [f"machines differ: {old['machine']}, {new['machine']}"] if old["machine"] != new["machine"] else []
    lines += [f"{path} is INVALID" for path, one in ((before, old), (after, new)) if not one["valid"]]
    return "\n".join(lines)


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise NotFoundError(Problem(f"cannot be read: {error.strerror}", str(path))) from None
    except ValueError:
        value = None
    if not isinstance(value, dict) or value.get("object") != "benchmark":  # pyright: ignore[reportUnknownMemberType]
        raise DataError(Problem("is no result of `overnight bench`", str(path)))
    return value  # pyright: ignore[reportUnknownVariableType]
