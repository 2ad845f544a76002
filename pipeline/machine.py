"""Machine: the numbers about a computer that a plan is made from; pure, so that a plan can be made for another one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from pipeline.errors import NotFoundError, Problem, SpecError, UsageError
from pipeline.spec.units import parse_size
from pipeline.spec.yaml_text import Document, read_document

_MAX_FILE_BYTES = 1 << 16  # a description is a page; more is not a description
Size = Annotated[
    int, Field(ge=0), BeforeValidator(lambda value: parse_size(value) if isinstance(value, str) else value)
]
_NO_UNKNOWN_KEYS = {"extra": "forbid"}  # what pydantic reads from `__pydantic_config__`


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One accelerator, in the order in which torch numbers them."""

    __pydantic_config__: ClassVar[dict[str, str]] = _NO_UNKNOWN_KEYS

    name: str
    total_bytes: Size
    free_bytes: Size
    capability: tuple[int, int]  # CUDA compute capability, (8, 9) for an RTX 4090


@dataclass(frozen=True, slots=True, kw_only=True)
class Cgroup:
    """What the control group of this process may use; None where it sets no limit."""

    __pydantic_config__: ClassVar[dict[str, str]] = _NO_UNKNOWN_KEYS

    version: int  # 1 or 2
    memory_limit_bytes: Size | None = None
    memory_used_bytes: Size = 0  # without the page cache that the kernel gives back on demand
    cpu_quota: Annotated[float, Field(gt=0)] | None = None  # in processors: 1.5 is one and a half


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A computer as this process may use it: what affinity and control groups leave of it."""

    __pydantic_config__: ClassVar[dict[str, str]] = _NO_UNKNOWN_KEYS

    name: str
    system: str = "linux"
    physical_cores: Annotated[int, Field(ge=1)]  # distinct cores among the processors below
    logical_cpus: int  # processors this process may run on
    memory_total_bytes: Size
    memory_available_bytes: Size  # free, or given back by the kernel on demand
    disk_read_bytes_per_s: Annotated[Size, Field(ge=1)] | None = None  # where the model lies; None: not measured
    cpu_features: frozenset[str] = field(default_factory=frozenset[str])  # as /proc/cpuinfo spells them
    cgroup: Cgroup | None = None
    gpus: tuple[Gpu, ...] = ()
    gpu_problem: str | None = None  # why a GPU that is there cannot be used
    thread_limit: Annotated[int, Field(ge=1)] | None = None  # OMP_NUM_THREADS as the surroundings set it
    free_threaded: bool = False  # the interpreter was built without the GIL ...
    gil_enabled: bool = True  # ... and runs without it

    def __post_init__(self) -> None:
        if self.physical_cores > self.logical_cpus:
            raise ValueError("there are more physical cores than logical processors")
        if self.memory_available_bytes > self.memory_total_bytes:
            raise ValueError("more memory is available than there is")
        if any(gpu.free_bytes > gpu.total_bytes for gpu in self.gpus):
            raise ValueError("a GPU has more memory free than it has")

    @property
    def usable_memory_bytes(self) -> int:
        """What may still be allocated before the kernel, or the killer of the control group, says no."""
        if self.cgroup is None or self.cgroup.memory_limit_bytes is None:
            return self.memory_available_bytes
        left = max(0, self.cgroup.memory_limit_bytes - self.cgroup.memory_used_bytes)
        return min(self.memory_available_bytes, left)

    @property
    def usable_cores(self) -> int:
        """Cores that can compute at the same time: more threads than this only take turns."""
        quota = self.cgroup.cpu_quota if self.cgroup else None
        return max(1, self.physical_cores if quota is None else min(self.physical_cores, math.ceil(quota)))

    @property
    def has_cpu_bf16(self) -> bool:
        """Whether the processor multiplies bfloat16; without it torch computes it slower than float32."""
        return not self.cpu_features.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})

    @property
    def multiplies_bf16_natively(self) -> bool:
        """Whether our native code multiplies bfloat16 with the processor's instructions for it (AVX512-BF16, AMX)."""
        return "avx512_bf16" in self.cpu_features  # where there is AMX there is this too

    def to_dict(self) -> dict[str, Any]:
        """Lists, numbers and strings for YAML or JSON; `from_dict` reads them back, and sizes such as 64GiB too."""
        return asdict(self) | {
            "cpu_features": sorted(self.cpu_features),
            "gpus": [asdict(gpu) | {"capability": list(gpu.capability)} for gpu in self.gpus],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Machine:
        """The machine that `data` describes; raises UsageError with all that is wrong with it at once."""
        return _validated(data, Document(file=""))


def load_machine(path: Path) -> Machine:
    """The machine that a YAML file describes (`overnight plan --machine FILE`).

    Raises NotFoundError where the file cannot be read and UsageError where it describes no machine.
    """
    name = str(path)
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise NotFoundError(Problem(f"the machine file cannot be read: {error.strerror}", name)) from None
    if not data.strip() or len(data) > _MAX_FILE_BYTES:
        raise UsageError(Problem("not the description of a machine; see those in examples/machines", name))
    try:
        document = read_document(data.decode(), name)
    except UnicodeDecodeError:
        raise UsageError(Problem("not UTF-8", name)) from None
    except SpecError as error:
        raise UsageError(error.problems) from None
    if document.problems:
        raise UsageError(document.problems)
    return _validated(document.values, document)


def _validated(data: Mapping[str, Any], document: Document) -> Machine:
    try:
        return TypeAdapter(Machine).validate_python(dict(data))
    except ValidationError as error:
        raise UsageError([_problem(fault, document) for fault in error.errors(include_url=False)]) from None


def _problem(fault: ErrorDetails, document: Document) -> Problem:
    place = document.place(fault["loc"])
    field = ".".join(str(part) for part in fault["loc"]) or None
    message = fault["msg"].removeprefix("Value error, ")
    return Problem(message, place.file or None, place.line, place.column, field)
