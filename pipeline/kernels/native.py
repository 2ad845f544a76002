"""Compiles a C file of the package for this processor when it is first needed or ahead of that, and keeps the library.

A wheel cannot know the processor it will run on, and building against torch's headers takes a minute; a plain C file
takes a second. Machines without a compiler go without: who asks gets the reason and has a path in torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

from pipeline.cache import cache_directory
from pipeline.errors import NotFoundError

_COMPILERS = ("cc", "gcc", "clang")
# Loops on the bounds of a cache line: a product's was up to 18 % slower or faster with what stood before it.
_FAST = ("-O3", "-march=native", "-ffp-contract=fast", "-falign-loops=64")
_FLAGS = (*_FAST, "-fopenmp", "-shared", "-fPIC", "-std=gnu11")
_TIMEOUT_S = 120
_UNFINISHED = ".unfinished"
_HERE = Path(__file__).parent
_locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)  # one for each source
_CPU_FIELDS = ("model name", "flags", "Features", "CPU part")  # of /proc/cpuinfo: what -march=native looks at


class Native(NamedTuple):
    """A compiled library, or the reason why there is none."""

    library: ctypes.CDLL | None
    reason: str


def compile_ahead() -> None:
    """Begin to compile the kernels that are not yet, beside whatever is done meanwhile; `native` waits for its own."""
    with contextlib.suppress(OSError, NotFoundError, subprocess.SubprocessError):
        _version(_compiler())  # asked here, or every thread would
        for source in _HERE.glob("*.c"):
            threading.Thread(target=_compile_quietly, args=(source,), daemon=True).start()


def _compile_quietly(source: Path) -> None:
    with contextlib.suppress(OSError, NotFoundError, subprocess.SubprocessError):  # `native` will tell
        _compiled(source, _directory())


@cache
def native(source: Path) -> Native:
    """The library of a C source file, compiled unless that was done before; never raises.

    Call it once torch is imported: the library then takes the OpenMP that torch has brought along, so that both share
    one set of threads. A function that computes in parallel takes the number of threads as an argument
    (`torch.get_num_threads()`).
    """
    try:
        return Native(_library(source, _directory()), "")
    except (OSError, NotFoundError, subprocess.SubprocessError) as error:
        reason = str(error)
        if isinstance(error, subprocess.CalledProcessError):
            reason = f"{error.cmd[0]} failed: {error.stderr.strip()[-300:]}"
        return Native(None, reason)


def _directory() -> Path:
    return cache_directory() / "kernels"


def _library(source: Path, directory: Path) -> ctypes.CDLL:
    compiled = _compiled(source, directory)
    try:
        return ctypes.CDLL(str(compiled))
    except OSError:  # cut short by a crash: made anew
        compiled.unlink(missing_ok=True)
        return ctypes.CDLL(str(_compiled(source, directory)))


def _compiled(source: Path, directory: Path) -> Path:
    """The file of the library; made unless it is there."""
    compiler = _compiler()
    compiled = directory / f"{source.stem}-{_key(source, compiler)}.so"
    with _locks[source.name]:
        if not compiled.exists():
            directory.mkdir(parents=True, exist_ok=True)
            _remove_left(directory)
            # Another process that compiles at the same time writes another file; the last replaces like with like.
            handle, unfinished = tempfile.mkstemp(prefix=compiled.stem, suffix=_UNFINISHED, dir=directory)
            os.close(handle)
            try:
                command = [compiler, *_FLAGS, str(source), "-o", unfinished, "-lm"]
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
                Path(unfinished).replace(compiled)
            finally:
                Path(unfinished).unlink(missing_ok=True)
    return compiled


def _remove_left(directory: Path) -> None:
    """What processes were writing when they were killed, or ended before what they had compiled ahead."""
    for path in directory.glob(f"*{_UNFINISHED}"):
        with contextlib.suppress(FileNotFoundError):  # its own process is through
            if time.time() - path.stat().st_mtime > 2 * _TIMEOUT_S:
                path.unlink()


def _compiler() -> str:
    compiler = next(filter(None, map(shutil.which, [os.environ.get("CC") or "", *_COMPILERS])), None)
    if compiler is None:
        raise NotFoundError("there is no C compiler (cc, gcc or clang)")
    return compiler


@cache
def _version(compiler: str) -> bytes:
    return subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=_TIMEOUT_S).stdout


def _key(source: Path, compiler: str) -> str:
    """What the compiled code depends on."""
    version = _version(compiler)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = [" ".join(os.uname())]
    cpu = sorted({line for line in lines if line.startswith(_CPU_FIELDS)}) or lines
    sources = [source, *sorted(source.parent.glob("*.h"))]
    texts = [path.read_bytes() for path in sources]
    parts = [*texts, compiler.encode(), version, " ".join(_FLAGS).encode(), "\n".join(cpu).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
