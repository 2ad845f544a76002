"""Asks the computer we run on what it is: cores, memory, control groups, processor features, GPUs, the GIL."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pipeline.machine import Cgroup, Gpu, Machine

_UNLIMITED_BYTES = 1 << 60  # version 1 spells "no limit" as the largest page-aligned number
_GPU_TIMEOUT_S = 120  # a first import of torch from a slow disk is long; a driver that hangs is longer

# Asked in a process of its own: torch reads its environment variables when it is imported and keeps a context of half
# a gigabyte on every GPU it is asked about, and the plan that decides on both is not made yet.
_GPU_QUESTION = """
import json, sys
try:
    import torch
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        gpus.append({"name": properties.name, "total_bytes": total, "free_bytes": free,
                     "capability": [properties.major, properties.minor]})
    problem = None
    if not gpus:
        built_for_gpu = torch.version.cuda or torch.version.hip
        problem = ("torch finds no GPU it can use (driver, or CUDA_VISIBLE_DEVICES)" if built_for_gpu else
                   f"torch {torch.__version__} is built without GPU support")
except Exception as error:
    gpus, problem = [], f"torch cannot use the GPU: {error}"
json.dump({"gpus": gpus, "problem": problem}, sys.stdout)
"""


def probe_machine(root: Path = Path("/")) -> Machine:
    """The machine this process runs on; `root` holds `proc`, `sys` and `dev`, and is another one only in tests."""
    import psutil

    memory = psutil.virtual_memory()
    logical = _usable_processors()
    gpus, gpu_problem = _probe_gpus(root)
    return Machine(
        name=platform.node() or "this machine",
        system=platform.system().lower(),
        physical_cores=count_cores(logical, root),
        logical_cpus=len(logical),
        memory_total_bytes=memory.total,
        memory_available_bytes=min(memory.available, memory.total),
        cpu_features=read_cpu_features(root),
        cgroup=read_cgroup(root),
        gpus=gpus,
        gpu_problem=gpu_problem,
        thread_limit=_thread_limit(os.environ.get("OMP_NUM_THREADS", "")),
        free_threaded=bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
        gil_enabled=getattr(sys, "_is_gil_enabled", lambda: True)(),
    )


def _usable_processors() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def _thread_limit(setting: str) -> int | None:
    # A list ("4,2") is the limit of each level of nesting; the first is what a flat program gets.
    first = setting.partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) else None


def count_cores(logical: Iterable[int], root: Path = Path("/")) -> int:
    """Distinct physical cores among the logical processors given, from the kernel's topology.

    Hyper-threads of one core share its arithmetic units, so they count once.
    """
    logical = list(logical)
    siblings = {_read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in logical}
    return _count_cores_elsewhere(len(logical)) if None in siblings else max(1, len(siblings))


def _count_cores_elsewhere(num_logical: int) -> int:
    """Where no topology is shown (macOS, some containers) psutil knows the whole machine, not our share of it."""
    import psutil

    physical, everything = psutil.cpu_count(logical=False), psutil.cpu_count()
    if not physical or not everything:
        return max(1, num_logical)
    return max(1, min(num_logical, round(num_logical * physical / everything)))


def read_cpu_features(root: Path = Path("/")) -> frozenset[str]:
    """Instruction sets of the first processor, as Linux names them; empty where there is no /proc/cpuinfo."""
    for line in (_read(root / "proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def read_cgroup(root: Path = Path("/")) -> Cgroup | None:
    """The tightest limits on the way from this process's control group to the root; None where there is none.

    Both versions are hierarchical: a limit of any ancestor binds. In a container without a cgroup namespace the path
    in /proc/self/cgroup is the host's and does not exist here; the mount point then *is* our group.
    """
    paths = _cgroup_paths(root)
    mount = root / "sys/fs/cgroup"
    if (mount / "memory").is_dir() or (mount / "cpu").is_dir():
        memory = _ancestors(mount / "memory", paths.get("memory"))
        cpu = _ancestors(mount / "cpu", paths.get("cpu"))
        limit, used = _tightest(_memory_v1(group) for group in memory)
        return Cgroup(version=1, memory_limit_bytes=limit, memory_used_bytes=used, cpu_quota=_quota(cpu, _quota_v1))
    if (mount / "cgroup.controllers").exists():
        groups = _ancestors(mount, paths.get(""))
        limit, used = _tightest(_memory_v2(group) for group in groups)
        return Cgroup(version=2, memory_limit_bytes=limit, memory_used_bytes=used, cpu_quota=_quota(groups, _quota_v2))
    return None


def memory_left(root: Path = Path("/")) -> int | None:
    """Bytes that may still be allocated before the kernel kills; None where the system does not say.

    Unlike the plan's figure this counts all of the page cache as free: a large model's mapped weights are cache.
    """
    left = [_meminfo(root)]
    for group, version in _memory_groups(root):
        limit, used = _memory_v1(group) if version == 1 else _memory_v2(group)
        if limit is not None and limit < _UNLIMITED_BYTES:
            left.append(max(0, limit - used + _stat(group, "total_active_file" if version == 1 else "active_file")))
    return min((each for each in left if each is not None), default=None)


def memory_held() -> int | None:
    """Bytes of memory that this process holds now (its resident set); None where the system cannot say just now.

    Without a free descriptor it cannot, and a figure for a report is no reason for a run to end.
    """
    import psutil

    try:
        return psutil.Process().memory_info().rss
    except OSError:
        return None


def peak_memory_held() -> int:
    """The most bytes of memory that this process has held so far."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # one counts bytes, all others kibibytes


