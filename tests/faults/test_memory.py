"""Promise 15, bounded memory: a line of 2 GiB, millions of items and gzip bombs, through the whole program."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.command import overnight, start, write_job
from tests.faults.processes import queued_s
from tests.faults.trials import SCALE, Trials

MIB = 1 << 20
SPARE = 256 * MIB
LEAST_BYTES = 300 * MIB  # more than may be held, even in the sample
PROGRAM = """
import sys
from pathlib import Path
from pipeline import load_job, run_job
outcome = run_job(load_job(Path(sys.argv[1])), quiet=True)
# Not ru_maxrss, which a child has from its parent.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print(outcome.exit_code, int(peak) * 1024)
"""


def peak_of(job: Path) -> tuple[int, int]:
    """Exit code, and the most bytes that were resident."""
    run = subprocess.run([sys.executable, "-c", PROGRAM, str(job)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    code, peak = map(int, run.stdout.split())
    return code, peak


@pytest.fixture
def baseline(tmp_path: Path) -> int:
    """Bytes that a run of one line takes."""
    (tmp_path / "one").mkdir()
    return peak_of(write_job(tmp_path / "one", [{"prompt": "one"}]))[1]


def long_line(path: Path, num_bytes: int) -> None:
    """A good line, one of so many NULs, which take no room on a disk, and a good line."""
    with path.open("wb") as file:
        file.write(b'{"prompt": "first"}\n')
        file.seek(num_bytes, 1)
        file.write(b'\n{"prompt": "last"}\n')


def bomb(path: Path, num_bytes: int) -> None:
    """The same compressed a thousandfold."""
    parts = [b'{"prompt": "first"}\n', bytes(MIB), b'\n{"prompt": "last"}\n']
    first, nuls, last = map(gzip.compress, parts)  # members of one file
    path.write_bytes(first + nuls * (num_bytes // MIB) + last)


def job_over(directory: Path, write: Callable[[Path, int], None], num_bytes: int, **options: Any) -> Path:
    path = directory / ("in.jsonl.gz" if write is bomb else "in.jsonl")
    directory.mkdir(exist_ok=True)
    job = write_job(directory, [], input={"path": str(path), **options})
    write(path, num_bytes)
    return job


@pytest.mark.parametrize("write", [long_line, bomb])
def test_a_line_of_two_gigabytes_costs_one_line(tmp_path: Path, trials: Trials, baseline: int, write) -> None:
    trials.begin(15, 2048)  # MiB
    num_bytes = max(LEAST_BYTES, int(SCALE * (2 << 30)))
    trials.num_trials = num_bytes // MIB
    code, peak = peak_of(job_over(tmp_path / "long", write, num_bytes))
    assert code == 3
    records = [json.loads(line) for line in (tmp_path / "long/out.jsonl").read_text().splitlines()]
    assert [record["completion"] for record in records[:-1]] == ["first", None, "last"]
    assert records[1]["error"]["type"] == "line_too_long"
    assert peak <= baseline + SPARE


@pytest.mark.slow
def test_a_reader_that_may_hold_a_line_is_seen(tmp_path: Path, trials: Trials, baseline: int) -> None:
    def held(number: int) -> str | None:
        job = job_over(tmp_path / str(number), long_line, LEAST_BYTES, max_line="3 GiB")
        return "too much" if peak_of(job)[1] > baseline + SPARE else None

    assert trials.is_caught(15, "line held", map(held, range(2)), "too much")


def test_a_bomb_beyond_what_the_job_allows_is_refused(tmp_path: Path, trials: Trials) -> None:
    job = job_over(tmp_path / "bomb", bomb, LEAST_BYTES, max_bytes="100 MiB")
    run = overnight("run", job)
    trials.tried_all(15, 1)
    assert (run.returncode, "max_bytes" in run.stderr) == (65, True), run.stderr
    assert not (tmp_path / "bomb/out.jsonl.journal").exists()


def write_items(path: Path, start: int, end: int) -> None:
    with path.open("ab") as file:
        for first in range(start, end, 10_000):
            numbers = range(first, min(first + 10_000, end))
            file.write(b"".join(b'{"prompt":"%d"}\n' % number for number in numbers))


def seconds_to_admission(job: Path) -> float:
    """From the start of the program until it hands the first new item to the engine, without those in which it waited
    for a processor that others had; then it is killed."""
    journal = job.with_name("out.jsonl.journal")
    size = journal.stat().st_size
    began = time.monotonic()
    process = start("run", job)
    try:
        while b'"kind":"admit"' not in _from(journal, size):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        return time.monotonic() - began - queued_s(process.pid)
    finally:
        process.kill()
        process.communicate()


def _from(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read()


def test_many_items_take_sixteen_bytes_each_and_their_run_is_soon_taken_up(
    tmp_path: Path, trials: Trials, baseline: int
) -> None:
    trials.begin(15, 10_000_000)
    num_items = trials.num_trials = int(SCALE * 10_000_000) if SCALE >= 0.1 else 50_000
    job = write_job(tmp_path, [], output={"keep_fields": "none"}, run={"resume": "always"})
    write_items(tmp_path / "in.jsonl", 0, num_items)
    try:
        code, peak = peak_of(job)
        assert code == 0
        assert peak <= baseline + SPARE / 2 + 16 * num_items
        write_items(tmp_path / "in.jsonl", num_items, num_items + 1)
        assert seconds_to_admission(job) < 30
    finally:
        for path in tmp_path.glob("*.jsonl*"):  # gigabytes, in a full run
            path.unlink()
