"""Writes the workloads that throughput is measured on: JSONL files, the same bytes for the same seed everywhere.

    python benchmarks/workloads.py DIRECTORY [--part 0.25]

chat          128 questions of 20 to 400 tokens, 16 to 192 new tokens each
short         512 questions of about 40 tokens, 32 new tokens each
instructions  96 texts of 200 to 1,500 tokens under one long instruction; few answers are long, most are short

Lengths are exact: `ignore_eos` with a `max_new_tokens` for each line. Words are drawn from a small vocabulary, for what
a model answers is not the point. `--part` takes that part of the lines.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_TEXT = """
time river people garden winter music letter morning paper house water stone light answer question road city
table window summer mountain story number machine friend market science history green small large quiet early
written simple common other after before under between always never often because through without
"""
WORDS = _TEXT.split()
INSTRUCTION = "Read the text and say in plain words what it is about, who takes part and what follows from it. "


def text(random_words: random.Random, num_tokens: int) -> str:
    """Words that come to about so many tokens: common English words are one token each in most vocabularies."""
    return " ".join(random_words.choice(WORDS) for _ in range(max(1, num_tokens)))


def chat(draw: random.Random) -> Iterator[dict[str, Any]]:
    for _ in range(128):
        yield {"prompt": text(draw, draw.randint(1, 370)), "generation": {"max_new_tokens": draw.randint(16, 192)}}


def short(draw: random.Random) -> Iterator[dict[str, Any]]:
    for _ in range(512):
        yield {"prompt": text(draw, draw.randint(5, 15)), "generation": {"max_new_tokens": 32}}


def instructions(draw: random.Random) -> Iterator[dict[str, Any]]:
    system = INSTRUCTION * 12
    for _ in range(96):
        length = min(256, int(draw.paretovariate(1.2) * 12))
        prompt = text(draw, int(draw.triangular(200, 1200, 300)))
        yield {"prompt": prompt, "generation": {"max_new_tokens": length, "system": system}}


WORKLOADS = {"chat": chat, "short": short, "instructions": instructions}


def write(directory: Path, part: float) -> list[Path]:
    """The files, one for each workload."""
    directory.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for name, lines in WORKLOADS.items():
        all_lines = list(lines(random.Random(f"overnight {name}")))
        for line in all_lines:
            line["generation"]["ignore_eos"] = True
        path = directory / f"{name}.jsonl"
        chosen = all_lines[: max(1, round(len(all_lines) * part))]
        path.write_text("".join(json.dumps(line) + "\n" for line in chosen))
        paths.append(path)
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--part", type=float, default=1.0)
    arguments = parser.parse_args()
    for written in write(arguments.directory, arguments.part):
        print(written)
