"""Shards joined into one output: equal to an undivided run, refused where one lacks something, safe at any moment."""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import load_job, read_results, run_job
from pipeline.errors import BusyError, DataError, NotFoundError, OutputError, OvernightError, SpecError, StoppedError
from pipeline.ledger import merge
from pipeline.ledger.files import Patience, RunPaths
from pipeline.ledger.journal import decode_line, encode_line
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.lock import RunLock
from pipeline.ledger.merge import merge_parts
from pipeline.ledger.parts import finished_parts
from pipeline.ledger.recovery import read_run
from pipeline.source.shard import Shard, all_shards
from pipeline.tools.merge import merge_job
from pipeline.tools.status import job_status
from pipeline.tools.verify import verify_job
from tests.command import overnight, read_output, start, wait_until, without_times, write_job
from tests.faults.crash_states import Killed, Recorder, crash_states, write_state
from tests.faults.small_run import UnsyncedFiles, answer, identity, line, open_ledger, published, summarize

PROMPTS = [{"prompt": f"prompt number {i}", "id": i} for i in range(13)]
FAILING = {"engine": "echo", "echo": {"fail_every": 4}}


def job_of(directory: Path, prompts=PROMPTS, **sections):
    return load_job(write_job(directory, prompts, **{"model": FAILING, **sections}))


def run_shards(job, count: int, **options) -> None:
    for shard in all_shards(count):
        run_job(job, shard=shard, quiet=True, **options)


def job_path(job) -> Path:
    return Path(job.output.path)


def is_right(job) -> bool:
    problems = []
    verify_job(job, problems.append)
    return not problems


def counted(summary):
    """What two runs of the same answers agree on."""
    timed = ("duration", "load_s", "sessions", "output_sha256")
    return {
        name: value for name, value in summary.items() if name not in timed and not name.endswith(("_ms", "throughput"))
    }


@settings(max_examples=8)
@given(
    num_items=st.integers(0, 12),
    count=st.integers(1, 5),
    num_samples=st.integers(1, 2),
    suffix=st.sampled_from(["", ".gz"]),
)
def test_merged_is_what_an_undivided_run_gives(tmp_path_factory, num_items, count, num_samples, suffix):
    directory = tmp_path_factory.mktemp("run")
    job = job_of(
        directory,
        PROMPTS[:num_items],
        generation={"num_samples": num_samples, "temperature": 0.8, "seed": 3},
        output={"path": str(directory / f"out.jsonl{suffix}")},
    )
    run_shards(job, count)
    merged = merge_job(job, quiet=True)
    whole_path = directory / "whole.jsonl"
    whole = run_job(load_job(directory / "job.yaml", overrides=[f"output.path={whole_path}"]), quiet=True)
    assert without_times(list(read_results(job.output.path))) == without_times(list(read_results(whole_path)))
    assert counted(merged.summary) == counted(whole.summary)
    assert merged.exit_code == whole.exit_code
    assert is_right(job)


def test_summaries_add_up(tmp_path):
    job = job_of(tmp_path)
    run_shards(job, 3)
    parts = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*shard*.summary.json"))]
    summary = merge_job(job, quiet=True).summary
    for name in ("completed", "failed", "total_input_tokens", "total_output_tokens", "out_of_memory_events"):
        assert summary[name] == sum(part[name] for part in parts), name
    assert summary["sessions"] == [session for part in parts for session in part["sessions"]]
    assert summary["duration"] == pytest.approx(sum(part["duration"] for part in parts))
    assert summary["p99_e2el_ms"] <= 1.03 * max(part["p99_e2el_ms"] for part in parts)


def test_the_command_says_what_it_does_and_once_is_enough(tmp_path):
    job = write_job(tmp_path, PROMPTS, model=FAILING)
    run_shards(load_job(job), 4)
    run = overnight("merge", job, "--json")
    assert run.returncode == 3 and "merged 4 shards" in run.stderr
    assert json.loads(run.stdout)["completed"] == 10
    stats = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    for path in tmp_path.glob("*shard*"):
        path.unlink()  # nobody needs them any more
    again = overnight("merge", job)
    assert again.returncode == 3 and "finished already" in again.stderr
    assert all(stats[path] == path.stat().st_mtime_ns for path in tmp_path.iterdir())
    assert "finished already" in overnight("run", job).stderr
    assert job_status(load_job(job)).run.state == "finished"


