"""`overnight plan`: what a run would do, and why, and how long it would take, without doing it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import talk
from pipeline.forecast.census import Census, take_census
from pipeline.forecast.forecast import Estimate, Forecast, show_duration
from pipeline.forecast.speeds import SpeedBook
from pipeline.forecast.streaming import forecast_plan
from pipeline.job import library_versions, locate_config, prepare
from pipeline.plan.plan import Plan
from pipeline.source.inputs import expand_inputs
from pipeline.source.line_parser import LineParser
from pipeline.source.lines import digest_inputs
from pipeline.source.shard import Shard
from pipeline.spec.keys import JobSpec
from pipeline.tools.measure import measure_speed

SAMPLE = 20_000  # lines that are encoded: a few seconds, and means within a percent
_ECHO_CONTEXT = 1 << 20
_BAR = 40  # characters
_BLOCKS = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True, slots=True)
class PlanReport:
    """The plan, the input as far as it could be counted (None: the tokenizer is not here), and the time to come."""

    plan: Plan
    census: Census | None
    first_prompt: str | None  # the first good line as the model will see it
    forecast: Forecast | None  # None: no speed is known, or there is nothing to do
    is_here: bool  # planned for this machine, and not for one that a file describes
    price_per_hour: float | None

    @property
    def cost(self) -> Estimate | None:
        """In the unit of the price: loading and generation."""
        if self.forecast is None or self.price_per_hour is None:
            return None
        return self.forecast.total_s.scaled(self.price_per_hour / 3600)

    def __str__(self) -> str:
        lines = [self.plan.explain()]
        if self.census is None:
            lines.append("input: not counted, for the model's tokenizer is not here")
        else:
            lines += [*_input_lines(self.census), *_refusal_lines(self.census)]
            lines += self._time_lines()
        if self.first_prompt is not None:
            lines += ["first prompt as the model sees it:", *(f"  | {line}" for line in self.first_prompt.split("\n"))]
        return "\n".join(lines)

    def _time_lines(self) -> Iterator[str]:
        forecast = self.forecast
        if forecast is not None:
            yield f"time: {forecast} of generation, and {show_duration(forecast.load_s)} of loading"
            yield f"  {forecast.reason}"
        elif self.is_here:
            yield "time: unknown, for nothing has told yet how fast this model is on this machine; --measure loads it"
            yield "  and times a few steps, and every run and `overnight bench` leave their speed for the next plan"
        else:
            yield "time: unknown, for speeds are those of this machine"
        if (cost := self.cost) is not None:
            low, about, high = map(_money, (cost.low, cost.expected, cost.high))
            yield f"cost: about {about} ({low} to {high}) at {self.price_per_hour:g} an hour"
        elif self.price_per_hour is not None:
            yield "cost: unknown, as the time is"

    def to_json(self) -> dict[str, Any]:
        return {
            "object": "plan",
            **self.plan.to_json(),
            "input": None if self.census is None else self._input_json(self.census),
            "forecast": None if self.forecast is None else self.forecast.to_json(),
            "price_per_hour": self.price_per_hour,
            "cost": None if self.cost is None else asdict(self.cost),
        }

    def _input_json(self, census: Census) -> dict[str, Any]:
        stats = census.prompt_stats
        return {
            "stats": None if stats is None else asdict(stats),
            **census.to_json(),
            "first_prompt": self.first_prompt,
        }


def plan_job(
    spec: JobSpec,
    *,
    limit: int | None = None,
    shard: Shard | None = None,
    machine_file: Path | None = None,
    measure: bool = False,
    price_per_hour: float | None = None,
    sample: int = SAMPLE,
) -> PlanReport:
    """Plan the job, or its shard, for this machine or for the one that a file describes, and count its input with its
    tokenizer.

    Every line is checked, and `sample` of them, evenly spread, are encoded. `measure` loads the model for a few steps,
    unless the file describes the machine. Raises whatever would keep the run from starting: SpecError, NotFoundError,
    DataError, MachineError.
    """
    from pipeline.loading import apply_environment
    from pipeline.machine import load_machine

    files = expand_inputs(spec.input.path)
    LineParser(spec)  # for what is wrong with the template, before the model is looked for
    facts = locate_config(spec, talk.say)
    machine = None if machine_file is None else load_machine(machine_file)
    plan, choice = prepare(spec, facts, machine=machine)
    apply_environment(plan)
    if facts is not None and not has_tokenizer(Path(facts.directory)):
        return PlanReport(plan, None, None, None, machine is None, price_per_hour)
    num_lines = digest_inputs(files, max_bytes=spec.input.max_bytes).num_items
    encoder = choice.encoder()
    context_length = _ECHO_CONTEXT if facts is None else facts.architecture.context_length
    num_lines = num_lines if limit is None else min(limit, num_lines)
    items = range(num_lines) if shard is None else shard.items(num_lines)
    census = take_census(spec, files, items, encoder.encode, most=sample, context_length=context_length, say=talk.say)
    if (stats := census.prompt_stats) is not None:
        plan, _ = prepare(spec, facts, machine=machine, stats=stats)
    book = SpeedBook(plan.speed_key, library_versions(plan.engine))
    if measure and machine is None and census.num_encoded:
        book.write(measure_speed(spec, plan, census, talk.say))
    forecast = forecast_plan(census.work(spec, plan.slots), plan, book.read())
    first = None if census.first_prompt is None else encoder.render(census.first_prompt)
    return PlanReport(
        plan, census, first if isinstance(first, str) else None, forecast, machine is None, price_per_hour
    )


def has_tokenizer(directory: Path) -> bool:
    """Whether a model's directory holds a tokenizer; a hub model that was only looked at does not."""
    return any((directory / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))


def _input_lines(census: Census) -> Iterator[str]:
    if not census.num_encoded:
        yield "input: no line that can be answered"
        return
    about = "about " if census.is_sample else ""
    num_tokens = round(census.num_tokens * census.scale)
    lengths = census.lengths
    yield (
        f"input: {about}{census.num_prompts} prompts, {about}{num_tokens} tokens "
        f"(mean {lengths.mean():.0f}, median {lengths.quantile(0.5):.0f}, longest {census.longest})"
    )
    if census.is_sample:
        yield f"  {census.num_sampled} of {census.num_lines} lines were encoded, evenly spread; all were read, and"
        yield "  encoded if they may be too long; control tokens were looked for in encoded lines only"
    bins = census.bins()
    width = len(f"{bins[-1][1]}")
    most = max(count for _, _, count in bins)
    for low, high, count in bins:
        yield f"  {low:{width}} to {high:{width}} tokens  {_bar(count / most):{_BAR}}  {count}"


def _money(amount: float) -> str:
    return f"{amount:.2f}" if amount >= 0.1 else f"{amount:.2g}"


def _bar(part: float) -> str:
    """A bar of eighths of a character; whatever is there is seen."""
    eighths = max(1, round(part * _BAR * 8)) if part else 0
    return "█" * (eighths // 8) + (_BLOCKS[eighths % 8] if eighths % 8 else "")


def _refusal_lines(census: Census) -> Iterator[str]:
    if not census.num_refused:
        return
    yield f"{census.num_refused} lines will be answered with an error:"
    for kind, refusals in sorted(census.refused.items()):
        yield f"  {refusals.count} {kind}"
        yield from (f"    {item.file}, line {item.line}: {why}" for item, why in refusals.examples)
        if refusals.count > len(refusals.examples):
            yield f"    and {refusals.count - len(refusals.examples)} more"
    if sum(len(refusals.examples) for refusals in census.refused.values()) < census.num_refused:
        yield "  `overnight validate` names every line that cannot be read"
