"""`overnight doctor`: what of this machine, or of a directory for the output, is slow or cannot be relied on.

Each check is by itself: a function to a finding, in the list of its kind. Nothing heavy is imported.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.errors import EXIT_OK, MachineError
from pipeline.ledger.directory_check import check_directory
from pipeline.machine import Machine
from pipeline.probe import probe_machine
from pipeline.records import Finding

_MARKS = {"good": "ok     ", "warning": "WARNING", "trouble": "TROUBLE"}
_LITTLE_MEMORY_BYTES = 4 << 30
# The oldest versions that are not known to be slow (safetensors) or to lack what this program needs.
_OLDEST_GOOD = {"safetensors": "0.7", "transformers": "5.0", "torch": "2.8", "auto-round": "0.16.1"}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings about one thing."""

    subject: str
    findings: Sequence[Finding]

    @property
    def exit_code(self) -> int:
        """69 where something is in trouble; a warning costs time and no answers."""
        return MachineError.exit_code if any(finding.level == "trouble" for finding in self.findings) else EXIT_OK

    def __str__(self) -> str:
        lines = [f"{self.subject}:"]
        for finding in self.findings:
            lines.append(f"  {_MARKS[finding.level]} {finding.check}: {finding.found}")
            if finding.advice is not None:
                lines.append(f"          {finding.advice}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {
            "object": "diagnosis",
            "subject": self.subject,
            "ok": self.exit_code == EXIT_OK,
            "findings": [asdict(finding) for finding in self.findings],
        }


def diagnose_directory(directory: Path) -> Diagnosis:
    """Whether the promises of the ledger hold for an output in `directory`. OutputError if it is not writable."""
    return Diagnosis(str(directory), check_directory(directory))


def diagnose_machine(machine: Machine | None = None) -> Diagnosis:
    """What of this machine (or of `machine`) makes runs slow or impossible."""
    machine = machine or probe_machine()
    return Diagnosis(machine.name, [check(machine) for check in CHECKS])


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


def check_cores(machine: Machine) -> Finding:
    found = f"{machine.physical_cores} cores, {machine.logical_cpus} logical processors"
    if machine.usable_cores < machine.physical_cores:
        advice = f"raise the quota of the control group: {machine.physical_cores} cores are there"
        return Finding("cores", "warning", f"{found}, of which the quota leaves {machine.usable_cores}", advice)
    return Finding("cores", "good", found)


def check_threads(machine: Machine) -> Finding:
    limit, cores = machine.thread_limit, machine.usable_cores
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


def check_instructions(machine: Machine) -> Finding:
    features = machine.cpu_features
    known = [name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile") if name in features]
    found = " ".join(known) or "none of AVX2, AVX-512, AMX"
    if not features:
        return Finding("instructions", "warning", "unknown: there is no /proc/cpuinfo")
    if not machine.has_cpu_bf16:
        advice = "models run in float32 on this CPU, with twice the memory; one with AVX512_BF16 or AMX would not"
        return Finding("instructions", "warning", f"{found}; no bfloat16", advice)
    return Finding("instructions", "good", found)


def check_gpu(machine: Machine) -> Finding:
    if machine.gpu_problem is not None:
        return Finding("gpu", "warning", machine.gpu_problem, "runs go on the CPU until torch can use the GPU")
    if not machine.gpus:
        return Finding("gpu", "good", "none; runs go on the CPU")
    gpus = (f"{gpu.name} with {gpu.free_bytes / 2**30:.1f} GiB free" for gpu in machine.gpus)
    return Finding("gpu", "good", ", ".join(gpus))


def check_compiler(_machine: Machine) -> Finding:
    names = (os.environ.get("CC") or "cc", "gcc", "clang")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        advice = "install gcc: the program's own kernels are compiled for this processor, and go without it in torch"
        return Finding("compiler", "warning", "no C compiler", advice)
    return Finding("compiler", "good", found)


def check_versions(_machine: Machine) -> Finding:
    old: list[str] = []
    there: list[str] = []
    for name, oldest in _OLDEST_GOOD.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            old.append(f"{name} is missing; install it")
            continue
        there.append(f"{name} {installed}")
        if _numbers(installed) < _numbers(oldest):
            old.append(f"{name}: install {oldest} or newer; older ones load slowly or lack what is needed")
    if old:
        return Finding("versions", "warning", ", ".join(there), "; ".join(old))
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


CHECKS: tuple[Callable[[Machine], Finding], ...] = (
    check_memory,
    check_cores,
    check_threads,
    check_instructions,
    check_gpu,
    check_compiler,
    check_versions,
    check_interpreter,
)
