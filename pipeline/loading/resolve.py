"""Where the files of the job's model are, embedded, in a local directory or from the hub; and what identifies them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pipeline.errors import NotFoundError, Problem, SpecError
from pipeline.facts.checkpoint import CONFIG, Shard, open_checkpoint
from pipeline.loading.hub import HUB_ID, TEMPLATE_FOLDER, TEXTS, fetch_model
from pipeline.spec.keys import ModelSpec

if TYPE_CHECKING:
    from pipeline.loading.prepared import Progress

BUILTIN = "builtin:"
_NUM_SAMPLES, _SAMPLE_BYTES = 16, 4096  # of a weight file's data


def find_model(
    model: ModelSpec, *, config_only: bool = False, report: Callable[[str], None], progress: Progress | None = None
) -> Path:
    """The directory with the model's files, which are fetched or made if they are not here yet.

    A hub model that is complete in the cache is taken from there without asking the hub, so that a resumed run works
    offline and on the same files; `config_only` fetches no more of it than a plan needs. `report` is given sentences
    for the user, `progress` how far an embedded model is that must be made first. Raises NotFoundError where there is
    no such model or no way to it, SpecError where it may not be used, MachineError where the disk is too small for it.
    """
    path = model.path
    if path is None:
        raise ValueError("this job has no model")
    if model.revision is not None and (path.startswith(BUILTIN) or not _is_hub_id(path)):
        raise SpecError(Problem(f"is for models of the hub, and {path} is none", field="model.revision"))
    if path.startswith(BUILTIN):
        from pipeline.loading.builtin import prepare_builtin

        return prepare_builtin(path.removeprefix(BUILTIN), progress=progress)
    if _is_hub_id(path):
        return fetch_model(path, model, config_only=config_only, report=report)
    return _local(path, Path(path).expanduser())


def _is_hub_id(path: str) -> bool:
    """A directory of that name wins over a model of the hub."""
    return HUB_ID.fullmatch(path) is not None and not Path(path).exists()


def _local(path: str, directory: Path) -> Path:
    if directory.is_file():
        fault = "is a file; name the directory that holds the model's config.json"
    elif not directory.is_dir():
        fault = (
            "there is no such directory; a model of the hub is named ORGANIZATION/NAME, an embedded one builtin:NAME"
        )
    elif not (directory / CONFIG).is_file():
        fault = f"there is no {CONFIG} in it, so it is not a model that transformers reads"
    else:
        return directory
    raise NotFoundError(Problem(f"{path}: {fault}", field="model.path"))


def model_identity(directory: Path, *, trust_remote_code: bool = False) -> str:
    """A digest that changes when the model would answer differently, and not with where or when it was stored.

    All of configuration, tokenizer and templates; of each weight file its name, size and header, which name every
    tensor, and samples of the data, which tell two trainings of one architecture apart. Reads megabytes, not gigabytes.
    """
    digest = hashlib.sha256()
    for path in _text_files(directory, trust_remote_code):
        _add(digest, path.relative_to(directory).as_posix().encode(), path.read_bytes())
    for shard in open_checkpoint(directory, trust_remote_code=trust_remote_code).shards:
        _add(digest, shard.path.name.encode(), str(shard.num_bytes).encode(), shard.header, *_samples(shard))
    return digest.hexdigest()


def _text_files(directory: Path, trust_remote_code: bool) -> list[Path]:
    patterns = [*TEXTS, f"{TEMPLATE_FOLDER}/*.jinja", *(["*.py"] if trust_remote_code else [])]
    return sorted({path for pattern in patterns for path in directory.glob(pattern) if path.is_file()})


def _samples(shard: Shard) -> Iterator[bytes]:
    begin = 8 + len(shard.header)
    with shard.path.open("rb") as file:
        for sample in range(_NUM_SAMPLES):
            file.seek(begin + (shard.num_bytes - begin) * sample // _NUM_SAMPLES)
            yield file.read(_SAMPLE_BYTES)


class _Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...


def _add(digest: _Digest, *fields: bytes) -> None:
    # Lengths keep ("ab", "c") and ("a", "bc") apart.
    for field in fields:
        digest.update(len(field).to_bytes(8, "little"))
        digest.update(field)
