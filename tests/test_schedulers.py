"""The recipes for schedulers: checked by the scheduler's own tool where it is installed, and their commands run."""

import os
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from tests.command import REPOSITORY, read_output, wait_until, write_job

RECIPES = REPOSITORY / "examples" / "schedulers"
SLOW = {"engine": "echo", "echo": {"delay": "1s"}}
PROMPTS = [{"prompt": f"prompt {i}"} for i in range(8)]


@pytest.fixture
def place(tmp_path):
    """A directory with a job, and `overnight` and a scheduler's commands on the path."""
    write_job(tmp_path, PROMPTS)
    program(tmp_path, "overnight", f'PYTHONPATH={REPOSITORY} exec {sys.executable} -m pipeline "$@"')
    program(tmp_path, "scontrol", f'echo "$@" >> {tmp_path}/scontrol.log')
    return tmp_path


def program(place: Path, name: str, text: str) -> None:
    path = place / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def path_of(place: Path) -> str:
    return f"{place / 'bin'}:/usr/bin:/bin"


def slurm_task(place: Path, number: int, count: int) -> subprocess.Popen[str]:
    environment = {
        "PATH": path_of(place),
        "HOME": str(place),
        "SLURM_ARRAY_JOB_ID": "77",
        "SLURM_ARRAY_TASK_ID": str(number),
        "SLURM_ARRAY_TASK_COUNT": str(count),
    }
    command = ["bash", str(RECIPES / "slurm-array.sh"), "job.yaml"]
    return subprocess.Popen(command, cwd=place, env=environment, stderr=subprocess.PIPE, text=True)


def code_of(task: subprocess.Popen[str]) -> int:
    _, said = task.communicate(timeout=60)
    print(said)  # shown with a failure
    return task.returncode


def test_a_slurm_task_is_requeued_after_its_signal_and_ends_when_its_shard_is_done(place):
    write_job(place, PROMPTS, model=SLOW)
    task = slurm_task(place, 1, 2)
    journal = place / "out.jsonl.shard-1-of-2.journal"
    wait_until(lambda: journal.exists() and b'"loaded"' in journal.read_bytes())
    task.send_signal(signal.SIGUSR1)  # to the shell alone, as with --signal=B:
    assert code_of(task) == 75
    assert (place / "scontrol.log").read_text() == "requeue 77_1\n"
    write_job(place, PROMPTS, model={"engine": "echo"})
    for number in (1, 2):
        assert code_of(slurm_task(place, number, 2)) == 0
    assert (place / "scontrol.log").read_text() == "requeue 77_1\n"
    merge = subprocess.run([place / "bin/overnight", "merge", "job.yaml"], cwd=place, capture_output=True, text=True)
    assert merge.returncode == 0, merge.stderr
    assert len(read_output(place / "out.jsonl")[0]) == 8


def test_the_lines_of_cron_do_in_an_empty_environment(place):
    lines = [line for line in (RECIPES / "crontab").read_text().splitlines() if re.match(r"[*/\d]", line)]
    assert lines
    (place / "overnight").symlink_to(place)
    for line in lines:
        command = line.split(None, 5)[5].replace("jobs/rehearsal-echo.yaml", "job.yaml")
        assert "%" not in command, "cron takes it for the end of the line"
        environment = {"HOME": str(place), "PATH": path_of(place)}
        for _ in range(2):
            run = subprocess.run(["/bin/sh", "-c", command], env=environment, capture_output=True, text=True)
            assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert (place / "out.jsonl.summary.json").exists()


def test_a_pod_answers_the_shard_of_its_index_and_ends_well_with_failed_lines(place):
    write_job(place, PROMPTS, model={"engine": "echo", "echo": {"fail_every": 2}})
    job = yaml.safe_load((RECIPES / "kubernetes-job.yaml").read_text())
    container = job["spec"]["template"]["spec"]["containers"][0]
    environment = {each["name"]: each["value"] for each in container["env"]}
    assert int(environment["SHARDS"]) == job["spec"]["completions"]
    for index in range(job["spec"]["completions"]):
        pod = environment | {"JOB": "job.yaml", "JOB_COMPLETION_INDEX": str(index), "PATH": path_of(place)}
        assert subprocess.run(container["command"], cwd=place, env=pod, timeout=60).returncode == 0
    assert len(list(place.glob("out.jsonl.shard-*-of-4.summary.json"))) == 4


def test_the_pod_policy_speaks_of_our_exit_codes():
    rules = yaml.safe_load((RECIPES / "kubernetes-job.yaml").read_text())["spec"]["podFailurePolicy"]["rules"]
    by_action = {rule["action"]: rule["onExitCodes"]["values"] for rule in rules if "onExitCodes" in rule}
    assert by_action == {"FailIndex": [64, 65, 66, 69, 73, 78], "Ignore": [75]}


def test_kubernetes_knows_every_field():
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    kubernetes_validate.validate(yaml.safe_load((RECIPES / "kubernetes-job.yaml").read_text()), "1.31", strict=True)


def test_systemd_understands_the_units(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    for name in ("overnight.service", "overnight.timer"):
        text = (RECIPES / name).read_text().replace("/usr/local/bin/overnight", "/bin/true")
        (tmp_path / name).write_text(text.replace("/srv/overnight", str(tmp_path)))
    units = [tmp_path / "overnight.service", tmp_path / "overnight.timer"]
    run = subprocess.run(["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, timeout=60)
    complaints = [line for line in run.stderr.splitlines() if str(tmp_path) in line or "overnight" in line]
    assert not complaints and run.returncode == 0, run.stderr


def test_shellcheck_has_nothing_to_say():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    run = subprocess.run(["shellcheck", RECIPES / "slurm-array.sh"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


class _Operator:
    """Stands in for Airflow's, which is too large to install for a test: keeps what it is given."""

    made: list["_Operator"] = []  # noqa: RUF012

    def __init__(
        self, *, task_id: str, bash_command: str, cwd: str, retries: int = 0, retry_delay: object = None
    ) -> None:
        self.task_id, self.bash_command, self.after = task_id, bash_command, []
        _Operator.made.append(self)

    def __rshift__(self, other: "_Operator") -> "_Operator":
        self.after.append(other.task_id)
        return other


class _Dag:
    def __init__(self, **options: object) -> None:
        assert {"dag_id", "schedule", "start_date", "catchup"} <= options.keys()

    def __enter__(self) -> "_Dag":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_the_tasks_of_the_airflow_dag_answer_and_merge(place, monkeypatch):
    _Operator.made = []
    for name, content in {
        "airflow": {"DAG": _Dag},
        "airflow.providers.standard.operators.bash": {"BashOperator": _Operator},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    exec(compile((RECIPES / "airflow_dag.py").read_text(), "airflow_dag.py", "exec"), {"__name__": "dag"})
    merge, *shards = _Operator.made
    assert [task.after for task in shards] == [["merge"]] * 4
    for task in (*shards, merge):
        command = task.bash_command.replace("jobs/rehearsal-echo.yaml", "job.yaml")
        environment = os.environ | {"PATH": path_of(place)}
        run = subprocess.run(["bash", "-c", command], cwd=place, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    assert len(read_output(place / "out.jsonl")[0]) == 8


def test_the_recipes_are_in_the_table():
    table = (RECIPES / "README.md").read_text()
    for path in RECIPES.iterdir():
        assert path.name == "README.md" or f"`{path.name}`" in table, path.name
