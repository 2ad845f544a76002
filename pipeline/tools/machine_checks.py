"""What the doctor finds about a machine: each check is by itself, a function from the machine to a finding.

`root` holds `proc` and `sys`, and is another one only in tests. Nothing heavy is imported.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from pipeline.machine import Machine
from pipeline.records import Finding

_ROOT = Path("/")
_LITTLE_MEMORY_BYTES = 4 << 30
_MUCH_SWAP_BYTES = 1 << 30
_BUSY_SHARE = 0.25  # of the cores; another process on half a core halves torch on two
_TAKEN_SHARE = 0.2  # of a GPU's memory


class Bad(NamedTuple):
    """Versions of a library below `oldest_good`, and what is wrong with them."""

    library: str
    oldest_good: str
    reason: str


KNOWN_BAD = (
    Bad("safetensors", "0.7", "each look-up of a tensor walks over all: 22 minutes for a model of 220,000 tensors"),
    Bad("transformers", "5.0", "caches and attention work in another way, which this program does not know"),
    Bad("torch", "2.8", "what this program calls is not there yet"),
    Bad("auto-round", "0.16.1", "does not read the mixed bits of int4-mixed checkpoints"),
)
# Named as /proc/cpuinfo does, with what each is good for. Those of x86 first, then those of ARM.
_INSTRUCTIONS = (
    *("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimddp", "i8mm", "bf16", "sve"),
)
_THREAD_VARIABLES = ("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def check_memory(machine: Machine) -> Finding:
    usable = machine.usable_memory_bytes
    found = f"{usable / 2**30:.1f} GiB usable of {machine.memory_total_bytes / 2**30:.1f} GiB"
    limit = machine.cgroup.memory_limit_bytes if machine.cgroup else None
    if limit is not None and limit < machine.memory_total_bytes:
        found += f"; the control group allows {limit / 2**30:.1f} GiB"
    if usable < _LITTLE_MEMORY_BYTES:
        advice = "end other programs, or raise the limit of the container; `overnight plan` says what a job needs"
        return Finding("memory", "warning", found, advice)
    return Finding("memory", "good", found)


def check_swap(_machine: Machine, root: Path = _ROOT) -> Finding:
    sizes = dict(re.findall(r"^(Swap\w+):\s+(\d+) kB", _read(root / "proc/meminfo"), re.M))
    total, free = (int(sizes.get(name, 0)) << 10 for name in ("SwapTotal", "SwapFree"))
    found = f"{(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB in use" if total else "none"
    if total - free > _MUCH_SWAP_BYTES:
        advice = "end what fills it: weights that are swapped out are read back at a hundredth of the memory's speed"
        return Finding("swap", "warning", found, advice)
    return Finding("swap", "good", found)


def check_cores(machine: Machine) -> Finding:
    found = f"{machine.physical_cores} cores, {machine.logical_cpus} logical processors"
    if machine.usable_cores < machine.physical_cores:
        advice = f"raise the quota of the control group: {machine.physical_cores} cores are there"
        return Finding("cores", "warning", f"{found}, of which the quota leaves {machine.usable_cores}", advice)
    return Finding("cores", "good", found)


def check_numa(_machine: Machine, root: Path = _ROOT) -> Finding:
    num_nodes = len(list((root / "sys/devices/system/node").glob("node[0-9]*"))) or 1
    if num_nodes > 1:
        advice = (
            "start it under `numactl --interleave=all`, or if a node's memory holds the model under `numactl "
            "--cpunodebind=0 --membind=0`: what lies on the other node is read at about half the speed"
        )
        return Finding("numa", "warning", f"memory on {num_nodes} nodes", advice)
    return Finding("numa", "good", "all memory is equally near")


def check_load(machine: Machine, root: Path = _ROOT) -> Finding:
    words = _read(root / "proc/loadavg").split()
    if not words:
        return Finding("load", "good", "the system does not say")
    load = float(words[0])
    found = f"{load:.1f} processes were computing in the last minute"
    if load > _BUSY_SHARE * machine.usable_cores:
        advice = "end other programs for the night: threads of a matrix product wait for the one that was held up"
        return Finding("load", "warning", f"{found}, on {machine.usable_cores} cores", advice)
    return Finding("load", "good", found)


def check_threads(machine: Machine) -> Finding:
    limit, cores = machine.thread_limit, machine.usable_cores
    for name in _THREAD_VARIABLES:
        value = os.environ.get(name, "")
        if value.isdecimal() and int(value) < cores:
            advice = f"unset it: a run chooses the threads itself, and this keeps part of the work to {value}"
            return Finding("threads", "warning", f"{name}={value} leaves cores idle", advice)
    if limit is None:
        return Finding("threads", "good", f"OMP_NUM_THREADS is not set; a run takes {cores}")
    if limit < cores:
        advice = (
            f"unset it, or set it to {cores}: matrix products on the CPU would have {cores / limit:.1f} times the cores"
        )
        return Finding("threads", "warning", f"OMP_NUM_THREADS={limit} leaves cores idle", advice)
    if limit > cores:
        advice = f"unset it, or set it to {cores}: more threads than cores wait for one another"
        return Finding("threads", "warning", f"OMP_NUM_THREADS={limit} is more than the {cores} cores", advice)
    return Finding("threads", "good", f"OMP_NUM_THREADS={limit}")


def check_clock(_machine: Machine, root: Path = _ROOT) -> Finding:
    folder = root / "sys/devices/system/cpu/cpu0/cpufreq"
    governor, driver = _read(folder / "scaling_governor"), _read(folder / "scaling_driver")
    if not governor:
        return Finding("clock", "good", "not for this system to choose")
    # With intel_pstate and amd_pstate `powersave` follows the load; with the older driver it is the lowest clock.
    if governor in ("powersave", "conservative") and "pstate" not in driver:
        advice = "`cpupower frequency-set -g performance` as root: the cores run at their lowest clock now"
        return Finding("clock", "warning", f"governor {governor}", advice)
    return Finding("clock", "good", f"governor {governor} ({driver or 'no driver named'})")


def check_instructions(machine: Machine) -> Finding:
    features = machine.cpu_features
    known = [name for name in _INSTRUCTIONS if name in features]
    found = " ".join(known) or "none of AVX2, AVX-512, AMX"
    if not features:
        return Finding("instructions", "warning", "unknown: there is no /proc/cpuinfo")
    if not machine.has_cpu_bf16:
        advice = "models run in float32 on this CPU, with twice the memory; one with AVX512_BF16 or AMX would not"
        return Finding("instructions", "warning", f"{found}; no bfloat16", advice)
    return Finding("instructions", "good", found)


def check_gpu(machine: Machine, root: Path = _ROOT) -> Finding:
    told = re.search(r"Kernel Module\D*([\d.]+)", _read(root / "proc/driver/nvidia/version"))
    driver = f" (driver {told[1]})" if told else ""
    if machine.gpu_problem is not None:
        advice = "runs go on the CPU until torch can use the GPU"
        return Finding("gpu", "warning", f"{machine.gpu_problem}{driver}", advice)
    if not machine.gpus:
        return Finding("gpu", "good", "none; runs go on the CPU")
    gpus = ", ".join(
        f"{gpu.name} with {gpu.free_bytes / 2**30:.1f} of {gpu.total_bytes / 2**30:.1f} GiB free"
        for gpu in machine.gpus
    )
    if any(gpu.free_bytes < (1 - _TAKEN_SHARE) * gpu.total_bytes for gpu in machine.gpus):
        advice = "end what holds its memory (nvidia-smi names it): layers that do not fit are computed on the CPU"
        return Finding("gpu", "warning", f"{gpus}{driver}", advice)
    return Finding("gpu", "good", f"{gpus}{driver}")


def check_large_pages(_machine: Machine, root: Path = _ROOT) -> Finding:
    chosen = re.search(r"\[(\w+)]", _read(root / "sys/kernel/mm/transparent_hugepage/enabled"))
    if chosen is None:
        return Finding("large pages", "good", "the system has none to choose")
    if chosen[1] == "never":
        advice = (
            "as root `echo madvise > /sys/kernel/mm/transparent_hugepage/enabled`: packed weights were read a tenth "
            "faster from large pages"
        )
        return Finding("large pages", "warning", "never", advice)
    return Finding("large pages", "good", chosen[1])


def check_allocator(_machine: Machine) -> Finding:
    """None has been measured to help; one that is preloaded is named, since that is often forgotten."""
    preloaded = [Path(path).name for path in re.split(r"[ :]+", os.environ.get("LD_PRELOAD", "")) if path]
    if preloaded:
        return Finding("allocator", "good", f"LD_PRELOAD puts {', '.join(preloaded)} before the system's libraries")
    return Finding("allocator", "good", "the system's own")


def check_compiler(_machine: Machine) -> Finding:
    names = (os.environ.get("CC") or "cc", "gcc", "clang")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        advice = "install gcc: the program's own kernels are compiled for this processor, and go without it in torch"
        return Finding("compiler", "warning", "no C compiler", advice)
    return Finding("compiler", "good", f"{found} (torch.compile would work too; no run uses it)")


def check_kernels(machine: Machine) -> Finding:
    """Compiles them if that was not done before: the first run does not have to."""
    from pipeline.kernels import attention, packed
    from pipeline.kernels.native import native

    for module in (attention, packed):
        library = native(Path(str(module.__file__)).with_suffix(".c"))
        if library.library is None:
            advice = "torch computes instead: attention of 64 answers took 6 times as long where this was measured"
            return Finding("kernels", "warning", f"not native: {library.reason}", advice)
    uses = next((name for name in ("avx512_bf16", "avx512f", "avx2") if name in machine.cpu_features), "no vectors")
    return Finding("kernels", "good", f"attention and packed weights are native, compiled for this CPU ({uses})")


def check_auto_round_library(_machine: Machine) -> Finding:
    try:
        found = f"auto-round-lib {version('auto-round-lib')}"
    except PackageNotFoundError:
        found = (
            "auto-round-lib is not installed; only packed models that this program's kernels do not take would use it"
        )
    return Finding("auto-round kernels", "good", found)


def check_versions(_machine: Machine) -> Finding:
    there: list[str] = []
    bad: list[str] = []
    missing: list[str] = []
    for library, oldest_good, reason in KNOWN_BAD:
        try:
            installed = version(library)
        except PackageNotFoundError:
            missing.append(f"{library} is missing; install it")
            continue
        there.append(f"{library} {installed}")
        if _numbers(installed) < _numbers(oldest_good):
            bad.append(f"{library}: install {oldest_good} or newer; with older ones {reason}")
    if bad or missing:
        level = "trouble" if missing else "warning"
        return Finding("versions", level, ", ".join(there) or "none", "; ".join(missing + bad))
    return Finding("versions", "good", ", ".join(there))


def _numbers(text: str) -> tuple[int, ...]:
    """The release of a version, without what follows its numbers: 2.13.0+cpu → 2, 13, 0."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def check_interpreter(machine: Machine) -> Finding:
    if machine.free_threaded and machine.gil_enabled:
        advice = "an extension turned the GIL on again; a usual build of Python is faster then"
        return Finding("interpreter", "warning", "free-threaded, running with the GIL", advice)
    return Finding("interpreter", "good", "free-threaded" if machine.free_threaded else "with the GIL")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


CHECKS: tuple[Callable[[Machine], Finding], ...] = (
    check_memory,
    check_swap,
    check_cores,
    check_numa,
    check_load,
    check_threads,
    check_clock,
    check_instructions,
    check_gpu,
    check_large_pages,
    check_allocator,
    check_compiler,
    check_kernels,
    check_auto_round_library,
    check_versions,
    check_interpreter,
)
