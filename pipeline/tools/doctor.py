"""`overnight doctor`: what of this machine, a model or a directory is slow or cannot be relied on, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import bandwidth, talk
from pipeline.errors import EXIT_OK, MachineError, UsageError
from pipeline.ledger.directory_check import check_directory
from pipeline.machine import Machine
from pipeline.probe import probe_machine
from pipeline.records import Finding
from pipeline.spec.job_file import load_spec
from pipeline.spec.keys import ModelSpec
from pipeline.tools.machine_checks import CHECKS
from pipeline.tools.model_checks import check_model

_MARKS = {"good": "ok     ", "warning": "WARNING", "trouble": "TROUBLE"}
_FLAGSHIP = "Qwen3-Next-80B-A3B (int4-mixed)"
_FLAGSHIP_BYTES = 43e9
_FLAGSHIP_BYTES_PER_TOKEN = 3.4e9  # read for one token of one sequence; docs/flagship.md


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings about one subject."""

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


def diagnose(subject: Path | None, model: str | None) -> Diagnosis:
    """What the command asks for: a job's file, a directory, or this machine, with a model if one is named.

    Raises UsageError for a subject and a model together, and whatever the diagnosis itself raises.
    """
    if subject is None:
        return diagnose_machine(model=None if model is None else ModelSpec(path=model))
    if model is not None:
        raise UsageError("doctor takes a job or directory, or --model, not both")
    is_job = subject.suffix in (".yaml", ".yml", ".json") and not subject.is_dir()
    return diagnose_job(subject) if is_job else diagnose_directory(subject)


def diagnose_directory(directory: Path) -> Diagnosis:
    """Whether the promises of the ledger hold for an output in `directory`. OutputError if it is not writable."""
    return Diagnosis(str(directory), check_directory(directory))


def diagnose_machine(machine: Machine | None = None, model: ModelSpec | None = None) -> Diagnosis:
    """What makes runs slow or impossible here: on this machine, which is measured too, or on `machine`.

    `model` adds how fast that is loaded. Raises what finding a model raises: NotFoundError, SpecError, MachineError.
    """
    measured = [] if machine is not None else [_check_bandwidth]
    machine = machine or probe_machine()
    findings = [check(machine) for check in (*CHECKS, *measured, recommend)]
    subject = machine.name
    if model is not None and model.path is not None:
        from pipeline.loading.resolve import find_model

        directory = find_model(model, config_only=True, report=talk.say)
        findings += check_model(directory, machine.usable_memory_bytes)
        subject += f" with {model.path}"
    return Diagnosis(subject, findings)


def diagnose_job(job: Path) -> Diagnosis:
    """This machine, the job's model, and the directory of its output if that is there yet."""
    spec = load_spec(job)
    diagnosis = diagnose_machine(model=None if spec.model.engine == "echo" else spec.model)
    directory = spec.output.file.parent
    if not directory.is_dir():
        return diagnosis
    findings = [*diagnosis.findings, *check_directory(directory)]
    return Diagnosis(f"{diagnosis.subject}, output in {directory}", findings)


def _check_bandwidth(machine: Machine) -> Finding:
    speed = bandwidth.memory_speed(machine.usable_cores)
    found = f"{speed / 1e9:.1f} GB/s read by {machine.usable_cores} threads"
    bound = speed / _FLAGSHIP_BYTES_PER_TOKEN
    return Finding(
        "memory speed", "good", f"{found}: at most {bound:.1f} tokens/s for a single answer of {_FLAGSHIP} on the CPU"
    )


class _Guide(NamedTuple):
    """One of the machines of docs/flagship.md, by the least of it that serves."""

    name: str
    strategy: str
    gpu_bytes: float  # of the largest
    gpus_bytes: float  # of all together
    memory_bytes: float


_GUIDES = (
    _Guide("the machine with an 80 GB GPU", "max-gpu", 60e9, 60e9, 24e9),
    _Guide("the desktop with two 24 GB GPUs", "max-gpu", 20e9, 44e9, 32e9),
    _Guide("the laptop with a 16 GB GPU and 64 GB of memory", "min-gpu", 14e9, 14e9, _FLAGSHIP_BYTES + 3e9),
    _Guide("the machine without a GPU and with 64 GB of memory", "no-gpu", 0, 0, _FLAGSHIP_BYTES + 6e9),
)


def recommend(machine: Machine) -> Finding:
    """Which load strategy suits this machine, seen from the largest model that the guides speak of."""
    gpu = max((gpu.free_bytes for gpu in machine.gpus), default=0)
    gpus = sum(gpu.free_bytes for gpu in machine.gpus)
    memory = machine.usable_memory_bytes
    for guide in _GUIDES:
        if gpu >= guide.gpu_bytes and gpus >= guide.gpus_bytes and memory >= guide.memory_bytes:
            found = f"{guide.strategy} for {_FLAGSHIP}: this is like {guide.name} (docs/flagship.md)"
            return Finding("load strategy", "good", found)
    strategy = "max-gpu for what fits the GPU, min-gpu for larger mixtures of experts" if gpu else "no-gpu"
    lacking = _GUIDES[-1].memory_bytes - memory
    advice = (
        f"models of up to about {0.8 * memory / 1e9:.0f} GB run from memory; {_FLAGSHIP} needs {lacking / 1e9:.0f} GB "
        "more, or reads experts from disk in every step, which is slow and finishes"
    )
    return Finding(
        "load strategy", "good", f"{strategy}; smaller than the machines of docs/flagship.md that hold it", advice
    )
