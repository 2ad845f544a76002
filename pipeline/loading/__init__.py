"""How weights get onto devices: the loader that a plan asks for, and what every loader has to answer for."""
# pyright: basic

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import MachineError, NotFoundError, Problem, SpecError
from pipeline.facts.checkpoint import Checkpoint, open_checkpoint
from pipeline.kernels.native import compile_ahead
from pipeline.loading.packed import load_packed, use_plain_kernel
from pipeline.loading.quiet import quiet_libraries
from pipeline.loading.stock import load_stock
from pipeline.loading.unpack import load_unpacked
from pipeline.plan.plan import Plan

if TYPE_CHECKING:
    import torch


_NEW_OBJECTS = 200_000  # after which Python looks for garbage among them; its default is 700


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to generate, and what it took to get there."""

    model: torch.nn.Module  # evaluation mode
    device: str
    load_s: float  # libraries included
    weight_bytes: int  # of parameters and buffers, as they lie in memory
    peak_host_bytes: int  # most memory that this process has held so far
    peak_gpu_bytes: int


def apply_environment(plan: Plan) -> None:
    """Set what the plan decided for the libraries' own settings; early, for most read them when they are imported.

    Their import makes 600,000 objects that stay. Python's search for garbage among them would be a tenth of a start.
    """
    os.environ.update(plan.environment)
    if 0 < gc.get_threshold()[0] < _NEW_OBJECTS:  # 0: whoever embeds us wants none
        gc.set_threshold(_NEW_OBJECTS)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(plan.num_threads)


def load_model(plan: Plan, *, show_progress: bool = False, report: Callable[[str], object] = str) -> LoadedModel:
    """Load the plan's model as the plan says, in silence but for a bar if wanted, and for sentences to `report`.

    Raises before anything is loaded NotFoundError and SpecError for files that are incomplete or may not be loaded.
    After: NotFoundError for weights that are not those of
    the configuration, MachineError where memory runs out all the same or a library is missing.
    """
    started = time.monotonic()
    checkpoint = _open(plan)
    apply_environment(plan)
    compile_ahead()  # while libraries are imported, which takes one core
    import torch

    torch.set_num_threads(plan.num_threads)
    _check_type(plan, checkpoint)
    with quiet_libraries(show_progress=show_progress), _explained(checkpoint.directory):
        model, info = _LOADERS[plan.weights](plan, checkpoint, show_progress, report)
        _check_complete(checkpoint.directory, info)
        use_plain_kernel(plan, model)
    tensors = [*model.parameters(), *model.buffers()]
    gpus = {tensor.device for tensor in tensors if tensor.is_cuda}
    return LoadedModel(
        model=model.eval(),
        device=plan.device,
        load_s=time.monotonic() - started,
        weight_bytes=sum({(tensor.device, tensor.data_ptr()): tensor.nbytes for tensor in tensors}.values()),
        peak_host_bytes=_peak_host_bytes(),
        peak_gpu_bytes=sum(map(torch.cuda.max_memory_allocated, gpus)),
    )


def _load_unpacked(plan: Plan, checkpoint: Checkpoint, *_: object) -> tuple[torch.nn.Module, dict[str, Any]]:
    import torch

    return load_unpacked(checkpoint, getattr(torch, plan.dtype))


def _load_stock(plan: Plan, checkpoint: Checkpoint, *_: object) -> tuple[torch.nn.Module, dict[str, Any]]:
    return load_stock(plan, checkpoint)


_LOADERS = {"stock": _load_stock, "packed": load_packed, "unpacked": _load_unpacked}


def _open(plan: Plan) -> Checkpoint:
    if plan.model_dir is None:
        raise ValueError(f"engine {plan.engine} has no model to load")
    checkpoint = open_checkpoint(Path(plan.model_dir), trust_remote_code=plan.trust_remote_code)
    if not checkpoint.shards:
        message = "has a configuration but no weights (model.safetensors); download them too"
        raise NotFoundError(Problem(message, plan.model_dir, field="model.path"))
    return checkpoint


def _check_type(plan: Plan, checkpoint: Checkpoint) -> None:
    import transformers

    model_type = checkpoint.config.get("model_type")
    if model_type not in transformers.CONFIG_MAPPING and not plan.trust_remote_code:
        message = (
            f"transformers {transformers.__version__} does not know models of type {model_type!r}; a newer one may"
        )
        raise SpecError(Problem(message, str(checkpoint.directory), field="model.path"))


def _check_complete(directory: Path, info: Mapping[str, Any]) -> None:
    """Weights that are missing would be made up at random, with no more than a warning."""
    wrong = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
    if wrong:
        message = (
            f"the weights do not fit the configuration: {len(wrong)} are missing or of other shape, {wrong[0]} first"
        )
        raise NotFoundError(Problem(message, str(directory), field="model.path"))


@contextlib.contextmanager
def _explained(directory: Path) -> Iterator[None]:
    """What may go wrong inside the libraries, in our words."""
    import torch

    place = str(directory)
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        message = f"memory ran out while loading: {error}"
        raise MachineError(Problem(message, place, field="model.load_strategy")) from None
    except ImportError as error:
        raise MachineError(Problem(f"loading needs a library that is not here: {error}", place)) from None
    except RuntimeError as error:
        if "size mismatch" not in str(error) and "ignore_mismatched_sizes" not in str(error):
            raise
        message = "the weights do not fit the configuration: some are of other shape"
        raise NotFoundError(Problem(message, place, field="model.path")) from None


def _peak_host_bytes() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
