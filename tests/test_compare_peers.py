"""A peer that fails is named with its reason, and the comparison goes on without it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.compare_peers import Figures, Peer, same_as_stock, table

LOADED = """
import json, sys
print(json.dumps({"load_s": 1.5}), flush=True)
"""
WELL = f"""{LOADED}
for line in sys.stdin:
    answers = [[json.loads(line)["number"]] * 2]
    print(json.dumps(dict(duration_s=0.5, output_tokens=2, exact=EXACT, answers=answers)), flush=True)
"""


@contextmanager
def started(directory: Path, program: str, limit_s: float = 20) -> Iterator[Peer]:
    peer = Peer("peer:float32", [sys.executable, "-c", program], directory / "words", most_passes=3)
    peer.start(limit_s)
    try:
        yield peer
    finally:
        peer.close()


def test_a_pass_is_measured_as_often_as_asked(tmp_path: Path) -> None:
    with started(tmp_path, WELL.replace("EXACT", "True")) as peer:
        assert [peer.measure("chat", number, 20)["answers"] for number in (0, 7)] == [[[0, 0]], [[7, 7]]]
        assert (peer.load_s, peer.failure) == (1.5, "")


def test_answers_of_other_lengths_are_no_result(tmp_path: Path) -> None:
    with started(tmp_path, WELL.replace("EXACT", "False")) as peer:
        assert peer.measure("chat", 0, 20) == {}
        assert "lengths" in peer.failure


@pytest.mark.parametrize("begin", ["", f"{LOADED}sys.stdin.readline()\n"])
def test_what_a_peer_said_last_is_its_reason(tmp_path: Path, begin: str) -> None:
    flood = "import sys\nsys.stderr.write('much\\n' * 100_000)\nsys.exit('no such model')"  # more than a pipe holds
    with started(tmp_path, begin + flood) as peer:
        if begin:
            assert not peer.failure
            assert peer.measure("chat", 0, 20) == {}
        assert peer.failure == "ended with 1: no such model"


def test_a_peer_that_ended_between_passes_is_told_from_a_slow_one(tmp_path: Path) -> None:
    with started(tmp_path, LOADED + "sys.exit('out of memory')") as peer:
        peer.process.wait()
        assert peer.measure("chat", 0, 20) == {}
        assert peer.failure == "ended with 1: out of memory"


def test_a_peer_that_hangs_is_ended(tmp_path: Path) -> None:
    with started(tmp_path, "import time\ntime.sleep(600)", limit_s=0.3) as peer:
        assert peer.failure == "took more than 0 s"
        assert peer.process.wait(20) != 0


def test_the_table_has_a_row_for_each_and_the_reasons() -> None:
    figures = {
        ("chat", "overnight:float32"): Figures([2.0, 1.0, 4.0], 100, [0.96]),
        ("chat", "stock:float32"): Figures([5.0], 100, answers=[[1, 2], [3]]),
        ("chat", "vllm"): Figures([3.0, 3.0, 3.0], 100, answers=[[1, 2], [4]]),
        ("chat", "openvino"): Figures(),
        ("chat", "llama.cpp"): Figures(),
    }
    loads = dict.fromkeys((name for _, name in figures), 1.0)
    failures = {"openvino": "ended with 1: no such model", "vllm": "took more than 300 s"}
    rows = table(figures, "overnight:float32", loads, failures).split("\n")
    assert rows[2:] == [
        "| chat | overnight:float32 | 50.0 | 3, 150% |  | 96.0% |  | 1.0 |",
        "| chat | stock:float32 | 20.0 | 1, 0% | 2.50 |  |  | 1.0 |",
        "| chat | vllm | 33.3 | 3, 0% | 1.50 |  | 1 of 2 | 1.0 |",
        "| chat | openvino | ended with 1: no such model | | | | | |",
        "| chat | llama.cpp | no time left | | | | | |",
        "",
        "openvino failed: ended with 1: no such model",
        "",
        "vllm failed: took more than 300 s",
    ]


def test_a_peer_that_hardly_ever_says_what_stock_says_is_doubted() -> None:
    stock = Figures([5.0], 100, answers=[[number] for number in range(20)])
    for num_same, doubted in ((1, True), (2, False)):
        known = Figures([3.0], 100, answers=[[number if number < num_same else -1] for number in range(20)])
        figures = {("chat", "stock:float32"): stock, ("chat", "peer"): known}
        found = same_as_stock(figures, "chat", known)
        assert found == f"{num_same} of 20" + "; is it the same model?" * doubted
        assert same_as_stock(figures, "chat", stock) == ""
