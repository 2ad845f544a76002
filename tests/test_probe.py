"""What the probe reads of a computer, from trees that look like /proc, /sys and /dev of several."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import probe
from pipeline.machine import Cgroup, Gpu
from pipeline.probe import (
    count_cores,
    count_oom_kills,
    memory_held,
    memory_left,
    probe_machine,
    read_cgroup,
    read_cpu_features,
)

GIB = 1 << 30


def tree(root: Path, files: dict[str, str | int]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def version_2(root: Path, path: str, files: dict[str, str | int]) -> Path:
    start = {"proc/self/cgroup": f"0::{path}", "sys/fs/cgroup/cgroup.controllers": "cpu memory"}
    return tree(root, {**start, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()}})


def test_no_control_groups(tmp_path: Path) -> None:
    assert read_cgroup(tmp_path) is None


def test_version_2_takes_the_tightest_limit_on_the_way_up(tmp_path: Path) -> None:
    root = version_2(
        tmp_path,
        "/slurm/job_7/step_0",
        {
            "slurm/job_7/step_0/memory.max": "max",
            "slurm/job_7/memory.max": 8 * GIB,
            "slurm/job_7/memory.current": 3 * GIB,
            "slurm/job_7/memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file 7",
            "slurm/job_7/cpu.max": "250000 100000",
            "slurm/memory.max": 64 * GIB,
            "slurm/cpu.max": "max 100000",
        },
    )
    # Page cache that is not in use is given back when memory is short, so it counts as free.
    expected = Cgroup(version=2, memory_limit_bytes=8 * GIB, memory_used_bytes=2 * GIB, cpu_quota=2.5)
    assert read_cgroup(root) == expected


def test_version_2_a_fuller_ancestor_binds_though_its_limit_is_larger(tmp_path: Path) -> None:
    files = {"a/b/memory.max": 8 * GIB, "a/b/memory.current": GIB, "a/memory.max": 16 * GIB}
    root = version_2(tmp_path, "/a/b", {**files, "a/memory.current": 15 * GIB})
    group = read_cgroup(root)
    assert group is not None
    assert (group.memory_limit_bytes, group.memory_used_bytes) == (16 * GIB, 15 * GIB)


def test_version_2_throttling_above_memory_high_counts_as_a_limit(tmp_path: Path) -> None:
    group = read_cgroup(version_2(tmp_path, "/", {"memory.max": 8 * GIB, "memory.high": 6 * GIB}))
    assert group is not None
    assert group.memory_limit_bytes == 6 * GIB


@pytest.mark.parametrize("path", ["/docker/0123456789ab", "/../../elsewhere"])
def test_in_a_container_the_mount_is_our_group(tmp_path: Path, path: str) -> None:
    group = read_cgroup(version_2(tmp_path, path, {"memory.max": 4 * GIB, "cpu.max": "100000 100000"}))
    assert group == Cgroup(version=2, memory_limit_bytes=4 * GIB, cpu_quota=1.0)


def test_version_1(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "12:cpu,cpuacct:/box\n4:memory:/box\n1:name=systemd:/\n0::/",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": 2 * GIB,
            "sys/fs/cgroup/memory/box/memory.usage_in_bytes": GIB,
            "sys/fs/cgroup/memory/box/memory.stat": f"cache 1\ntotal_inactive_file {GIB // 4}",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": 0x7FFFFFFFFFFFF000,
            "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": 150000,
            "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": 100000,
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": -1,
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100000,
        },
    )
    expected = Cgroup(version=1, memory_limit_bytes=2 * GIB, memory_used_bytes=3 * GIB // 4, cpu_quota=1.5)
    assert read_cgroup(root) == expected


def test_version_1_without_limits(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": 0x7FFFFFFFFFFFF000,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": GIB,
        },
    )
    assert read_cgroup(root) == Cgroup(version=1)


def test_what_is_left_is_the_least_of_the_machine_and_every_group_on_the_way_up(tmp_path: Path) -> None:
    files = {"a/b/memory.max": 8 * GIB, "a/b/memory.current": 5 * GIB, "a/memory.max": 16 * GIB}
    root = version_2(tmp_path, "/a/b", {**files, "a/memory.current": 6 * GIB})
    assert memory_left(root) == 3 * GIB
    # All of the page cache counts as free, unlike in a plan: the weights of a model that is mapped are cache.
    tree(root, {"sys/fs/cgroup/a/b/memory.stat": f"inactive_file {GIB}\nactive_file {GIB}"})
    assert memory_left(root) == 5 * GIB
    tree(root, {"sys/fs/cgroup/a/memory.current": 15 * GIB})
    assert memory_left(root) == GIB
    tree(root, {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 2048 kB"})
    assert memory_left(root) == 2 << 20
    tree(root, {"sys/fs/cgroup/a/memory.current": 17 * GIB})
    assert memory_left(root) == 0


def test_what_is_left_in_a_group_of_version_1(tmp_path: Path) -> None:
    files: dict[str, str | int] = {"proc/self/cgroup": "4:memory:/box", "proc/meminfo": f"MemAvailable: {GIB} kB"}
    box = "sys/fs/cgroup/memory/box/memory"
    root = tree(tmp_path, {**files, f"{box}.limit_in_bytes": 2 * GIB, f"{box}.usage_in_bytes": GIB})
    tree(root, {f"{box}.stat": f"total_inactive_file {GIB // 4}\ntotal_active_file {GIB // 8}"})
    assert memory_left(root) == GIB + GIB // 4 + GIB // 8
    tree(root, {f"{box}.limit_in_bytes": 0x7FFFFFFFFFFFF000})
    assert memory_left(root) == GIB << 10


def test_where_nothing_tells_how_much_is_left(tmp_path: Path) -> None:
    assert memory_left(tmp_path) is None
    assert count_oom_kills(tmp_path) is None


def test_kills_for_memory_are_those_of_our_own_group(tmp_path: Path) -> None:
    boot = {"proc/sys/kernel/random/boot_id": "this-boot", "proc/vmstat": "pgpgin 5\noom_kill 7"}
    assert count_oom_kills(tree(tmp_path / "no group", boot)) == {"of": "this-boot", "count": 7}
    root = version_2(tmp_path / "2", "/a", {"a/memory.events": "oom 3\noom_kill 2", "memory.events": "oom_kill 9"})
    second = count_oom_kills(tree(root, boot))
    files: dict[str, str | int] = {"proc/self/cgroup": "4:memory:/box", "sys/fs/cgroup/memory/memory.limit_in_bytes": 5}
    root = tree(tmp_path / "1", {**files, "sys/fs/cgroup/memory/box/memory.oom_control": "under_oom 0\noom_kill 1"})
    first = count_oom_kills(tree(root, boot))
    assert second and first
    assert (second["count"], first["count"]) == (2, 1)
    assert second["of"] != first["of"]  # counters of two groups are never compared


def test_hyper_threads_of_a_core_count_once(tmp_path: Path) -> None:
    siblings = {0: "0,4", 1: "1,5", 2: "2,6", 3: "3,7"}
    root = tree(
        tmp_path,
        {f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": siblings[cpu % 4] for cpu in range(8)},
    )
    assert count_cores(range(8), root) == 4
    assert count_cores([0, 4], root) == 1
    assert count_cores([1, 2, 6], root) == 2


def test_without_a_topology_the_cores_are_no_more_than_the_processors(tmp_path: Path) -> None:
    assert count_cores([0], tmp_path) == 1


@pytest.mark.parametrize("line", ["flags\t\t: fpu avx2 amx_bf16", "Features\t: fpu avx2 amx_bf16"])
def test_features_of_the_processor(tmp_path: Path, line: str) -> None:
    root = tree(tmp_path, {"proc/cpuinfo": f"processor\t: 0\n{line}\n\nprocessor\t: 1\nflags\t\t: other"})
    assert read_cpu_features(root) == {"fpu", "avx2", "amx_bf16"}
    assert read_cpu_features(tmp_path / "nowhere") == frozenset()


FAKE_TORCH = """
__version__ = "2.13.0"
class version:
    cuda, hip = {cuda!r}, None
