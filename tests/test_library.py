"""Used as a library: the interface has types that a strict checker accepts, and a notebook gets a bar."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import REPOSITORY, write_job

CONSUMER = """
from pathlib import Path
from typing import assert_type

from pipeline import JobSpec, Outcome, load_job, read_results, run_job
from pipeline.errors import OvernightError

job = load_job("job.yaml", overrides=["generation.seed=7"])
assert_type(job, JobSpec)
assert_type(job.generation.seed, int)
try:
    outcome = run_job(job, limit=3, fresh=True, retry=False, quiet=True)
except OvernightError as error:
    raise SystemExit(error.exit_code) from error
assert_type(outcome, Outcome)
assert_type(outcome.output, Path)
for record in read_results(job.output.path):
    print(record["completion"])
if outcome.summary is not None:
    print(outcome.summary["completed"])
"""


def check_types(directory: Path, program: str) -> subprocess.CompletedProcess[str]:
    """The program in a project of its own that has this package installed, as pip would leave it."""
    (directory / "consumer.py").write_text(program)
    (directory / "pyrightconfig.json").write_text(f'{{"typeCheckingMode": "strict", "extraPaths": ["{REPOSITORY}"]}}')
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "consumer.py"]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=300)


@pytest.mark.slow  # and pyright may fetch its Node when it is first used
def test_a_strict_checker_accepts_a_user_of_the_interface_and_finds_a_wrong_use(tmp_path: Path) -> None:
    right = check_types(tmp_path, CONSUMER)
    assert right.returncode == 0, right.stdout
    wrong = check_types(tmp_path, CONSUMER.replace("limit=3", 'limit="3"').replace('"completed"]', '"completed"] + 1'))
    assert wrong.returncode == 1
    assert '"limit"' in wrong.stdout and "reportOperatorIssue" in wrong.stdout, wrong.stdout


KERNEL = """
import sys, types
ipython = types.ModuleType("IPython")
ipython.get_ipython = lambda: types.SimpleNamespace(config={"IPKernelApp": {}})
if %r:
    sys.modules["IPython"] = ipython
sys.modules["ipywidgets"] = None  # not installed
from pipeline import load_job, run_job
assert run_job(load_job(sys.argv[1])).exit_code == 0
"""


def test_a_notebook_gets_a_bar_and_a_pipe_does_not(tmp_path: Path) -> None:
    job = write_job(tmp_path, [{"prompt": "hello"}] * 3)
    for is_notebook in (True, False):
        command = [sys.executable, "-W", "error", "-c", KERNEL % is_notebook, str(job)]
        said = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
        assert said.returncode == 0, said.stderr
        assert ("3/3" in said.stderr and "items/s" in said.stderr) == is_notebook, said.stderr
        (tmp_path / "out.jsonl").unlink()
        for file in tmp_path.glob("out.jsonl.*"):
            file.unlink()
