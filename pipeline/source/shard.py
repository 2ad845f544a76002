"""One of several contiguous parts of an input, for machines that answer it beside each other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pipeline.errors import UsageError

_WRITTEN = re.compile(r"(\d{1,9})/(\d{1,9})")


@dataclass(frozen=True, slots=True, order=True)
class Shard:
    """Part `number`, from 1, of `count` parts of an input; `str` writes it as the command line does: 2/4."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises UsageError for anything but I/N with 1 <= I <= N."""
        match = _WRITTEN.fullmatch(text.strip())
        shard = cls(int(match[1]), int(match[2])) if match else None
        if shard is None or not 1 <= shard.number <= shard.count:
            raise UsageError(f"--shard {text}: write I/N, the I-th of N shards counted from 1, such as --shard 2/4")
        return shard

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def items(self, num_items: int) -> range:
        """The indexes of this shard's items among all `num_items`.

        Shards follow one another without a gap and differ by one item at most; of more shards than items some are
        empty.
        """
        return range((self.number - 1) * num_items // self.count, self.number * num_items // self.count)

    def output(self, output: Path) -> Path:
        """Where the shard's answers go in a job whose output is `output`.

        The suffix comes last, so that whatever the job's output is, a shard is plain lines: only what is merged is
        compressed, or put into another form that is asked for by a file's name.
        """
        return output.with_name(f"{output.name}.shard-{self.number}-of-{self.count}")


def all_shards(count: int) -> Iterator[Shard]:
    return (Shard(number, count) for number in range(1, count + 1))


def run_output(output: Path, shard: Shard | None) -> Path:
    """Where the answers of a run go in a job whose output is `output`: all of them, or those of a shard."""
    return output if shard is None else shard.output(output)
