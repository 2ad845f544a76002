"""Files elsewhere (`s3://`, `gs://`, `hf://`, and what else fsspec knows): copied here to be read, and put there.

An input is read several times and, if it is a table, out of order; so each version of it is copied once to the cache,
and a run that is resumed reads the copy without asking for more than whether the file is still that version.

fsspec is there with huggingface-hub; s3fs and gcsfs are the extra `remote`. Each is loaded when a path asks for it.
"""

# pyright: basic
from __future__ import annotations

import glob
import hashlib
import importlib.util
import logging
import os
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.cache import cache_directory
from pipeline.errors import NotFoundError, Problem, WriteError

log = logging.getLogger(__name__)

_URL = re.compile(r"(?P<protocol>[a-z][a-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
_PASSWORD = re.compile(r"[^/@]*:[^/@]*@")
_EXTRAS = {"s3fs": "remote", "gcsfs": "remote"}
_READ_ONLY = frozenset({"http", "https", "github", "gist", "git", "data", "zip", "tar"})
# Elsewhere a directory is no more than a part of names, and what can be made is a bucket, which is not ours to make.
_WITH_DIRECTORIES = frozenset({"file", "local", "memory", "sftp", "ssh", "hdfs", "webhdfs", "smb", "ftp"})
_TOLD_BYTES = 64 << 20  # a download of more is announced


class RemoteError(Exception):
    """What a file system elsewhere answered instead of doing what it was asked; the text says it."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file elsewhere as it was when it was looked at; other content has another `version`, as far as one can tell."""

    url: str
    size: int  # bytes
    version: str

    @property
    def copy(self) -> Path:
        """Where this version lies on this machine once it was fetched; its name ends as that of the file."""
        key = hashlib.sha256(f"{self.url}\n{self.version}".encode()).hexdigest()[:32]
        path = self.url.partition("?")[0] if self.url.startswith("http") else self.url  # without a signature
        return cache_directory() / "remote" / f"{key}-{PurePosixPath(path).name}"


def is_remote(path: str) -> bool:
    return _URL.match(path) is not None


def refusal(path: str, *, for_writing: bool = False) -> str | None:
    """Why a path cannot be used here, and what to install if that helps; None of one that can, and of a local one."""
    url = _URL.match(path)
    if url is None:
        return None
    if _PASSWORD.match(url["rest"]):
        return "a password in a path would be written to the run's files; give it by the environment"
    if for_writing and url["protocol"] in _READ_ONLY:
        return f"{url['protocol']}:// cannot be written to"
    if for_writing and ".." in url["rest"].split("/"):
        return "must not hold `..`"
    return _missing(url["protocol"])


def _missing(protocol: str) -> str | None:
    from fsspec.registry import known_implementations

    known = known_implementations.get(protocol)
    if known is None:
        return f"{protocol}:// is no file system that is known here (s3, gs, hf, https, ... are)"
    library = known["class"].partition(".")[0]
    if importlib.util.find_spec(library) is not None:
        return None
    extra = _EXTRAS.get(library)
    return f"{protocol}:// needs `pip install {library if extra is None else repr(f'overnight[{extra}]')}`"


def local_path(url: str) -> Path:
    """The path without its protocol, relative: where something that belongs to it can be kept."""
    match = _URL.match(url)
    assert match is not None
    return Path(match["rest"].lstrip("/"))


def find(pattern: str) -> list[RemoteFile]:
    """The files that a path or glob names, sorted. Raises RemoteError."""
    with _answers():
        system, path = _system(pattern)
        if glob.has_magic(path):
            found: list[str] = sorted(system.glob(path))
            if not found:
                raise RemoteError("no file matches this pattern")
            return [_look(system, name, system.unstrip_protocol(name)) for name in found if not system.isdir(name)]
        return [_look(system, path, pattern)]


def fetch(file: RemoteFile) -> None:
    """Make the copy, if it is not there yet. Raises NotFoundError, and WriteError where there is no room for it."""
    copy = file.copy
    if copy.exists():
        return
    if file.size >= _TOLD_BYTES:
        log.warning("copying %s (%.1f GiB) to %s", file.url, file.size / 2**30, copy.parent)
    coming = copy.with_name(f"{copy.name}.{os.getpid()}.part")
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(copy.parent).free < file.size:
            raise WriteError(Problem(f"has no room for the {file.size} bytes of {file.url}", file=str(copy.parent)))
        with _answers():
            system, path = _system(file.url)
            system.get_file(path, str(coming))
            if _look(system, path, file.url) != file or coming.stat().st_size != file.size:
                raise RemoteError("was changed while it was copied; run again when it is complete")
        coming.replace(copy)
    except RemoteError as error:
        raise NotFoundError(Problem(str(error), file=file.url)) from error
    except OSError as error:
        raise WriteError(Problem(f"cannot be written: {error.strerror}", file=str(coming))) from error
    finally:
        with suppress(OSError):
            coming.unlink(missing_ok=True)


def version_of(url: str) -> str | None:
    """The version of what lies at `url`; None where nothing does. Raises RemoteError."""
    with _answers():
        system, path = _system(url)
        return _look(system, path, url).version if system.exists(path) else None


def put(source: Path, url: str) -> str:
    """Copy a file to `url`, whatever lies there, and return its version there. Raises RemoteError."""
    with _answers():
        system, path = _system(url)
        if url.partition(":")[0] in _WITH_DIRECTORIES:
            system.makedirs(system._parent(path), exist_ok=True)
        system.put_file(str(source), path)
        file = _look(system, path, url)
        if file.size != source.stat().st_size:
            raise RemoteError(f"has {file.size} bytes after {source.stat().st_size} were put there")
        return file.version


def _system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    system, path = url_to_fs(url)
    system.invalidate_cache()  # what others have changed since is what counts
    return system, path


def _look(system: Any, path: str, url: str) -> RemoteFile:
    system.invalidate_cache()
    facts = system.info(path)
    if facts["type"] == "directory":
        raise RemoteError("this is a directory; name the files in it, for example with a glob")
    if facts.get("size") is None:
        raise RemoteError("its size is not told, so that a copy could not be checked; save it to a file first")
    return RemoteFile(url, int(facts["size"]), system.ukey(path))


@contextmanager
def _answers() -> Generator[None]:
    """Whatever a file system raises in this block, and each has its own, becomes a RemoteError."""
    try:
        yield
    except (RemoteError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise RemoteError("no such file") from error
    except Exception as error:
        if type(error).__module__.startswith("pipeline."):  # a stop
            raise
        reason = " ".join(str(error).split())[:300]
        raise RemoteError(f"{type(error).__name__}: {reason}" if reason else type(error).__name__) from error
