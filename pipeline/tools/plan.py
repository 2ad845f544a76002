"""`overnight plan`: what a run would do, and why, without doing it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.job import locate_config, prepare, say_to_stderr
from pipeline.plan.plan import Plan, PromptStats
from pipeline.records import Rejection
from pipeline.source.inputs import InputFile, expand_inputs
from pipeline.source.line_parser import LineParser
from pipeline.source.lines import read_lines
from pipeline.spec.keys import JobSpec

if TYPE_CHECKING:
    from pipeline.engines import Encoder


@dataclass(frozen=True, slots=True)
class Counted:
    """What encoding every line of the input found."""

    stats: PromptStats | None  # None: no line is good
    num_tokens: int
    rejected: dict[str, int]  # lines that will be answered with an error, by its type
    first_prompt: str | None  # the first good line as the model will see it


@dataclass(frozen=True, slots=True)
class PlanReport:
    """The plan, and the input as far as it could be counted (None: the tokenizer is not here)."""

    plan: Plan
    counted: Counted | None

    def __str__(self) -> str:
        return "\n".join([self.plan.explain(), *self._input_lines()])

    def _input_lines(self) -> list[str]:
        if self.counted is None:
            return ["input: not counted, for the model's tokenizer is not here"]
        stats, rejected = self.counted.stats, self.counted.rejected
        if stats is None:
            lines = ["input: no line that can be answered"]
        else:
            lines = [
                f"input: {stats.num_items} prompts, {self.counted.num_tokens} tokens "
                f"(mean {stats.num_tokens_mean:.0f}, longest {stats.num_tokens_max})"
            ]
        if rejected:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(rejected.items()))
            lines.append(f"lines that will be answered with an error: {kinds}; `overnight validate` names them")
        if self.counted.first_prompt is not None:
            lines += ["first prompt as the model sees it:", *(f"  | {line}" for line in self._first_prompt_lines())]
        return lines

    def _first_prompt_lines(self) -> list[str]:
        assert self.counted is not None and self.counted.first_prompt is not None
        return self.counted.first_prompt.split("\n")

    def to_json(self) -> dict[str, Any]:
        return {
            "object": "plan",
            **self.plan.to_json(),
            "input": None if self.counted is None else asdict(self.counted),
        }


def plan_job(spec: JobSpec, *, limit: int | None = None, machine_file: Path | None = None) -> PlanReport:
    """Plan the job for this machine, or for the one that a file describes, and count its input with its tokenizer.

    Raises whatever would keep the run from starting: SpecError, NotFoundError, DataError, MachineError.
    """
    from pipeline.loading import apply_environment
    from pipeline.machine import load_machine

    files = expand_inputs(spec.input.path)
    parser = LineParser(spec)
    facts = locate_config(spec, say_to_stderr)
    machine = None if machine_file is None else load_machine(machine_file)
    plan, choice = prepare(spec, facts, machine=machine)
    apply_environment(plan)
    if facts is not None and not has_tokenizer(Path(facts.directory)):
        return PlanReport(plan, None)
    counted = _count(spec, parser, files, choice.encoder(), limit)
    if counted.stats is not None:
        plan, _ = prepare(spec, facts, machine=machine, stats=counted.stats)
    return PlanReport(plan, counted)


def has_tokenizer(directory: Path) -> bool:
    """Whether a model's directory holds a tokenizer; a hub model that was only looked at does not."""
    return any((directory / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))


def _count(
    spec: JobSpec, parser: LineParser, files: Sequence[InputFile], encoder: Encoder, limit: int | None
) -> Counted:
    num_items = num_tokens = longest = 0
    rejected: dict[str, int] = {}
    first_prompt: str | None = None
    for raw in read_lines(files, max_line_bytes=spec.input.max_line, stop=limit):
        prompt = parser.parse(raw)
        request = prompt if isinstance(prompt, Rejection) else encoder.encode(prompt)
        if isinstance(request, Rejection):
            rejected[request.error.type] = rejected.get(request.error.type, 0) + 1
            continue
        if first_prompt is None and not isinstance(prompt, Rejection):
            rendered = encoder.render(prompt)
            first_prompt = rendered if isinstance(rendered, str) else None
        num_items += 1
        num_tokens += len(request.token_ids)
        longest = max(longest, len(request.token_ids))
    stats = PromptStats(num_items, num_tokens / num_items, longest) if num_items else None
    return Counted(stats, num_tokens, rejected, first_prompt)