def test_interrupted_and_retried_shards_merge_as_well(tmp_path):
    """The failed answers that a retry replaced must not come back, nor be counted."""
    slow = {"engine": "echo", "echo": {"delay": "600ms", "fail_every": 4}}
    path = write_job(tmp_path, PROMPTS, model=slow)
    process = start("run", path, "--shard", "1/2")
    journal = tmp_path / "out.jsonl.shard-1-of-2.journal"
    wait_until(lambda: journal.exists() and b'"loaded"' in journal.read_bytes())
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    job = load_job(path, overrides=["model.echo.delay=0ms"])
    with pytest.raises(NotFoundError, match="shard 2/2 has no run"):
        merge_job(job, quiet=True)
    run_job(job, shard=Shard(2, 2), quiet=True)
    with pytest.raises(StoppedError, match=r"shard 1/2 is not finished: \d of 6 answers"):
        merge_job(job, quiet=True)
    run_job(job, shard=Shard(1, 2), quiet=True)
    for _ in range(2):
        for shard in all_shards(2):
            run_job(job, shard=shard, retry=True, quiet=True)
    outcome = merge_job(job, quiet=True)
    answers, summary = read_output(outcome.output)
    assert [each["index"] for each in answers] == list(range(13))
    assert (summary["completed"], summary["failed"], summary["errors"]) == (10, 3, {"echo_failure": 3})
    assert len(summary["sessions"]) == 2 + 1 + 4
    assert is_right(job)


def test_a_merged_output_can_be_retried(tmp_path):
    job = job_of(tmp_path)
    run_shards(job, 2)
    merge_job(job, quiet=True)
    outcome = run_job(job, retry=True, quiet=True)
    assert outcome.exit_code == 3 and outcome.output == tmp_path / "out.jsonl"
    assert len(outcome.summary["sessions"]) == 3
    assert is_right(job)
    assert merge_job(job, quiet=True).summary == outcome.summary


def test_a_shard_that_was_published_anew_asks_for_a_new_merge(tmp_path):
    job = job_of(tmp_path)
    run_shards(job, 2)
    merge_job(job, quiet=True)
    run_job(job, shard=Shard(2, 2), retry=True, quiet=True)
    with pytest.raises(DataError, match=r"shard-2-of-2: was published anew since it was merged; .* --fresh"):
        merge_job(job, quiet=True)
    assert merge_job(job, fresh=True, quiet=True).exit_code == 3
    assert is_right(job) and (tmp_path / "out.jsonl.old-1").exists()


def _another_input(directory: Path) -> None:
    (directory / "in.jsonl").write_text('{"prompt": "another"}\n' * 13)


def _damage(directory: Path) -> None:
    partial = directory / "out.jsonl.shard-2-of-3.partial"
    partial.write_bytes(partial.read_bytes().replace(b"number", b"NUMBER", 1))


def _another_model(directory: Path) -> None:
    for number, model in enumerate(["m1", "m2", "m1"], 1):
        journal = directory / f"out.jsonl.shard-{number}-of-3.journal"
        first, *rest = journal.read_bytes().splitlines(keepends=True)
        record, synced = decode_line(first)
        header = encode_line({**record, "model": model}, synced)
        assert len(header) == len(first)  # for later lines say how many bytes before them are on the disk
        journal.write_bytes(header + b"".join(rest))


