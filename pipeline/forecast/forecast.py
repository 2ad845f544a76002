"""How long a job will take, from the speeds that earlier runs achieved; pure, and honest about what it does not know.

Every uncertainty is an interval with its reason: how a past speed divides between prompts and answers, how it changes
with the number of sequences decoded together, how long the answers will be, and how much two runs of the same differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import sqrt
from statistics import median
from typing import Any, Literal

# Two runs of the same work on a machine that others use too differ by about this much.
_NOISE = 0.15
# Speeds whose interval is nearly as narrow as the narrowest have as much to say; wider ones are left out.
_AS_NARROW = 1.1
_ALIKE = 1.25  # numbers of sequences that differ by less are not worth a word


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What was once achieved with the same model, machine and libraries. Times in seconds."""

    measured_at: float  # Unix time
    source: Literal["run", "bench", "measurement"]
    num_answers: int
    prompt_tokens: int
    output_tokens: int
    concurrency: int  # sequences decoded together, at most
    generation_s: float
    prefill_s: float | None  # of it, until all prompts were computed; None where both went on side by side
    load_s: float
    # What shaped the length of answers, so that only alike jobs learn from it; None where lengths were cut.
    lengths_of: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a job asks for. Tokens are totals over all answers."""

    num_answers: int
    prompt_tokens: int
    most_output_tokens: int  # if every answer takes all that it may
    slots: int
    lengths_of: str  # see Speed
    exact_lengths: bool = False  # every answer takes all that it may

    @property
    def concurrency(self) -> int:
        return max(1, min(self.slots, self.num_answers))

    def part(self, num_answers: int) -> Work:
        """The same work for so many of the answers."""
        share = num_answers / self.num_answers if self.num_answers else 0.0
        return replace(
            self,
            num_answers=num_answers,
            prompt_tokens=round(self.prompt_tokens * share),
            most_output_tokens=round(self.most_output_tokens * share),
        )


@dataclass(frozen=True, slots=True)
class Estimate:
    """Between `low` and `high`; `expected` is the single best guess."""

    low: float
    expected: float
    high: float

    def scaled(self, factor: float) -> Estimate:
        return Estimate(self.low * factor, self.expected * factor, self.high * factor)


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run is expected to take. Times in seconds."""

    generation_s: Estimate
    load_s: float
    prompt_tokens: int
    output_tokens: Estimate
    num_speeds: int  # that this rests on
    reason: str

    @property
    def total_s(self) -> Estimate:
        """Loading and generation."""
        one = self.generation_s
        return Estimate(one.low + self.load_s, one.expected + self.load_s, one.high + self.load_s)

    def __str__(self) -> str:
        one = self.generation_s
        return f"about {show_duration(one.expected)} ({show_duration(one.low)} to {show_duration(one.high)})"

    def to_json(self) -> dict[str, Any]:
        """Rounded to milliseconds and tokens."""
        return {
            **asdict(self),
            "generation_s": _rounded(self.generation_s, 3),
            "load_s": round(self.load_s, 3),
            "output_tokens": _rounded(self.output_tokens, 0),
        }


def make_forecast(work: Work, speeds: Sequence[Speed]) -> Forecast | None:
    """The time that `work` will take; None where no speed is known or there is nothing to do.

    A past run with P prompt and D output tokens in T seconds only says that P a + D b = T. A token of a prompt costs no
    more than a token of an answer, so that (a, b) lies between (0, T/D) and (T/(P+D), T/(P+D)); where prefill was timed
    apart both are known. With n times as many sequences decoded together a batch gets no slower and at most n times as
    fast, and with fewer the other way round.
    """
    usable = [speed for speed in speeds if speed.generation_s > 0 and speed.output_tokens > 0]
    if not usable or not work.num_answers:
        return None
    tokens, why_lengths = _output_tokens(work, speeds)
    # One length at a time: speeds are compared at the expected one.
    ranges = [_time(speed, work, tokens.expected) for speed in usable]
    narrowest = min(high / low for low, high in ranges)
    chosen = [speed for speed, (low, high) in zip(usable, ranges, strict=True) if high / low <= narrowest * _AS_NARROW]
    shortest = min(_time(speed, work, tokens.low)[0] for speed in chosen)
    longest = max(_time(speed, work, tokens.high)[1] for speed in chosen)
    middle = median(sqrt(low * high) for low, high in (_time(speed, work, tokens.expected) for speed in chosen))
    return Forecast(
        generation_s=Estimate(min(shortest, middle) * (1 - _NOISE), middle, max(longest, middle) * (1 + _NOISE)),
        load_s=median(speed.load_s for speed in chosen),
        prompt_tokens=work.prompt_tokens,
        output_tokens=tokens,
        num_speeds=len(chosen),
        reason=f"{'; '.join(_why_speed(chosen, work))}; {why_lengths}",
    )


