"""Writes are whole or taken back, names are never taken from a stranger, and a failed sync is never repeated."""

import errno
import os
from pathlib import Path

import pytest

from pipeline.errors import DataError, WriteError
from pipeline.ledger.files import DISK, Files, GrowingFile, Patience, RunPaths, make_directories, place_new


class FailingFiles(Files):
    """Raises what `failures` holds for an operation, one each time; the failing write has written half."""

    def __init__(self, **failures: list[int]) -> None:
        self.failures = failures
        self.calls: list[str] = []

    def _step(self, operation: str) -> None:
        self.calls.append(operation)
        if self.failures.get(operation):
            code = self.failures[operation].pop(0)
            raise OSError(code, os.strerror(code))

    def write(self, descriptor, data):
        try:
            self._step("write")
        except OSError:
            super().write(descriptor, data[: len(data) // 2])
            raise
        super().write(descriptor, data)

    def sync(self, descriptor):
        self._step("sync")

    def truncate(self, descriptor, size):
        self._step("truncate")
        super().truncate(descriptor, size)

    def link(self, source, target):
        self._step("link")
        super().link(source, target)

    def rename_new(self, source, target):
        self._step("rename_new")
        super().rename_new(source, target)


def no_patience() -> Patience:
    return Patience(0.0)


def test_write_goes_on_after_short_writes(tmp_path, monkeypatch):
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real_write(descriptor, data[:3]))
    file = GrowingFile(DISK, tmp_path / "f", no_patience())
    file.append(b"0123456789")
    assert (tmp_path / "f").read_bytes() == b"0123456789"
    assert file.size == 10


def test_a_growing_file_goes_on_where_it_ended(tmp_path):
    (tmp_path / "f").write_bytes(b"old")
    file = GrowingFile(DISK, tmp_path / "f", no_patience())
    assert (file.size, file.synced) == (3, 0)
    file.append(b"new")
    file.sync()
    assert (file.size, file.synced) == (6, 6)
    file.cut(4)
    assert (file.size, file.synced) == (4, 4)
    file.append(b"!")
    assert (tmp_path / "f").read_bytes() == b"oldn!"


def test_a_failed_append_leaves_nothing_behind(tmp_path):
    file = GrowingFile(FailingFiles(write=[errno.EIO]), tmp_path / "f", no_patience())
    with pytest.raises(WriteError, match=r"f: cannot write: Input/output error"):
        file.append(b"0123456789")
    assert (tmp_path / "f").read_bytes() == b""
    file.append(b"ab")
    assert (tmp_path / "f").read_bytes() == b"ab"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_waited_for(tmp_path, code, caplog):
    naps = []
    file = GrowingFile(FailingFiles(write=[code] * 4), tmp_path / "f", Patience(60.0, naps.append))
    file.append(b"0123456789")
    assert (tmp_path / "f").read_bytes() == b"0123456789"
    assert len(naps) == 4
    assert len(caplog.records) == 1


def test_patience_ends_and_begins_anew_after_a_success(tmp_path):
    naps = []
    files = FailingFiles(write=[errno.ENOSPC] * 3)
    file = GrowingFile(files, tmp_path / "f", Patience(3.0, naps.append))
    file.append(b"a")
    files.failures["write"] = [errno.ENOSPC] * 100
    with pytest.raises(WriteError, match="No space left"):
        file.append(b"b")
    assert len(naps) == 6
    assert (tmp_path / "f").read_bytes() == b"a"


def test_what_interrupts_the_waiting_is_passed_on_and_leaves_nothing(tmp_path):
    def interrupt(_seconds):
        raise KeyboardInterrupt

    file = GrowingFile(FailingFiles(write=[errno.ENOSPC]), tmp_path / "f", Patience(60.0, interrupt))
    with pytest.raises(KeyboardInterrupt):
        file.append(b"0123456789")
    assert (tmp_path / "f").read_bytes() == b""


def test_a_write_that_is_interrupted_leaves_nothing(tmp_path):
    class Interrupted(Files):
        def write(self, descriptor, data):
            super().write(descriptor, data[:3])
            raise KeyboardInterrupt

    file = GrowingFile(Interrupted(), tmp_path / "f", no_patience())
    with pytest.raises(KeyboardInterrupt):
        file.append(b"0123456789")
    assert (tmp_path / "f").read_bytes() == b""


def test_after_a_failed_sync_nothing_more_is_written_or_synced(tmp_path):
    files = FailingFiles(sync=[errno.EIO])
    file = GrowingFile(files, tmp_path / "f", no_patience())
    file.append(b"a")
    with pytest.raises(WriteError):
        file.sync()
    with pytest.raises(WriteError):
        file.sync()
    with pytest.raises(WriteError):
        file.append(b"b")
    assert files.calls.count("sync") == 1
    file.take_back(0)  # this much is still allowed
    assert (tmp_path / "f").read_bytes() == b""


def test_taking_back_is_left_to_recovery_where_the_disk_refuses_it(tmp_path):
    file = GrowingFile(FailingFiles(write=[errno.EIO], truncate=[errno.EIO]), tmp_path / "f", no_patience())
    with pytest.raises(WriteError):
        file.append(b"0123456789")
    assert (tmp_path / "f").read_bytes() == b"01234"


@pytest.mark.parametrize("meddle", ["grow", "remove", "replace"])
def test_another_writer_is_noticed(tmp_path, meddle):
    path = tmp_path / "f"
    file = GrowingFile(DISK, path, no_patience())
    file.append(b"ours")
    file.check_untouched()
    if meddle == "grow":
        with path.open("ab") as other:
            other.write(b"theirs")
    else:
        path.unlink()
    if meddle == "replace":
        path.write_bytes(b"ours")
    with pytest.raises(DataError, match="another program"):
        file.check_untouched()


def test_a_file_is_placed_under_a_new_name(tmp_path):
    source, target = tmp_path / "s", tmp_path / "t"
    source.write_bytes(b"ours")
    place_new(DISK, source, target)
    assert target.read_bytes() == b"ours"
    assert not source.exists()


@pytest.mark.parametrize("failures", [{}, {"link": [errno.EPERM]}, {"link": [errno.EOPNOTSUPP]}])
def test_placing_never_replaces(tmp_path, failures):
    source, target = tmp_path / "s", tmp_path / "t"
    source.write_bytes(b"ours")
    target.write_bytes(b"theirs")
    with pytest.raises(FileExistsError):
        place_new(FailingFiles(**failures), source, target)
    assert (source.read_bytes(), target.read_bytes()) == (b"ours", b"theirs")


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK])
def test_placing_works_without_hard_links(tmp_path, code):
    source, target = tmp_path / "s", tmp_path / "t"
    source.write_bytes(b"ours")
    files = FailingFiles(link=[code])
    place_new(files, source, target)
    assert (files.calls, target.read_bytes(), source.exists()) == (["link", "rename_new"], b"ours", False)


