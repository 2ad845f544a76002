"""What a disk may hold after a power loss: a file layer that records every operation, and the enumeration of states.

POSIX promises nothing about data that was not synced: any of the writes and truncations of a file since its last sync
may have reached the disk, whole, torn or as NULs, and any of the changes of names since the last sync of their
directory, in any combination. Syncing a file does not sync its name. This is harsher than any one file system.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations, product
from pathlib import Path

from pipeline.ledger import lock
from pipeline.ledger.files import Files

MAX_SUBSETS_OF = 5  # pending changes; of more, only prefixes and those with one dropped


class Killed(BaseException):
    """The process dies here."""


@dataclass(frozen=True)
class Write:
    inode: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Truncate:
    inode: int
    size: int


@dataclass(frozen=True)
class Sync:
    inode: int


@dataclass(frozen=True)
class SetName:
    name: str
    inode: int
    instead_of: str | None = None  # for a rename: the name that goes away in the same instant


@dataclass(frozen=True)
class DropName:
    name: str


@dataclass(frozen=True)
class MakeDirectory:
    name: str


@dataclass(frozen=True)
class SyncDirectory:
    name: str


@dataclass(frozen=True)
class Note:
    """What the program under test had acknowledged by now; later notes replace earlier ones."""

    value: object


Data = Write | Truncate
Naming = SetName | DropName | MakeDirectory
Operation = Data | Naming | Sync | SyncDirectory | Note


class Recorder(Files):
    """Does every operation but the syncs for real under `root`, and logs all of them.

    What lies under `root` at the start counts as being on the disk. `leave_out` is asked for each sync whether to leave
    it out, and is given its site: the chain of functions that asked for it; `leave_uncut` in the same way for each
    truncate. The operation number `kill_at`, from 0, raises Killed until `die` is called; `fail` may raise OSError
    instead of an operation, given its name and path.
    """

    def __init__(
        self,
        root: Path,
        *,
        leave_out: Callable[[str], bool] | None = None,
        leave_uncut: Callable[[str], bool] | None = None,
        kill_at: int | None = None,
        fail: Callable[[str, Path], None] | None = None,
    ) -> None:
        self.root = root
        self.kill_at = kill_at
        self.fail = fail
        self.log: list[Operation] = []
        self.sites: set[str] = set()  # of syncs
        self.cuts: set[str] = set()  # sites of truncates
        self.num_steps = 0
        self._leave_out = leave_out
        self._leave_uncut = leave_uncut
        self._inodes: dict[str, int] = {}  # name → inode
        self._open: dict[int, tuple[int, Path]] = {}  # descriptor → inode
        self._num_inodes = 0
        self.disk = Disk()
        for path in sorted(root.rglob("*")):
            name = self._name(path)
            if path.is_dir():
                self.disk.directories.add(name)
            else:
                self._inodes[name] = self._new_inode()
                self.disk.names[name] = self._inodes[name]
                self.disk.content[self._inodes[name]] = path.read_bytes()

    def note(self, value: object) -> None:
        self.log.append(Note(value))

    def die(self) -> None:
        """What the kernel does for a dead process: close its files, drop its locks."""
        for descriptor in list(self._open):
            os.close(descriptor)
        self._open.clear()
        lock._held.clear()
        self.kill_at = None

    def open(self, path: Path, flags: int) -> int:
        self._step("open", path)
        existed = os.path.lexists(path)
        descriptor = super().open(path, flags)
        name = self._name(path)
        if not existed:
            self._inodes[name] = self._new_inode()
            self.log.append(SetName(name, self._inodes[name]))
        self._open[descriptor] = self._inodes[name], path
        return descriptor

    def close(self, descriptor: int) -> None:
        del self._open[descriptor]
        super().close(descriptor)

    def write(self, descriptor: int, data: bytes) -> None:
        inode, path = self._open[descriptor]
        offset = os.fstat(descriptor).st_size
        try:
            self._step("write", path)
        except OSError:  # half of it got through
            data = data[: len(data) // 2]
            super().write(descriptor, data)
            self.log.append(Write(inode, offset, data))
            raise
        super().write(descriptor, data)
        self.log.append(Write(inode, offset, bytes(data)))

    def truncate(self, descriptor: int, size: int) -> None:
        inode, path = self._open[descriptor]
        self._step("truncate", path)
        site = _site()
        self.cuts.add(site)
        if self._leave_uncut is not None and self._leave_uncut(site):
            return
        super().truncate(descriptor, size)
        self.log.append(Truncate(inode, size))

    def sync(self, descriptor: int) -> None:
        inode, path = self._open[descriptor]
        self._step("sync", path)
        if not self._is_left_out():
            self.log.append(Sync(inode))

    def sync_directory(self, path: Path) -> None:
        self._step("sync_directory", path)
        if path.absolute().is_relative_to(self.root) and not self._is_left_out():
            self.log.append(SyncDirectory(self._name(path)))

    def make_directory(self, path: Path) -> None:
        self._step("make_directory", path)
        super().make_directory(path)
        self.log.append(MakeDirectory(self._name(path)))

    def link(self, source: Path, target: Path) -> None:
        self._step("link", target)
        super().link(source, target)
        self._inodes[self._name(target)] = self._inodes[self._name(source)]
        self.log.append(SetName(self._name(target), self._inodes[self._name(source)]))

    def rename_new(self, source: Path, target: Path) -> None:
        self._step("rename_new", target)
        super().rename_new(source, target)
        self._rename(source, target)

    def rename(self, source: Path, target: Path) -> None:
        self._step("rename", target)
        super().rename(source, target)
        self._rename(source, target)

    def unlink(self, path: Path) -> None:
        self._step("unlink", path)
        super().unlink(path)
        if self._inodes.pop(self._name(path), None) is not None:
            self.log.append(DropName(self._name(path)))

    def _rename(self, source: Path, target: Path) -> None:
        inode = self._inodes.pop(self._name(source))
        self._inodes[self._name(target)] = inode
        self.log.append(SetName(self._name(target), inode, instead_of=self._name(source)))

    def _step(self, operation: str, path: Path) -> None:
        if self.num_steps == self.kill_at:
            raise Killed
        self.num_steps += 1
        if self.fail is not None:
            self.fail(operation, path)

    def _is_left_out(self) -> bool:
        site = _site()
        self.sites.add(site)
        return self._leave_out is not None and self._leave_out(site)

    def _name(self, path: Path) -> str:
        return path.absolute().relative_to(self.root).as_posix()

    def _new_inode(self) -> int:
        self._num_inodes += 1
        return self._num_inodes


def _site() -> str:
    """The functions of the package that led to this sync, outermost first, without the layer that all syncs share."""
    chain: list[str] = []
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("pipeline.") and module not in ("pipeline.ledger.files", "pipeline.ledger.journal"):
            chain.append(f"{frame.f_code.co_qualname}:{frame.f_lineno}")
        frame = frame.f_back
    return " > ".join(reversed(chain))


@dataclass
class Disk:
    """What is certainly on the disk, and what may or may not be."""

    names: dict[str, int] = field(default_factory=dict)
    directories: set[str] = field(default_factory=lambda: {"."})
    content: dict[int, bytes] = field(default_factory=dict)  # by inode
    naming: list[Naming] = field(default_factory=list)  # not yet synced
    writing: dict[int, list[Data]] = field(default_factory=dict)  # not yet synced, by inode

    def apply(self, operation: Operation) -> None:
        match operation:
            case Write() | Truncate():
                self.writing.setdefault(operation.inode, []).append(operation)
            case Sync(inode):
                self.content[inode] = _written(self.content.get(inode, b""), self.writing.pop(inode, []))
            case SetName() | DropName() | MakeDirectory():
                self.naming.append(operation)
            case SyncDirectory(name):
                synced = [change for change in self.naming if _parent(change.name) == name]
                self.names, self.directories = _named(self.names, self.directories, synced)
                self.naming = [change for change in self.naming if change not in synced]
            case Note():
                pass

    def crashes(self) -> Iterator[dict[str, bytes]]:
        """Every content of the disk, by name, that a power loss now may leave; a name that ends in / is a directory."""
        for changes in _subsets(self.naming):
            names, directories = _named(self.names, self.directories, changes)
            reachable = {name: inode for name, inode in names.items() if _exists(_parent(name), directories)}
            inodes = sorted(set(reachable.values()))
            for contents in product(*(self._contents(inode) for inode in inodes)):
                by_inode = dict(zip(inodes, contents, strict=True))
                files = {name: by_inode[inode] for name, inode in sorted(reachable.items())}
                empty = {f"{name}/": b"" for name in sorted(directories) if _exists(name, directories)}
                yield empty | files

    def _contents(self, inode: int) -> list[bytes]:
        before, operations = self.content.get(inode, b""), self.writing.get(inode, [])
        states = [_written(before, operations[:count]) for count in range(len(operations) + 1)]
        for index, operation in enumerate(operations):
            if isinstance(operation, Write):
                torn = Write(inode, operation.offset, operation.data[: len(operation.data) // 2])
                states.append(_written(before, [*operations[:index], torn]))
                nuls = Write(inode, operation.offset, bytes(len(operation.data)))
                states.append(_written(before, [*operations[:index], nuls, *operations[index + 1 :]]))
            states.append(_written(before, operations[:index] + operations[index + 1 :]))
        return list(dict.fromkeys(states))


def crash_states(recorder: Recorder, start: int = 0) -> Iterator[tuple[int, dict[str, bytes], object]]:
    """After each operation from `start`: its number, every content the disk may have, and the last note by then.

    A content that was already seen with the same note is left out.
    """
    disk, note = recorder.disk, None
    seen: set[tuple[tuple[tuple[str, bytes], ...], int]] = set()
    for number, operation in enumerate(recorder.log):
        disk.apply(operation)
        if isinstance(operation, Note):
            note = operation.value
        if number < start:
            continue
        for content in disk.crashes():
            key = tuple(content.items()), id(note)
            if key not in seen:
                seen.add(key)
                yield number, content, note


def write_state(content: dict[str, bytes], root: Path) -> None:
    """Make a directory hold what a crashed disk holds, and nothing else."""
    root.mkdir(exist_ok=True)
    for path in sorted(root.rglob("*"), reverse=True):
        if not path.is_dir():
            path.unlink()
        elif f"{path.relative_to(root).as_posix()}/" not in content:
            path.rmdir()
    for name, data in content.items():
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.write_bytes(data)


def _subsets(changes: list[Naming]) -> Iterator[list[Naming]]:
    if len(changes) <= MAX_SUBSETS_OF:
        for count in range(len(changes) + 1):
            yield from map(list, combinations(changes, count))
        return
    for count in range(len(changes) + 1):
        yield changes[:count]
        yield changes[: max(0, count - 1)] + changes[count:]


def _named(names: dict[str, int], directories: set[str], changes: list[Naming]) -> tuple[dict[str, int], set[str]]:
    names, directories = dict(names), set(directories)
    for change in changes:
        match change:
            case SetName(name, inode, instead_of):
                if instead_of is not None and names.get(instead_of) == inode:
                    del names[instead_of]
                names[name] = inode
            case DropName(name):
                names.pop(name, None)
            case MakeDirectory(name):
                directories.add(name)
    return names, directories


def _written(content: bytes, operations: list[Data]) -> bytes:
    for operation in operations:
        match operation:
            case Truncate(_, size):
                content = content[:size].ljust(size, b"\0")
            case Write(_, offset, data):
                content = content[:offset].ljust(offset, b"\0") + data + content[offset + len(data) :]
    return content


def _parent(name: str) -> str:
    return name.rpartition("/")[0] or "."


def _exists(directory: str, directories: set[str]) -> bool:
    while directory != ".":
        if directory not in directories:
            return False
        directory = _parent(directory)
    return True
