"""Whether a job's weights are kept on disk in the kernels' layout, where, and when they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from pipeline.cache import cache_directory
from pipeline.errors import NotFoundError
from pipeline.facts.model_facts import ModelFacts
from pipeline.plan.budget import Placement
from pipeline.plan.placement import show_bytes

_LEAST_BYTES = 1 << 30  # a smaller model is read in a second or two anyway
_FOLDER = "repacked"  # of the cache directory


class RepackCache(NamedTuple):
    """A directory for repacked weights. They are used wherever they are there."""

    directory: str
    num_bytes: int
    # When they are not: made before the model is loaded, beside the run where the disk has room, or not by this run.
    made: Literal["first", "beside", "never"]


def choose_repack_cache(
    asked: str, facts: ModelFacts, placement: Placement
) -> tuple[RepackCache | None, tuple[str, str] | None]:
    """The cache, and what to say of it: value and reason; nothing where weights are not packed for a CPU anyway."""
    if placement.form != "packed" or placement.on_gpu:
        return None, None
    num_bytes = sum(map(placement.bytes_of, facts.loaded_parts))
    size = show_bytes(num_bytes)
    if asked not in ("auto", "off"):
        directory = str(Path(asked).expanduser().absolute())
        reason = f"in {directory}, as asked: where they are missing they are made first, and then mapped, not read"
        return RepackCache(directory, num_bytes, "first"), (size, reason)
    directory = _usual_directory()
    why_not = {
        "as asked": asked == "off",
        f"{size} are read fast enough": num_bytes < _LEAST_BYTES,
        "there is no home directory to keep them in": directory is None,
    }
    if directory is None or any(why_not.values()):
        return None, ("off", next(reason for reason, applies in why_not.items() if applies))
    if placement.num_streamed_layers:
        reason = f"used if they are in {directory}; this run does not make them, for the disk is busy with the experts"
        return RepackCache(directory, num_bytes, "never"), (size, reason)
    reason = f"kept in {directory} beside the run, if twice as much is free there: later starts map them"
    return RepackCache(directory, num_bytes, "beside"), (size, reason)


def _usual_directory() -> str | None:
    try:
        return str(cache_directory() / _FOLDER)
    except NotFoundError:
        return None
