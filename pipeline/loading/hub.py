"""Models of the hub: from its cache, or downloaded, with a look at the disk first and plain words where it fails."""
# pyright: basic

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pipeline.errors import MachineError, NotFoundError, OvernightError, Problem, SpecError
from pipeline.facts.checkpoint import CONFIG, INDEX, SINGLE_FILE
from pipeline.plan.placement import show_bytes
from pipeline.spec.keys import ModelSpec

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")
# What a model needs beside its weights; a pattern is matched against names at the top of the directory.
TEXTS = (
    *("config.json", "generation_config.json", "quantization_config.json", "preprocessor_config.json"),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("*.model", "*.tiktoken", "chat_template*.json", "chat_template*.jinja"),
)
TEMPLATE_FOLDER = "additional_chat_templates"
_TIMEOUT_S = 10.0
_DISK_RESERVE_BYTES = 1 << 30


def fetch_model(name: str, model: ModelSpec, *, config_only: bool, report: Callable[[str], None]) -> Path:
    """The snapshot of a hub model, downloaded as far as it is not in the hub's cache; its interrupted files go on.

    A snapshot that is complete is taken as it is, without the network: a resumed run must neither need it nor meet
    other files than it began with. Raises as `find_model` does.
    """
    cached = _cached(name, model.revision)
    if cached is not None and (_is_complete(cached) or (config_only and (cached / CONFIG).exists())):
        return cached
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HfHubHTTPError

    # What the HTTP library below the hub's raises (which one it is changes between versions).
    transport_errors = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)
    try:
        info = HfApi().model_info(name, revision=model.revision, files_metadata=True, timeout=_TIMEOUT_S)
        wanted = _wanted(name, info.siblings or (), model.trust_remote_code)
        if config_only:
            wanted = [file for file in wanted if file.rfilename == CONFIG]
        _check_disk(name, wanted, info.sha, Path(HF_HUB_CACHE))
        size = sum(file.size or 0 for file in wanted)
        report(f"fetching {name} from the hub: {len(wanted)} files, {show_bytes(size)}, less what is here already")
        files = [file.rfilename for file in wanted]
        return Path(snapshot_download(name, revision=info.sha, allow_patterns=files))
    except OvernightError:
        raise
    except (OSError, *transport_errors) as error:
        raise _hub_fault(name, model.revision, error, partly=cached is not None) from None


def _cached(name: str, revision: str | None) -> Path | None:
    """The snapshot of the hub's cache, whole or not, without touching the network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=[CONFIG]))
    except LocalEntryNotFoundError:
        return None


def _is_complete(directory: Path) -> bool:
    """Whether configuration, a tokenizer and every weight file are there; what is in them is judged later."""
    if not (directory / CONFIG).exists() or not any(directory.glob("tokenizer*")):
        return False
    if not (directory / INDEX).exists():
        return (directory / SINGLE_FILE).exists()
    names = set(
        re.findall(r'"([^"/]+\.safetensors)"', (directory / INDEX).read_text(encoding="utf-8", errors="replace"))
    )
    return all((directory / name).exists() for name in names)


def _wanted(name: str, files: Iterable[RepoSibling], trust_remote_code: bool) -> list[RepoSibling]:
    """The files of a repository that a run reads: no second set of weights, no pickles, no code that is not trusted."""
    patterns = [*TEXTS, INDEX, "*.py"] if trust_remote_code else [*TEXTS, INDEX]
    top = {
        file.rfilename: file
        for file in files
        if "/" not in file.rfilename or file.rfilename.startswith(TEMPLATE_FOLDER)
    }
    weights = [n for n in top if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", n)]
    if INDEX in top and len(weights) > 1:
        weights = [n for n in weights if n != SINGLE_FILE]
    if CONFIG not in top:
        raise NotFoundError(
            Problem(f"{name} has no {CONFIG}, so it is not a model that transformers reads", field="model.path")
        )
    if not weights:
        raise SpecError(Problem(f"{name} has no safetensors weights; other formats are not loaded", field="model.path"))
    texts = [n for n in top if n.startswith(TEMPLATE_FOLDER) or any(Path(n).match(pattern) for pattern in patterns)]
    return [top[n] for n in dict.fromkeys([*texts, *weights])]


def _check_disk(name: str, wanted: Iterable[RepoSibling], revision: str | None, cache: Path) -> None:
    from huggingface_hub import try_to_load_from_cache

    missing = [
        file for file in wanted if not isinstance(try_to_load_from_cache(name, file.rfilename, revision=revision), str)
    ]
    needed = sum(file.size or 0 for file in missing)
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if needed and needed + _DISK_RESERVE_BYTES > free:
        message = (
            f"{name} needs {show_bytes(needed)} more of disk in {cache}, and {show_bytes(free)} is free; make room, or "
            f"put it on another disk with `hf download {name} --local-dir DIRECTORY` and set model.path to that"
        )
        raise MachineError(Problem(message, field="model.path"))


def _hub_fault(name: str, revision: str | None, error: Exception, *, partly: bool) -> NotFoundError:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        fault = "asks you to accept its terms on the hub first; do that in a browser, then `hf auth login` here"
    elif isinstance(error, errors.RepositoryNotFoundError):
        fault = "is neither a directory here nor a model on the hub (if it is private: `hf auth login`)"
    elif isinstance(error, errors.RevisionNotFoundError):
        return NotFoundError(Problem(f"{name} has no revision {revision!r}", field="model.revision"))
    else:
        have = "is only partly on this machine" if partly else "is not on this machine"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        fault = (
            f"{have}, and the hub cannot be reached ({reason}); run the same command again where it can, which goes on "
            f"where it stopped, or copy a download here and set model.path to its directory"
        )
    return NotFoundError(Problem(f"{name} {fault}", field="model.path"))