@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (_another_input, DataError, "shard 1/3: the input has changed"),
        (_damage, DataError, r"shard-2-of-3.partial: bytes 0 to \d+ are not those that were committed"),
        (_another_model, SpecError, "shard 2/3: the model's files are not those"),
        (lambda d: (d / "out.jsonl").write_text("a stranger's\n"), OutputError, "exists and is not of this run"),
        (lambda d: (d / "out.jsonl.shard-2-of-3").unlink(), StoppedError, "shard 2/3 is not finished"),
        (lambda d: (d / "out.jsonl.shard-3-of-3.journal").write_text("x"), DataError, "shard-3-of-3.journal: "),
        (lambda d: (d / "out.jsonl.shard-1-of-9.journal").write_text("x"), OvernightError, "runs of 3 and 9 shards"),
    ],
)
def test_what_does_not_belong_together_is_not_joined(tmp_path, spoil, kind, message):
    job = job_of(tmp_path)
    run_shards(job, 3)
    spoil(tmp_path)
    before = (tmp_path / "out.jsonl").read_bytes() if (tmp_path / "out.jsonl").exists() else None
    with pytest.raises(kind, match=message):
        merge_job(job, quiet=True)
    assert ((tmp_path / "out.jsonl").read_bytes() if (tmp_path / "out.jsonl").exists() else None) == before


def test_a_shard_of_another_job_is_named_with_its_key(tmp_path):
    job = job_of(tmp_path)
    run_job(job, shard=Shard(1, 2), quiet=True)
    run_job(load_job(tmp_path / "job.yaml", overrides=["generation.seed=7"]), shard=Shard(2, 2), quiet=True)
    run = overnight("merge", tmp_path / "job.yaml")
    assert run.returncode == 78
    assert "generation.seed: shard 2/2: was 7 when the run began and is 0 now" in run.stderr


def test_a_run_of_its_own_is_not_merged_over(tmp_path):
    job = job_of(tmp_path)
    run_shards(job, 2)
    with open_ledger(tmp_path / "out.jsonl", UnsyncedFiles()) as ledger:
        ledger.append(answer(0), line(0))
    with pytest.raises(OutputError, match="belongs to a run that was not merged"):
        merge_job(job, quiet=True)


@pytest.mark.parametrize("held", ["out.jsonl", "out.jsonl.shard-2-of-2"])
def test_nobody_may_work_on_the_run_or_on_a_shard(tmp_path, held):
    job = job_of(tmp_path)
    run_shards(job, 2)
    lock = RunLock(RunPaths(tmp_path / held).lock)
    with pytest.raises(BusyError):
        merge_job(job, quiet=True)
    lock.release()
    assert merge_job(job, quiet=True).exit_code == 3


# What follows cuts the power while three shards of the fault suite's small run are merged.

X = "runs/out.jsonl"
COUNT = 3


def shards_of_small_run(root: Path) -> None:
    write_state({"runs/": b""}, root)
    for shard in all_shards(COUNT):
        with open_ledger(
            shard.output(root / X), UnsyncedFiles(), identity=identity(**{"--shard": str(shard)})
        ) as ledger:
            for index in reversed(shard.items(5)):
                ledger.append(answer(index), line(index))
                ledger.commit()
            ledger.publish(summarize, summary_line=True)


def merge_small(root: Path, files) -> None:
    output = root / X
    merge_parts(output, finished_parts(output, COUNT), identity(), files=files, patience=Patience(0.0))
    with Ledger.open(output, identity(), files=files, patience=Patience(0.0)) as ledger:
        ledger.publish(summarize, summary_line=True)


def problems(
    root: Path, leave_out: Callable[[str], bool] | None = None, kill_at: int | None = None
) -> Iterator[str | None]:
    """For every state in which a power cut may leave the merge, what is wrong with it."""
    recorded, crashed = root / "recorded", root / "crashed"
    write_state({}, recorded)
    shards_of_small_run(recorded)
    recorder = Recorder(recorded, leave_out=leave_out, kill_at=kill_at)
    if kill_at is not None:
        with pytest.raises(Killed):
            merge_small(recorded, recorder)
        recorder.die()
    start = len(recorder.log)
    merge_small(recorded, recorder)
    recorder.die()
    assert (recorded / X).read_bytes() == published()[0]
    for _, content, _ in crash_states(recorder, start if kill_at is not None else 0):
        if content.get(X) not in (None, published()[0]):
            yield "the output is there, and it is not complete"
            continue
        write_state(content, crashed)
        try:
            merge_small(crashed, UnsyncedFiles())
        except OvernightError as error:
            yield f"cannot be merged again: {error}"
            continue
        right = (crashed / X).read_bytes() == published()[0] and len(read_run(crashed / X).history.sessions) == COUNT
        yield None if right else "another output"