def count_oom_kills(root: Path = Path("/")) -> dict[str, Any] | None:
    """How many processes the kernel has killed for memory, and `of` which control group; None where it does not say.

    Our control group counts its own, whoever ran out; where there is none, the whole system since it was started.
    """
    boot = _read(root / "proc/sys/kernel/random/boot_id")
    for group, version in _memory_groups(root):
        count = _counter(group / ("memory.oom_control" if version == 1 else "memory.events"), "oom_kill")
        if count is not None:
            return {"of": f"{boot} {group.stat().st_ino}", "count": count}
    count = _counter(root / "proc/vmstat", "oom_kill")
    return None if count is None else {"of": boot, "count": count}


def _memory_groups(root: Path) -> list[tuple[Path, int]]:
    """This process's control group and its ancestors, each with the version of its hierarchy."""
    paths, mount = _cgroup_paths(root), root / "sys/fs/cgroup"
    if (mount / "memory").is_dir():
        return [(group, 1) for group in _ancestors(mount / "memory", paths.get("memory"))]
    if (mount / "cgroup.controllers").exists():
        return [(group, 2) for group in _ancestors(mount, paths.get(""))]
    return []


def _meminfo(root: Path) -> int | None:
    kilobytes = _counter(root / "proc/meminfo", "MemAvailable:")
    return None if kilobytes is None else kilobytes << 10


def _cgroup_paths(root: Path) -> dict[str, str]:
    """Controller to path; the one hierarchy of version 2 is under the empty name. See cgroups(7)."""
    paths: dict[str, str] = {}
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        for controller in controllers.split(","):
            paths[controller] = path
    return paths


def _ancestors(mount: Path, path: str | None) -> list[Path]:
    group = mount / (path or "/").strip("/")
    if not group.is_dir():
        return [mount]
    return [group, *(parent for parent in group.parents if parent.is_relative_to(mount))]


def _memory_v1(group: Path) -> tuple[int | None, int]:
    limit = _read_int(group / "memory.limit_in_bytes")
    used = _read_int(group / "memory.usage_in_bytes") or 0
    return limit, used - _stat(group, "total_inactive_file")


def _memory_v2(group: Path) -> tuple[int | None, int]:
    limits = [_read_int(group / "memory.max"), _read_int(group / "memory.high")]
    used = _read_int(group / "memory.current") or 0
    return min((limit for limit in limits if limit is not None), default=None), used - _stat(group, "inactive_file")


def _tightest(groups: Iterable[tuple[int | None, int]]) -> tuple[int | None, int]:
    """Limit and use of the group that leaves least."""
    limited = [(limit, max(0, used)) for limit, used in groups if limit is not None and limit < _UNLIMITED_BYTES]
    return min(limited, key=lambda group: group[0] - group[1], default=(None, 0))


def _quota(groups: Iterable[Path], read: Callable[[Path], float | None]) -> float | None:
    return min((quota for group in groups if (quota := read(group)) is not None), default=None)


def _quota_v1(group: Path) -> float | None:
    quota, period = _read_int(group / "cpu.cfs_quota_us"), _read_int(group / "cpu.cfs_period_us")
    return quota / period if quota and period and quota > 0 else None


def _quota_v2(group: Path) -> float | None:
    words = (_read(group / "cpu.max") or "max").split()
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0].isdecimal() else None


def _stat(group: Path, name: str) -> int:
    return _counter(group / "memory.stat", name) or 0


def _counter(path: Path, name: str) -> int | None:
    """The number behind a name at the beginning of a line."""
    for line in (_read(path) or "").splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == name:
            return int(words[1])
    return None


def _probe_gpus(root: Path) -> tuple[tuple[Gpu, ...], str | None]:
    """The GPUs as torch sees them, and why it cannot use one whose driver is there.

    Without a driver's device file there is nothing to ask, and torch is not imported.
    """
    drivers = ("dev/nvidiactl", "dev/kfd", "dev/dxg")  # NVIDIA, AMD, either under WSL
    if not any((root / driver).exists() for driver in drivers):
        return (), None
    try:
        asked = subprocess.run(
            [sys.executable, "-c", _GPU_QUESTION], capture_output=True, text=True, timeout=_GPU_TIMEOUT_S, check=True
        )
        answer = json.loads(asked.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        return (), f"asking torch for GPUs failed: {error}"
    gpus = tuple(Gpu(**gpu | {"capability": tuple(gpu["capability"])}) for gpu in answer["gpus"])
    return gpus, answer["problem"]


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _read_int(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text is not None and text.lstrip("-").isdecimal() else None