def test_placing_does_not_hide_other_errors(tmp_path):
    files = FailingFiles(link=[errno.EIO])
    (tmp_path / "s").write_bytes(b"ours")
    with pytest.raises(OSError, match="Input/output"):
        place_new(files, tmp_path / "s", tmp_path / "t")
    assert files.calls == ["link"]


def test_directories_are_made_and_every_name_is_synced(tmp_path, monkeypatch):
    synced = []

    class Recording(Files):
        def sync_directory(self, path):
            synced.append((path, path.is_dir()))
            super().sync_directory(path)

    monkeypatch.chdir(tmp_path)
    make_directories(Recording(), Path("a/b/c"))
    assert (tmp_path / "a/b/c").is_dir()
    # All are there when the first is synced, whoever made them.
    assert synced[:4] == [(tmp_path / name, True) for name in ("a/b/c", "a/b", "a", "")]


def test_a_directory_that_cannot_be_synced_is_accepted_and_a_broken_one_is_not(tmp_path, monkeypatch):
    def fail(code):
        def fsync(_descriptor):
            raise OSError(code, os.strerror(code))

        return fsync

    monkeypatch.setattr(os, "fsync", fail(errno.EINVAL))
    DISK.sync_directory(tmp_path)
    monkeypatch.setattr(os, "fsync", fail(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        DISK.sync_directory(tmp_path)


def test_the_files_of_a_run_lie_beside_its_output():
    paths = RunPaths(Path("runs/a.jsonl"))
    names = [paths.partial, paths.journal, paths.lock, paths.summary]
    assert [path.as_posix() for path in names] == [
        "runs/a.jsonl.partial",
        "runs/a.jsonl.journal",
        "runs/a.jsonl.lock",
        "runs/a.jsonl.summary.json",
    ]