def num_steps(root: Path) -> int:
    write_state({}, root)
    shards_of_small_run(root)
    recorder = Recorder(root)
    merge_small(root, recorder)
    recorder.die()
    return recorder.num_steps


def test_the_power_may_be_cut_anywhere_in_a_merge(tmp_path):
    found = list(problems(tmp_path))
    assert len(found) > 50 and not any(found), next(filter(None, found))


def test_the_power_may_be_cut_anywhere_after_a_killed_merge(tmp_path):
    steps = num_steps(tmp_path / "count")
    for moment in (steps // 4, steps // 2):
        found = list(problems(tmp_path, kill_at=moment))
        assert found and not any(found), next(filter(None, found))


def test_every_sync_of_a_merge_is_needed(tmp_path):
    (tmp_path / "sites").mkdir()
    shards_of_small_run(tmp_path / "sites")
    recorder = Recorder(tmp_path / "sites")
    merge_small(tmp_path / "sites", recorder)
    recorder.die()
    ours = sorted(site for site in recorder.sites if "_copy_all" in site)
    assert len(ours) == 2
    for site in ours:
        assert any(problems(tmp_path, site.__eq__)), f"nothing is lost without the sync of {site}"


def test_a_run_does_not_go_on_with_half_a_merge(tmp_path, monkeypatch):
    job = job_of(tmp_path)
    run_shards(job, 2)
    with monkeypatch.context() as patch:
        patch.setattr(merge, "read_group", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            merge_job(job, quiet=True)
    assert "overnight merge" in str(job_status(job))
    run = overnight("run", tmp_path / "job.yaml")
    assert run.returncode == 64 and "merge again" in run.stderr
    assert merge_job(job, quiet=True).exit_code == 3 and is_right(job)


def test_the_form_of_the_output_is_that_of_the_merged_one(tmp_path):
    """OpenAI's lines with their timing beside them; a shard has them too."""
    lines = [
        {
            "custom_id": f"c{i}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "m", "messages": [{"role": "user", "content": f"number {i}"}]},
        }
        for i in range(5)
    ]
    job = job_of(tmp_path, lines, output={"path": str(tmp_path / "out.jsonl"), "format": "openai-batch"})
    run_shards(job, 2)
    assert merge_job(job, quiet=True).exit_code == 3
    whole_path = tmp_path / "whole.jsonl"
    run_job(load_job(tmp_path / "job.yaml", overrides=[f"output.path={whole_path}"]), quiet=True)
    merged, whole = (
        [json.loads(line) for line in path.read_text().splitlines()] for path in (job_path(job), whole_path)
    )
    for record in (*merged, *whole):
        (record["response"]["body"] or {}).pop("created", None)
    assert merged == whole
    assert len((tmp_path / "out.jsonl.timing.jsonl").read_text().splitlines()) == 5
    assert is_right(job)


def test_a_table_is_merged_from_shards_that_are_lines(tmp_path):
    pytest.importorskip("pyarrow")
    job = job_of(tmp_path, output={"path": str(tmp_path / "out.parquet")})
    run_shards(job, 2)
    assert len(read_output(tmp_path / "out.parquet.shard-1-of-2")[0]) == 6
    merge_job(job, quiet=True)
    whole_path = tmp_path / "whole.parquet"
    run_job(load_job(tmp_path / "job.yaml", overrides=[f"output.path={whole_path}"]), quiet=True)
    assert without_times(list(read_results(job_path(job)))) == without_times(list(read_results(whole_path)))
    assert is_right(job)