def _output_tokens(work: Work, speeds: Sequence[Speed]) -> tuple[Estimate, str]:
    """Tokens of all answers, and how that is known."""
    most = float(work.most_output_tokens)
    if work.exact_lengths:
        return Estimate(most, most, most), "every answer takes all the tokens that it may"
    alike = [speed for speed in speeds if speed.lengths_of == work.lengths_of and speed.num_answers]
    if not alike:
        reason = "nothing tells how long the answers will be: this is for answers of the greatest length"
        return Estimate(min(most, work.num_answers), most, most), reason
    means = [speed.output_tokens / speed.num_answers for speed in alike]
    totals = [min(most, mean * work.num_answers) for mean in means]
    shortest, middle, longest = min(totals), median(totals), max(totals)
    mean = f"{middle / work.num_answers:.0f}"
    return (
        Estimate(shortest, middle, min(most, longest)),
        f"answers of {mean} tokens on average, as in earlier runs with these settings",
    )


def _time(speed: Speed, work: Work, output_tokens: float) -> tuple[float, float]:
    """The least and the most seconds that the work may take if `speed` is typical."""
    low, high = sorted(prompt_s * work.prompt_tokens + output_s * output_tokens for prompt_s, output_s in _costs(speed))
    ratio = work.concurrency / max(1, speed.concurrency)
    return (low / ratio, high) if ratio > 1 else (low, high / ratio)


def _costs(speed: Speed) -> Iterator[tuple[float, float]]:
    """Seconds for a token of a prompt and for one of an answer: the ends of what is possible."""
    prompt, output, total_s = speed.prompt_tokens, speed.output_tokens, speed.generation_s
    first = speed.num_answers  # tokens that the prefill gives
    if speed.prefill_s is not None and prompt and output > first and total_s > speed.prefill_s:
        costs = speed.prefill_s / prompt, (total_s - speed.prefill_s) / (output - first)
        yield costs
        yield costs
        return
    yield 0.0, total_s / output
    yield total_s / (prompt + output), total_s / (prompt + output)


_SOURCES = {"run": "earlier run", "bench": "benchmark", "measurement": "measurement"}


def _why_speed(chosen: Sequence[Speed], work: Work) -> Iterator[str]:
    counts = {noun: sum(speed.source == source for speed in chosen) for source, noun in _SOURCES.items()}
    named = [f"{count} {noun}{'' if count == 1 else 's'}" for noun, count in counts.items() if count]
    yield f"the speed of {' and '.join(named)} on this machine"
    ratios = [work.concurrency / max(1, speed.concurrency) for speed in chosen]
    if max(ratios) > _ALIKE or min(ratios) < 1 / _ALIKE:
        together = ", ".join(map(str, sorted({speed.concurrency for speed in chosen})))
        yield f"there with {together} sequences decoded together, here with {work.concurrency}"


def show_duration(seconds: float) -> str:
    """For people, with the precision that they can use: 4.2 s, 42 s, 7 min 5 s, 3 h 12 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, second = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {second} s" if minutes < 10 and second else f"{minutes} min"
    hours, minute = divmod(round(seconds / 60), 60)
    return f"{hours} h {minute} min" if minute else f"{hours} h"


def _rounded(estimate: Estimate, digits: int) -> dict[str, float]:
    return {name: round(value, digits) for name, value in asdict(estimate).items()}