class cuda:
    def device_count(): return {count}
    def get_device_properties(index):
        class properties: name, major, minor = f"card {{index}}", 8, 6 + index
        return properties
    def mem_get_info(index):
        {fault}
        return 10 + index, 20
"""


def with_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, count: int, cuda: str | None, fault: str = ""
) -> Path:
    (tmp_path / "torch.py").write_text(FAKE_TORCH.format(count=count, cuda=cuda, fault=fault or "pass"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tree(tmp_path / "root", {"dev/nvidiactl": ""})


def test_gpus_are_asked_of_torch_where_a_driver_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = probe_machine(with_torch(tmp_path, monkeypatch, count=2, cuda="13.0"))
    assert machine.gpus == (
        Gpu(name="card 0", total_bytes=20, free_bytes=10, capability=(8, 6)),
        Gpu(name="card 1", total_bytes=20, free_bytes=11, capability=(8, 7)),
    )
    assert machine.gpu_problem is None


@pytest.mark.parametrize(
    ("torch", "reason"),
    [
        ({"cuda": None, "count": 0}, "torch 2.13.0 is built without GPU support"),
        ({"cuda": "13.0", "count": 0}, "finds no GPU it can use"),
        ({"cuda": "13.0", "count": 1, "fault": "raise RuntimeError('driver too old')"}, "driver too old"),
        ({"cuda": "13.0", "count": 1, "fault": "import os; os._exit(3)"}, "asking torch for GPUs failed"),
        ({"cuda": "13.0", "count": 1, "fault": "import time; time.sleep(60)"}, "asking torch for GPUs failed"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr(probe, "_GPU_TIMEOUT_S", 1 if "sleep" in torch.get("fault", "") else 30)
    machine = probe_machine(with_torch(tmp_path, monkeypatch, **torch))
    assert machine.gpus == ()
    assert machine.gpu_problem is not None
    assert reason in machine.gpu_problem


@pytest.mark.parametrize(("setting", "limit"), [("3", 3), (" 4,2", 4), ("", None), ("0", None), ("many", None)])
def test_a_limit_that_the_surroundings_set_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, setting: str, limit: int | None
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", setting)
    assert probe_machine(tmp_path).thread_limit == limit


def test_this_machine_is_a_possible_one_and_torch_stays_out_without_a_gpu() -> None:
    code = (
        "import sys; from pipeline.probe import probe_machine; machine = probe_machine();"
        "print(machine.physical_cores, machine.logical_cpus, machine.usable_memory_bytes, bool(machine.gpus));"
        "print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    cores, logical, memory = (int(word) for word in out[:3])
    assert 1 <= cores <= logical <= (os.cpu_count() or 1)
    assert memory > 1 << 27
    assert out[4] == "False"


def test_memory_that_cannot_be_asked_for_is_unknown() -> None:
    assert (memory_held() or 0) > 1 << 20
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        assert memory_held() is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
