"""A control group with a memory limit of its own, of version 1 or 2: where the kernel really kills for memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import pytest

MIB = 1 << 20
_ROOT = Path("/sys/fs/cgroup")


class MemoryGroup:
    """An empty control group; what enters it, and what that starts, shares `limit_bytes`."""

    def __init__(self, path: Path, *, version: int) -> None:
        self.path = path
        self._version = version
        path.mkdir()

    def limit(self, limit_bytes: int) -> None:
        """Raises OSError where the kernel does not let us."""
        names = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes") if self._version == 1 else ("memory.max",)
        for name in names:
            with suppress(FileNotFoundError):  # swap is not accounted for everywhere
                (self.path / name).write_text(str(limit_bytes))
        if self._version == 2:
            (self.path / "memory.swap.max").write_text("0")

    def remove(self) -> None:
        self.path.rmdir()


def enter(group: Path) -> None:
    """Move this process there. What it has already is not counted."""
    (group / "cgroup.procs").write_text(str(os.getpid()))


def _made() -> MemoryGroup:
    name = f"overnight-{uuid4().hex[:12]}"
    if (_ROOT / "memory").is_dir():
        return MemoryGroup(_ROOT / "memory" / name, version=1)
    if "memory" in (_ROOT / "cgroup.subtree_control").read_text().split():
        return MemoryGroup(_ROOT / name, version=2)
    raise OSError("no memory controller")


@contextmanager
def memory_group() -> Iterator[MemoryGroup]:
    """Skips the test where no such group can be made."""
    try:
        group = _made()
        group.limit(1 << 40)
    except OSError as error:
        pytest.skip(f"no control group with a memory limit can be made here (root only): {error}")
    try:
        yield group
    finally:
        group.remove()
