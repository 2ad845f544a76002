"""The commands as a user meets them: words in, exit codes and messages out, and quick answers."""

import functools
import importlib
import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.command import REPOSITORY, overnight, write_job


def test_five_mistakes_are_five_problems_with_their_places(tmp_path: Path) -> None:
    job, prompts = tmp_path / "job.yaml", tmp_path / "in.jsonl"
    prompts.touch()
    job.write_text(
        "model:\n  engine: echo\n  load_stratagy: no-gpu\n"
        "generation:\n  temperature: -1\n  top_p: 2\n  max_new_tokens: many\n"
        f"output:\n  path: out.jsonl\nextra: 1\ninput:\n  path: {prompts}\n"
    )
    began = time.monotonic()
    run = overnight("run", job)
    seconds = time.monotonic() - began
    assert run.returncode == 78
    lines = run.stderr.splitlines()
    assert len(lines) == 5, run.stderr
    for number, word in [(3, "load_strategy"), (5, "temperature"), (6, "top_p"), (7, "max_new_tokens"), (10, "extra")]:
        assert any(f"job.yaml:{number}:" in line and word in line for line in lines), (number, run.stderr)
    assert seconds < 5  # half a second on a quiet machine, measured in benchmarks/


def test_every_command_has_help_with_an_example() -> None:
    app = importlib.import_module("pipeline.cli").app
    names = [command.name or command.callback.__name__ for command in app.registered_commands]
    assert len(names) >= 10
    for name, command in zip(names, app.registered_commands, strict=True):
        assert command.callback.__doc__, name
        examples = re.findall(rf"overnight {name}[^;]*", command.epilog or "")
        assert (command.epilog or "").startswith("Example") and examples, f"{name} has no example"
        for example in examples:  # its words are ones that the command knows, and the files that it names are there
            words = shlex.split(example.partition(" > ")[0].partition(" < ")[0].partition(" | ")[0])
            for option in [word for word in words if word.startswith("-") and word != "-"]:
                assert option in shown(name), (example, option)
            for path in [word for word in words if word.startswith(("jobs/", "examples/"))]:
                assert (REPOSITORY / path).exists(), example


@functools.cache
def shown(name: str) -> str:
    """The help of a command, as it is shown."""
    run = CliRunner().invoke(importlib.import_module("pipeline.cli").app, [name, "--help"])
    assert run.exit_code == 0 and "Example" in run.output, name
    return run.output


def test_quick_commands_import_no_heavy_library(tmp_path: Path) -> None:
    job = write_job(tmp_path, [{"prompt": "x"}])
    program = (
        "import sys\nfrom pipeline.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'numpy', 'accelerate', 'auto_round'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    for words in (
        ["--help"],
        ["status", str(job)],
        ["schema"],
        ["validate", str(job)],
        ["run", str(job), "-q"],
        ["verify", str(job)],
    ):
        run = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, cwd=REPOSITORY)
        assert run.returncode == 0, (words, run.stderr)


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["run"], 64, "JOB.yaml"),
        (["no-such-command"], 64, "no-such-command"),
        (["run", "jobs/quickstart.yaml", "--no-such-option"], 64, "--no-such-option"),
        (["run", "no-such-job.yaml"], 66, "no-such-job.yaml"),
        (["run", "jobs/quickstart.yaml", "--set", "generation.seed=x"], 78, "generation.seed"),
        (["run", "jobs/rehearsal-echo.yaml", "--set", "input.path=nowhere.jsonl"], 66, "nowhere.jsonl"),
        (["run", "jobs/quickstart.yaml", "--set", "model.path=./no-such-model"], 66, "no-such-model"),
        (["run", "jobs/quickstart.yaml", "--set", "model.path=builtin:nothing"], 66, "smollm2-135m"),
        (["validate", "jobs/rehearsal-echo.yaml", "--set", "input.path=examples/inputs/dirty.jsonl"], 65, "not JSON"),
    ],
)
def test_what_goes_wrong_has_its_exit_code_and_says_what(
    words: list[str], code: int, text: str, tmp_path: Path
) -> None:
    # Not the job's own output: whoever has run the job has files of a run there.
    elsewhere = ["--set", f"output.path={tmp_path / 'out.jsonl'}"] if "--set" in words else []
    run = overnight(*words, *elsewhere)
    assert run.returncode == code, run.stderr
    assert text in run.stderr
    assert "Traceback" not in run.stderr


def test_standard_output_is_data(tmp_path: Path) -> None:
    job = write_job(tmp_path, [{"prompt": "hello"}, {"prompt": "world"}])
    assert json.loads(overnight("validate", job, "--json").stdout)["num_lines"] == 2
    plan = json.loads(overnight("plan", job, "--json").stdout)
    assert plan["engine"] == "echo" and plan["input"]["stats"]["num_items"] == 2
    run = overnight("run", job)
    assert run.returncode == 0 and run.stdout == "" and "2 answers" in run.stderr
    quiet = overnight("run", job, "--fresh", "--quiet")
    assert quiet.returncode == 0 and quiet.stderr == ""
    assert json.loads(overnight("status", job, "--json").stdout)["status"] == "completed"
    assert overnight("run", job, "--json", "--quiet").stdout.startswith("{")
    assert json.loads(overnight("schema").stdout)["type"] == "object"


@pytest.mark.parametrize(
    "command", ["run", "validate", "plan", "status", "verify", "retry", "merge", "doctor", "schema"]
)
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    run = overnight(command, "--help")
    assert run.returncode == 0
    assert re.search(rf"Examples?: overnight {command}", run.stdout)
