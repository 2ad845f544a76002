"""Promise 15, bounded memory: a line of 2 GiB, millions of items and gzip bombs, through the whole program."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.command import overnight, write_job
from tests.faults.trials import SCALE, Trials

MIB = 1 << 20
SPARE = 256 * MIB
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


@pytest.mark.parametrize("write", [long_line, bomb])
def test_a_line_of_two_gigabytes_costs_one_line(tmp_path: Path, trials: Trials, baseline: int, write) -> None:
    num_bytes = max(300 * MIB, int(SCALE * (2 << 30)))  # more than may be held, even in the sample
    job = write_job(tmp_path, [])
    path = tmp_path / ("in.jsonl.gz" if write is bomb else "in.jsonl")
    write(path, num_bytes)
    job.write_text(job.read_text().replace(str(tmp_path / "in.jsonl"), str(path)))
    code, peak = peak_of(job)
    trials.promise, trials.num_trials = 15, 1
    assert code == 3
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["completion"] for record in records[:-1]] == ["first", None, "last"]
    assert records[1]["error"]["type"] == "line_too_long"
    assert peak <= baseline + SPARE
    if write is bomb:
        return
    held = write_job(tmp_path / "one", [], input={"path": str(path), "max_line": "3 GiB"})
    held.write_text(held.read_text().replace("one/out.jsonl", "one/held.jsonl"))
    too_much = peak_of(held)[1] > baseline + SPARE  # a reader that is allowed to hold the line
    assert trials.is_caught(15, "line held", ["too much" if too_much else None] * 2, "too much")


def test_many_items_take_sixteen_bytes_each(tmp_path: Path, trials: Trials, baseline: int) -> None:
    num_items = int(SCALE * 10_000_000) if SCALE >= 0.1 else 50_000
    job = write_job(tmp_path, [], output={"keep_fields": "none"})
    with (tmp_path / "in.jsonl").open("wb") as file:
        for start in range(0, num_items, 10_000):
            numbers = range(start, min(start + 10_000, num_items))
            file.write(b"".join(b'{"prompt":"%d"}\n' % number for number in numbers))
    code, peak = peak_of(job)
    trials.promise, trials.num_trials = 15, num_items
    assert code == 0
    assert peak <= baseline + SPARE / 2 + 16 * num_items
    began = time.monotonic()
    assert overnight("run", job).returncode == 0
    assert time.monotonic() - began < 30
