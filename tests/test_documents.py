"""What the repository shows is true: jobs load and plan, examples run, and the lists in the documents are complete."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import load_job
from pipeline.facts.model_facts import read_facts
from pipeline.machine import load_machine
from pipeline.plan.plan import make_plan
from tests.command import REPOSITORY, overnight, read_output

JOBS = sorted(path.name for path in (REPOSITORY / "jobs").glob("*.yaml"))
MACHINES = sorted(path.name for path in (REPOSITORY / "examples/machines").glob("*.yaml"))
FLAGSHIP = REPOSITORY / "examples/models/qwen3-next-80b-a3b-thinking-int4-mixed-autoround"


def test_there_is_something_to_test() -> None:
    assert len(JOBS) == 8 and len(MACHINES) == 5


@pytest.mark.parametrize("job", JOBS)
def test_every_job_is_right_its_input_is_good_and_the_table_names_it(job: str) -> None:
    assert overnight("validate", f"jobs/{job}").returncode == 0
    assert f"`{job}`" in (REPOSITORY / "jobs/README.md").read_text()


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("job", [job for job in JOBS if "80b" in job])
def test_the_flagship_is_planned_for_every_example_machine(job: str, machine: str) -> None:
    facts = read_facts(FLAGSHIP)
    plan = make_plan(
        load_job(REPOSITORY / "jobs" / job), load_machine(REPOSITORY / "examples/machines" / machine), facts
    )
    assert plan.load_strategy in plan.explain()
    for budget in plan.budgets:
        assert budget.needed_bytes <= budget.allowed_bytes


def test_the_guide_to_the_flagship_quotes_what_the_plan_prints() -> None:
    guide = (REPOSITORY / "docs/flagship.md").read_text()
    quoted = re.findall(r"^\$ overnight plan (\S+) --machine (\S+)\n(.*?)^```", guide, flags=re.DOTALL | re.MULTILINE)
    assert sorted(Path(machine).name for _, machine, _ in quoted) == MACHINES
    for job, machine, lines in quoted:
        plan = make_plan(load_job(REPOSITORY / job), load_machine(REPOSITORY / machine), read_facts(FLAGSHIP))
        printed = {" ".join(line.split()) for line in plan.explain().splitlines()}
        assert len(lines.splitlines()) >= 5
        assert {" ".join(line.split()) for line in lines.splitlines()} <= printed


def test_the_library_example_runs(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "examples/from_python.py", f"output.path={tmp_path / 'out.jsonl'}"],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert "400 answers" in run.stdout


def test_the_quickstart_script_runs_to_its_end(tmp_path: Path) -> None:
    for folder in ("jobs", "examples"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder)
    job = tmp_path / "jobs/quickstart.yaml"
    job.write_text(job.read_text().replace("builtin:smollm2-135m", "builtin:tiny-qwen3-next"))  # made in a second
    command = tmp_path / "bin/overnight"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m pipeline "$@"\n')
    command.chmod(0o755)
    environment = {"PATH": f"{command.parent}:{os.environ['PATH']}", "OVERNIGHT_CACHE": str(tmp_path / "cache")}
    run = subprocess.run(
        ["bash", "examples/quickstart.sh"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert '"object":"completion","index":0' in run.stdout
    assert "finished already" in run.stderr


def test_the_dirty_example_has_an_answer_for_every_line(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    words = ["--set", "input.path=examples/inputs/dirty.jsonl", "--set", f"output.path={out}"]
    assert overnight("run", "jobs/rehearsal-echo.yaml", *words, "--set", "model.echo.delay=0ms").returncode == 3
    answers, summary = read_output(out)
    lines = (REPOSITORY / "examples/inputs/dirty.jsonl").read_bytes().split(b"\n")
    assert len(answers) == sum(1 for line in lines if line.strip()) == summary["completed"] + summary["failed"]


def test_the_tiny_flagship_thinks(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    words = ["--set", f"output.path={out}", "--set", "generation.max_new_tokens=8", "--limit", "2"]
    run = overnight("run", "jobs/tiny-qwen3-next-thinking.yaml", *words, OVERNIGHT_CACHE=str(tmp_path / "cache"))
    assert run.returncode == 0, run.stderr
    answers, _ = read_output(out)
    for answer in answers:
        assert answer["reasoning"] is not None
        assert 0 < answer["usage"]["reasoning_tokens"] <= answer["usage"]["completion_tokens"] <= 8
    again = overnight("run", "jobs/tiny-qwen3-next-thinking.yaml", *words, OVERNIGHT_CACHE=str(tmp_path / "cache"))
    assert again.returncode == 0 and "finished already" in again.stderr


def test_the_readme_names_every_command_and_exit_code() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    commands = re.findall(r"^  (\w+) ", overnight("--help").stdout.split("Commands:")[1], re.M)
    assert len(commands) >= 5
    for command in commands:
        assert f"`overnight {command}" in readme, command
    errors = (REPOSITORY / "pipeline/errors.py").read_text()
    for code in set(re.findall(r"exit_code = (\d+)", errors)):
        assert re.search(rf"\b{code} ", readme), code


def test_continuous_integration_runs_the_test_command_of_the_readme() -> None:
    assert "make test" in (REPOSITORY / "README.md").read_text()
    assert (REPOSITORY / ".ci/run").read_text().rstrip().endswith("make test")
    assert json.loads((REPOSITORY / "jobs/job.schema.json").read_text())["type"] == "object"
