"""What steps free stays for the next step, and can be given back."""

import subprocess
import sys

import pytest

_LOOP = """
import resource, sys
import torch
from pipeline.engines import memory

def step():
    rows = [torch.ones(10_000_000, dtype=torch.uint8) for _ in range(8)]
    logits = torch.ones(500_000)

def resident_bytes():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

if sys.argv[1] == "kept":
    memory.keep_freed_memory()
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
held = resident_bytes()
memory.give_back_freed_memory()
print(held - resident_bytes())
"""

_PAGES_OF_A_STEP = 80_000_000 // 4096


def measure(how: str) -> tuple[int, int]:
    """New pages of ten steps, and the bytes given back after them, in a process of its own."""
    found = subprocess.run([sys.executable, "-c", _LOOP, how], check=True, capture_output=True, text=True).stdout
    pages, given_back = map(int, found.split())
    return pages, given_back


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the pages of a process, and glibc to keep them")
def test_steps_use_the_memory_of_those_before_them_until_it_is_given_back() -> None:
    pages, given_back = measure("kept")
    assert pages < _PAGES_OF_A_STEP
    assert given_back > 50_000_000
    pages, _ = measure("as it is")  # else what is asked for here would be so anyway
    assert pages > 5 * _PAGES_OF_A_STEP
