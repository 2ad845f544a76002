"""Directories that are made once and kept: whole or absent, whatever happens to the process that makes them.

The content is written under another name, brought to the disk, described by a manifest that comes last, and renamed. A
lock makes a second process wait for the first and take what it made. What a killed one left behind is swept away by the
next, and an entry that no longer fits its manifest is made anew.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias, cast

from pipeline.cache import CACHE_VARIABLE
from pipeline.errors import BusyError, MachineError, OutputError, Problem, WriteError
from pipeline.ledger.files import DISK, make_directories
from pipeline.ledger.lock import RunLock

Progress: TypeAlias = "Callable[[str, float], None]"  # what is being done, and how much of the whole is done (0 to 1)

MANIFEST = "manifest.json"
_LIBRARIES = ("torch", "transformers", "auto-round", "tokenizers", "safetensors", "gguf", "numpy")
_DISK_FAULTS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS})
_POLL_S = 0.2


def prepared(
    entry: Path,
    identity: Mapping[str, Any],
    write: Callable[[Path, Progress], None],
    *,
    num_bytes: int,
    progress: Progress,
    digested: bool = True,
) -> Path:
    """`entry`, made by `write` unless it is there, whole and of that identity; then this takes milliseconds.

    `write` fills an empty directory with plain files, of about `num_bytes` in all, and raises to refuse what it made.
    Not `digested`, the manifest has sizes alone: no second reading of tens of gigabytes.
    Raises OutputError where the entry cannot be made, MachineError where the disk is too small, WriteError where it
    fails, and what `write` raises.
    """
    if _is_whole(entry, identity):
        return entry
    with _creating(entry):
        make_directories(DISK, entry.parent)
    with _locked(entry.with_name(entry.name + ".lock"), progress):
        if not _is_whole(entry, identity):  # another process may have made it while this one waited
            _make(entry, identity, write, num_bytes, progress, digested)
    return entry


def _make(
    entry: Path,
    identity: Mapping[str, Any],
    write: Callable[[Path, Progress], None],
    num_bytes: int,
    progress: Progress,
    digested: bool,
) -> None:
    unfinished = entry.with_name(f"{entry.name}.unfinished-{os.getpid()}")
    try:
        with _creating(entry):
            # Under a name of its own, lest a writer's child that outlived its killed parent writes into this one.
            for stale in (*entry.parent.glob(f"{entry.name}.unfinished-*"), entry):
                if stale.exists():
                    shutil.rmtree(stale)
            unfinished.mkdir()
        _check_room(entry, num_bytes)
        with _writing(entry):
            write(unfinished, progress)
            _seal(unfinished, identity, digested)
            DISK.rename(unfinished, entry)
            DISK.sync_directory(entry.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _seal(directory: Path, identity: Mapping[str, Any], digested: bool) -> None:
    """Bring the files to the disk, then the manifest."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(directory.iterdir()):
        with path.open("rb") as file:
            files[path.name] = {"bytes": path.stat().st_size}
            if digested:
                files[path.name]["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
            DISK.sync(file.fileno())
    manifest = {**identity, "files": files, "libraries": dict(_library_versions())}
    if digested:
        told = json.dumps({name: file["sha256"] for name, file in files.items()})
        manifest["digest"] = hashlib.sha256(told.encode()).hexdigest()
    with (directory / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=2)
        file.write("\n")
        file.flush()
        DISK.sync(file.fileno())
    DISK.sync_directory(directory)


def _library_versions() -> Iterator[tuple[str, str]]:
    for name in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            yield name, version(name)


def _is_whole(entry: Path, identity: Mapping[str, Any]) -> bool:
    """Whether every file of the manifest is there in its size. Content is not read again: it may be gigabytes."""
    try:
        manifest = cast("dict[str, Any]", json.loads((entry / MANIFEST).read_bytes()))
        sizes = {name: file["bytes"] for name, file in manifest["files"].items()}
        return all(manifest[key] == value for key, value in identity.items()) and all(
            (entry / name).stat().st_size == size for name, size in sizes.items()
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


@contextlib.contextmanager
def _locked(path: Path, progress: Progress) -> Generator[None]:
    lock: RunLock | None = None
    told = False
    while lock is None:
        try:
            lock = RunLock(path)
        except BusyError:
            if not told:
                progress("waiting for another process that is preparing the same model", 0.0)
                told = True
            time.sleep(_POLL_S)
    try:
        yield
    finally:
        lock.release()


def _check_room(entry: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(entry.parent).free
    if free < num_bytes:
        message = (
            f"preparing this model takes {num_bytes / 1e6:.0f} MB of disk, and {free / 1e6:.0f} MB is free; make room, "
            f"or set {CACHE_VARIABLE} to a directory on another disk"
        )
        raise MachineError(Problem(message, str(entry.parent)))


@contextlib.contextmanager
def _creating(entry: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        message = (
            f"models are kept here, and it cannot be written: {error.strerror}; set {CACHE_VARIABLE} to a directory of "
            "yours"
        )
        raise OutputError(Problem(message, str(entry.parent))) from error


@contextlib.contextmanager
def _writing(entry: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FAULTS:  # reading goes wrong too, and libraries raise OSError for what they please
            raise
        message = f"cannot write the model: {error.strerror}; nothing of it is kept, and the same command tries again"
        raise WriteError(Problem(message, str(entry.parent))) from error
