"""What the input holds, counted with the model's tokenizer before anything is answered: tokens, and lines refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.forecast.forecast import Work
from pipeline.forecast.speeds import lengths_of
from pipeline.plan.plan import PromptStats
from pipeline.records import Item, Prompt, Rejection, Request
from pipeline.source.inputs import InputFile
from pipeline.source.line_parser import LineParser
from pipeline.source.lines import read_lines
from pipeline.spec.keys import JobSpec
from pipeline.summary import Histogram

Encode = Callable[[Prompt], Request | Rejection]

FIRST_LINES = 256  # of an input: they tell roughly how long its prompts are, in a tenth of a second
_EXAMPLES = 3  # of each kind of refusal
# A line whose bytes are more than this part of the context may be over length, and is encoded in any case: a token is
# at least a byte, and the other half is left for what the template adds.
_CONTEXT_SHARE = 2


@dataclass(slots=True)
class Refusals:
    """Lines that are answered with an error of one type, and the first of them."""

    count: int = 0
    examples: list[tuple[Item, str]] = field(default_factory=list[tuple[Item, str]])  # and why

    def add(self, rejection: Rejection) -> None:
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append((rejection.item, rejection.error.message))

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {"index": item.index, "file": item.file, "line": item.line, "offset": item.offset, "message": why}
            for item, why in self.examples
        ]


@dataclass(slots=True)
class Census:
    """Counts over the good lines that were encoded, and what follows from them for the whole input."""

    num_lines: int  # of the input
    num_checked: int  # of them that were read at all
    num_sampled: int  # of these that were meant to be encoded: evenly spread, or all
    num_encoded: int = 0  # good lines among those
    num_tokens: int = 0
    longest: int = 0
    most_output_tokens: int = 0  # if every answer takes all that it may
    lengths: Histogram = field(default_factory=Histogram)  # of prompts, in tokens
    refused: dict[str, Refusals] = field(default_factory=dict[str, Refusals])  # among the lines checked
    first_prompt: Prompt | None = None

    @property
    def is_sample(self) -> bool:
        return self.num_sampled < self.num_lines

    @property
    def num_refused(self) -> int:
        return sum(refusals.count for refusals in self.refused.values())

    @property
    def num_prompts(self) -> int:
        """Good lines of the whole input."""
        good = self.num_checked - self.num_refused
        return round(self.num_lines * good / self.num_checked) if self.num_encoded else 0

    @property
    def scale(self) -> float:
        """Good lines of the whole input for each that was encoded."""
        return self.num_prompts / self.num_encoded if self.num_encoded else 0.0

    @property
    def prompt_stats(self) -> PromptStats | None:
        """What a plan takes of it; None where no line is good."""
        if not self.num_encoded:
            return None
        return PromptStats(self.num_prompts, self.num_tokens / self.num_encoded, self.longest)

    def work(self, spec: JobSpec, slots: int) -> Work:
        """What the whole input asks of an engine with so many slots."""
        factor = self.scale * spec.generation.num_samples
        return Work(
            num_answers=round(self.num_encoded * factor),
            prompt_tokens=round(self.num_tokens * factor),
            most_output_tokens=round(self.most_output_tokens * factor),
            slots=slots,
            lengths_of=lengths_of(spec),
            exact_lengths=spec.generation.ignore_eos and not spec.generation.stop,
        )

    def bins(self) -> list[tuple[int, int, int]]:
        """The lengths of the prompts encoded, from, to (tokens) and count: bins that double, without empty ends."""
        counts: dict[int, int] = {}
        for value, count in self.lengths.values():
            power = max(0, round(value).bit_length() - 1)
            counts[power] = counts.get(power, 0) + count
        powers = range(min(counts), max(counts) + 1) if counts else ()
        return [(1 << power, (2 << power) - 1, counts.get(power, 0)) for power in powers]

    def to_json(self) -> dict[str, Any]:
        """Counts of the whole input, estimated where only a sample was encoded; the histogram is the sample's."""
        return {
            "num_lines": self.num_lines,
            "num_sampled": self.num_sampled,
            "num_tokens": round(self.num_tokens * self.scale),
            "most_output_tokens": round(self.most_output_tokens * self.scale),
            "histogram": [{"from": low, "to": high, "count": count} for low, high, count in self.bins()],
            "rejected": {kind: refusals.count for kind, refusals in self.refused.items()},
            "refused": {kind: refusals.to_json() for kind, refusals in self.refused.items()},
        }

    def refuse(self, rejection: Rejection) -> None:
        self.refused.setdefault(rejection.error.type, Refusals()).add(rejection)

    def count(self, prompt: Prompt, request: Request) -> None:
        if self.first_prompt is None:
            self.first_prompt = prompt
        num_tokens = len(request.token_ids)
        self.num_encoded += 1
        self.num_tokens += num_tokens
        self.longest = max(self.longest, num_tokens)
        self.most_output_tokens += request.settings.max_new_tokens
        self.lengths.add(num_tokens)


class _Spread:
    """So many of the items, evenly spread over them."""

    def __init__(self, items: range, most: int) -> None:
        self.size = min(len(items), most)
        self._items = items

    def next(self, index: int) -> int | None:
        """The first chosen item from `index` on: number k of n is item k * len(items) / n."""
        if not self.size:
            return None
        place = max(0, index - self._items.start)
        number = -(-place * self.size // len(self._items))  # rounded up
        return self._items[number * len(self._items) // self.size] if number < self.size else None


def take_census(
    spec: JobSpec,
    files: Sequence[InputFile],
    items: range,
    encode: Encode,
    *,
    most: int,
    context_length: int,
    say: Callable[[str], object],
) -> Census:
    """Parse the lines of these items, and encode `most` of them, evenly spread; all where there are no more.

    What is wrong with a line is found in every line, and so is a length beyond the context (`context_length`, tokens);
    refusals that only encoding finds (control tokens, say) are those of the lines encoded. `say` is told of what looks
    like a mistake in good lines. Raises as reading the input does.
    """
    parser = LineParser(spec, say)
    spread = _Spread(items, most)
    census = Census(len(items), len(items), spread.size)
    chosen = spread.next(0)
    for line in read_lines(files, max_line_bytes=spec.input.max_line, start=items.start, stop=items.stop):
        is_chosen = line.index == chosen
        if is_chosen:
            chosen = spread.next(line.index + 1)
        prompt = parser.parse(line)
        if isinstance(prompt, Rejection):
            census.refuse(prompt)
        elif is_chosen or len(line.data or b"") > context_length // _CONTEXT_SHARE:
            request = encode(prompt)
            if isinstance(request, Rejection):
                census.refuse(request)
            elif is_chosen:
                census.count(prompt, request)
    return census


def take_sample(spec: JobSpec, files: Sequence[InputFile], items: range, encode: Encode, *, most: int) -> Census:
    """Encode `most` of these items, evenly spread, and pass over the others unread: enough for an estimate."""
    parser = LineParser(spec)
    spread = _Spread(items, most)
    census = Census(len(items), spread.size, spread.size)
    lines = read_lines(files, max_line_bytes=spec.input.max_line, stop=items.stop, next_wanted=spread.next)
    for prompt in map(parser.parse, lines):
        request = encode(prompt) if isinstance(prompt, Prompt) else prompt
        if isinstance(prompt, Prompt) and isinstance(request, Request):
            census.count(prompt, request)
        elif isinstance(request, Rejection):
            census.refuse(request)
    return census
