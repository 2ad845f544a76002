"""The commands of the guides do what the guides say: blocks of `console` and `python` are run, in order, a guide each.

A command may go on in lines that begin with `> `, and be followed by `# exit code N`; the lines under it must occur in
what it says, in that order, where `...` stands for anything. Python blocks must run to their end. Each guide has a copy
of jobs and examples to itself.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import errors
from pipeline.runner import _FAULTS
from tests.command import REPOSITORY, overnight
from tests.model_files import LLAMA, write_model

GUIDES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```(console|python)\n(.*?)^```$", re.M | re.S)
_COMMAND = re.compile(r"^\$ (?P<command>.*?)(?:  # exit code (?P<code>\d+))?$")
SLOW = {"README", "autoround-models", "thinking", "walkthrough"}  # they load a model
QUOTES_ONE_RUN = {"walkthrough"}  # whose times and counts are no one else's: a number there stands for any number


def blocks(guide: Path) -> list[tuple[str, str]]:
    return _BLOCK.findall(guide.read_text(encoding="utf-8"))


RUN = [
    pytest.param(guide, id=guide.stem, marks=[pytest.mark.slow] if guide.stem in SLOW else [])
    for guide in GUIDES
    if blocks(guide)
]


def steps(text: str) -> Iterator[tuple[str, int, list[str]]]:
    """Each command of a console block, its exit code, and what it must say."""
    command, code, said = "", 0, list[str]()
    for line in text.splitlines():
        match = _COMMAND.match(line)
        if match is None:
            if line.startswith("> ") and not said:
                command += f"\n{line[2:]}"
            else:
                said.append(line)
            continue
        if command:
            yield command, code, said
        command, code, said = match["command"], int(match["code"] or 0), []
    yield command, code, said


def test_there_are_guides_to_run() -> None:
    assert {
        "README",
        "autoround-models",
        "benchmarking",
        "library",
        "plan-and-report",
        "resume",
        "thinking",
        "troubleshooting",
    } <= {guide.stem for guide in GUIDES if blocks(guide)}


@pytest.mark.parametrize("guide", RUN)
def test_a_guide_is_true(guide: Path, tmp_path: Path) -> None:
    for folder in ("jobs", "examples"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder)
    quickstart = tmp_path / "jobs/quickstart.yaml"
    quickstart.write_text(
        quickstart.read_text().replace("builtin:smollm2-135m", "builtin:tiny-qwen3-next")
    )  # in seconds
    command = tmp_path / "bin/overnight"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m pipeline "$@"\n')
    command.chmod(0o755)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PATH": f"{command.parent}:{os.environ['PATH']}"}
    if guide.stem not in SLOW:  # speeds that earlier runs have left would make a plan say more
        environment["OVERNIGHT_CACHE"] = str(tmp_path / "cache")
    for language, text in blocks(guide):
        if language == "python":
            run([sys.executable, "-W", "error", "-c", text], 0, [], tmp_path, environment)
            continue
        for words, code, said in steps(text):
            patterns = [as_pattern(line, any_number=guide.stem in QUOTES_ONE_RUN) for line in said]
            run(["bash", "-o", "pipefail", "-c", words], code, patterns, tmp_path, environment)


def as_pattern(line: str, *, any_number: bool) -> str:
    """What a line of a guide stands for: `...` for anything, a space for any number of them."""
    pattern = ".*?".join(re.escape(part) for part in line.split("..."))
    pattern = re.sub(r"(?:\\ )+", " +", pattern)  # one for a run: several would be tried in all ways
    return re.sub(r"\d+(?:\\\.\d+)?", lambda _: r"\d+(?:\.\d+)?", pattern) if any_number else pattern


def test_a_number_stands_for_any_only_where_one_run_is_quoted() -> None:
    said = "4 of 10 answers in 3.7 s ... more"
    assert re.fullmatch(as_pattern(said, any_number=True), "12 of 10   answers in 11 s and more")
    assert not re.fullmatch(as_pattern(said, any_number=True), "4 of x answers in 3.7 s ... more")
    assert not re.fullmatch(as_pattern(said, any_number=False), "12 of 10 answers in 11 s and more")
    assert re.fullmatch(as_pattern(said, any_number=False), "4 of 10 answers in 3.7 s and more")


def run(words: list[str], code: int, patterns: list[str], place: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        words, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    assert done.returncode == code, f"{words[-1]}\n{done.stdout}"
    rest = done.stdout
    for pattern in patterns:
        found = re.search(rf"^{pattern}$", rest, re.M)
        assert found, f"{words[-1]}\ndoes not say\n{pattern}\nbut\n{rest}"
        rest = rest[found.end() :]


def error_types() -> set[str]:
    """Every word that the program can write into `error.type`: the first argument of what makes such errors."""
    makers = {"ItemError", "PromptRefused", "BadLineError", "BadJsonError"}
    found: set[str] = set()
    for file in (REPOSITORY / "pipeline").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in makers and node.args:
                first = node.args[0]
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    found.add(first.value)
    return found | set(_FAULTS)


def test_troubleshooting_knows_every_error_type_exit_code_and_class() -> None:
    text = (REPOSITORY / "docs/troubleshooting.md").read_text(encoding="utf-8")
    types = error_types()
    assert {"invalid_json", "prompt_too_long", "wrong_type", "engine_error", "crashed", "control_token"} <= types
    section = text.partition("## Types of errors")[2].partition("\n## ")[0]
    told = set(re.findall(r"^\| `(\w+)` \|", section, re.M))
    assert told == types  # no more and no fewer
    classes = [errors.OvernightError]
    for one in classes:
        classes += one.__subclasses__()
    assert len(classes) >= 9
    for one in classes:
        if one.__module__ == errors.__name__:
            assert re.search(rf"^\| {one.exit_code} \| `{one.__name__}` \|", text, re.M), one.__name__
    for code in (errors.EXIT_OK, errors.EXIT_SOME_FAILED):
        assert re.search(rf"^\| {code} \|", text, re.M), code


def test_troubleshooting_knows_every_finding_of_the_doctor(tmp_path: Path) -> None:
    text = (REPOSITORY / "docs/troubleshooting.md").read_text(encoding="utf-8")
    model = write_model(tmp_path / "model", LLAMA)
    said = overnight("doctor", "--model", model, "--json")
    names = {finding["check"] for finding in json.loads(said.stdout)["findings"]}
    assert len(names) >= 18
    for name in names:
        assert re.search(rf"^\|[^|]*`{name}`[^|]*\|", text, re.M), name


def test_links_between_documents_lead_somewhere() -> None:
    num_links = 0
    for guide in GUIDES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", guide.read_text(encoding="utf-8")):
            assert (guide.parent / target).exists(), f"{guide.name}: {target}"
            num_links += 1
    assert num_links >= 10


def test_the_index_lists_every_document() -> None:
    index = (REPOSITORY / "docs/README.md").read_text(encoding="utf-8")
    for guide in GUIDES[1:]:
        assert guide.name == "README.md" or f"({guide.name})" in index, guide.name
