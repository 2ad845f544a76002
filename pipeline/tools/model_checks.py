"""What the doctor finds about a model: where it lies, how fast that is read, and how it will be loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import bandwidth
from pipeline.facts.checkpoint import open_checkpoint
from pipeline.facts.model_facts import facts_of
from pipeline.ledger.directory_check import mounted_at
from pipeline.records import Finding

if TYPE_CHECKING:
    from pipeline.facts.model_facts import ModelFacts

_SLOW_BYTES_PER_S = 300e6  # a hard disk or a network; 41 GB take over two minutes
_LONG_LOAD_S = 60.0
_REMOTE = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "virtiofs"})


def check_model(directory: Path, usable_memory_bytes: int) -> list[Finding]:
    """How the model in this directory loads. Raises SpecError or NotFoundError for what is no readable model."""
    checkpoint = open_checkpoint(directory)
    facts = facts_of(checkpoint)
    files = [shard.path.resolve() for shard in checkpoint.shards]
    if not files:
        advice = "the first run downloads them; `overnight plan` says how much"
        return [Finding("model files", "warning", f"{directory} holds no weights yet", advice)]
    return [
        _check_loader(facts),
        _check_disk(files, facts.disk_bytes),
        _check_cache(files, facts.disk_bytes, usable_memory_bytes),
    ]


def _check_loader(facts: ModelFacts) -> Finding:
    name = f"{facts.architecture.name}, {facts.disk_bytes / 1e9:.1f} GB"
    if not facts.is_packed:
        return Finding("model loading", "good", f"{name}: not quantized, read by transformers as it is stored")
    if facts.can_pack:
        return Finding("model loading", "good", f"{name}: packed weights are read straight into place")
    advice = (
        "the same model in AutoRound's symmetric auto_round:auto_gptq format with 2, 4 or 8 bits loads at the speed of "
        "the disk; a mixture of experts with 80 billion parameters takes transformers 17 to 30 minutes"
    )
    return Finding("model loading", "warning", f"{name}: loaded by transformers, slower: {facts.packed_fault}", advice)


def _check_disk(files: Sequence[Path], num_bytes: int) -> Finding:
    kind, mount = mounted_at(files[0].parent)
    place = f"{kind} at {mount}"
    speed = bandwidth.read_speed(files)
    if speed is None:
        return Finding("model disk", "good", f"{place}: its speed cannot be measured past the page cache")
    found = f"{place}: {speed / 1e9:.2f} GB/s, {num_bytes / speed:.0f} s for the whole model"
    if speed < _SLOW_BYTES_PER_S and num_bytes / speed > _LONG_LOAD_S:
        where = "a network file system" if kind in _REMOTE else "this disk"
        advice = f"{where} bounds the load; on a local SSD (1 GB/s and more) it would take {num_bytes / 1e9:.0f} s"
        return Finding("model disk", "warning", found, advice)
    return Finding("model disk", "good", found)


def _check_cache(files: Sequence[Path], num_bytes: int, usable_memory_bytes: int) -> Finding:
    share = bandwidth.cached_share(files)
    if share is None:
        return Finding("model cache", "good", "the system does not say what of the files is in memory")
    found = f"{share:.0%} of the files is in memory already"
    if num_bytes > usable_memory_bytes:
        advice = "the model is larger than the memory: experts will be read from disk in every step; see `plan`"
        return Finding("model cache", "warning", found, advice)
    return Finding("model cache", "good", found)
