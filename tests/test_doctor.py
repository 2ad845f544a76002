"""A sound directory and machine are found sound, and each fault is found by its check."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import OutputError
from pipeline.ledger import directory_check
from pipeline.ledger.files import DISK, Files
from pipeline.machine import Cgroup, Machine
from pipeline.tools.doctor import diagnose_directory, diagnose_machine
from tests.command import overnight

SOUND = Machine(
    name="sound",
    physical_cores=8,
    logical_cpus=16,
    memory_total_bytes=64 << 30,
    memory_available_bytes=60 << 30,
    cpu_features=frozenset({"avx2", "avx512_bf16"}),
)


def levels(diagnosis):
    return {finding.check: finding.level for finding in diagnosis.findings}


def test_a_local_directory_keeps_what_the_ledger_needs(tmp_path):
    said = overnight("doctor", tmp_path, "--json")
    assert said.returncode == 0, said.stdout
    found = json.loads(said.stdout)
    assert found["ok"] and {each["check"] for each in found["findings"]} == {
        "file system", "space", "lock", "new names", "rename", "sync", "truncate", "directory sync"
    }  # fmt: skip
    assert {each["level"] for each in found["findings"] if each["check"] not in ("file system", "sync", "space")} == {
        "good"
    }
    assert list(tmp_path.iterdir()) == []


class Broken(Files):
    """A file system with one fault."""

    def __init__(self, fault):
        self.fault = fault

    def link(self, source, target):
        if self.fault == "link replaces":
            return source.replace(target)
        return super().link(source, target)

    def rename(self, source, target):
        if self.fault == "rename is not atomic":
            target.unlink()
            target.write_bytes(source.read_bytes()[:1])
            return source.replace(target)
        return super().rename(source, target)

    def truncate(self, descriptor, size):
        if self.fault != "truncate does nothing":
            super().truncate(descriptor, size)

    def sync(self, descriptor):
        if self.fault == "sync fails":
            raise OSError(5, os.strerror(5))
        super().sync(descriptor)

    def unlink(self, path):
        if not (self.fault == "link replaces" and not path.exists()):
            super().unlink(path)


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("link replaces", "new names"),
        ("rename is not atomic", "rename"),
        ("truncate does nothing", "truncate"),
        ("sync fails", "sync"),
    ],
)
def test_a_fault_is_found_by_its_check_alone(tmp_path, monkeypatch, fault, check):
    monkeypatch.setattr(directory_check, "DISK", Broken(fault))
    diagnosis = diagnose_directory(tmp_path)
    in_trouble = {name for name, level in levels(diagnosis).items() if level == "trouble"}
    assert check in in_trouble and in_trouble <= {check, "sync", "truncate"}
    assert diagnosis.exit_code == 69
    assert list(tmp_path.iterdir()) == []


def test_locks_that_exclude_nobody_are_trouble(tmp_path, monkeypatch):
    monkeypatch.setattr(directory_check, "_contend", lambda _path: (True, 0))
    assert levels(diagnose_directory(tmp_path))["lock"] == "trouble"


def test_where_nothing_can_be_written_is_said(tmp_path):
    with pytest.raises(OutputError, match="cannot be created"):
        diagnose_directory(tmp_path / "absent")
    assert overnight("doctor", tmp_path / "absent").returncode == 73


@pytest.mark.parametrize(
    ("kind", "level"), [("ext4", "good"), ("nfs4", "warning"), ("fuse.sshfs", "warning"), ("tmpfs", "warning")]
)
def test_the_file_system_is_told_from_its_mount(tmp_path, kind, level, monkeypatch):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "1 0 0:1 / / rw - ext4 /dev/a rw\n"
        f"2 1 0:2 / /mnt/my\\040data rw,relatime shared:1 - {kind} server:/x rw\n"
        "3 1 0:3 / /mnt/my rw - xfs /dev/b rw\n"
    )
    mounted_at = directory_check.mounted_at
    assert mounted_at(Path("/mnt/my data/runs"), mounts) == (kind, Path("/mnt/my data"))
    assert mounted_at(Path("/mnt/my"), mounts)[0] == "xfs"
    assert mounted_at(Path("/mnt/mydata"), mounts)[0] == "ext4"
    assert mounted_at(Path("/"), tmp_path / "absent")[0] == "unknown"
    monkeypatch.setattr(directory_check, "mounted_at", lambda _: (kind, Path("/mnt")))
    assert directory_check.check_file_system(tmp_path).level == level


def test_a_sound_machine_has_no_warning(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    diagnosis = diagnose_machine(SOUND)
    assert set(levels(diagnosis).values()) == {"good"}, str(diagnosis)


@pytest.mark.parametrize(
    ("check", "change", "word"),
    [
        ("memory", {"memory_available_bytes": 1 << 30}, "1.0 GiB usable"),
        ("memory", {"cgroup": Cgroup(version=2, memory_limit_bytes=2 << 30)}, "control group allows 2.0 GiB"),
        ("cores", {"cgroup": Cgroup(version=2, cpu_quota=2.0)}, "leaves 2"),
        ("threads", {"thread_limit": 1}, "idle"),
        ("threads", {"thread_limit": 32}, "more than the 8 cores"),
        ("instructions", {"cpu_features": frozenset({"avx2"})}, "no bfloat16"),
        ("gpu", {"gpu_problem": "the driver is too old"}, "driver is too old"),
        ("interpreter", {"free_threaded": True, "gil_enabled": True}, "with the GIL"),
    ],
)
def test_each_fault_of_a_machine_is_found(check, change, word):
    diagnosis = diagnose_machine(replace(SOUND, **change))
    finding = next(each for each in diagnosis.findings if each.check == check)
    assert finding.level == "warning" and word in finding.found and finding.advice
    assert diagnosis.exit_code == 0 and finding.advice in str(diagnosis)


def test_old_and_missing_libraries_and_no_compiler_are_found(monkeypatch):
    monkeypatch.setattr("pipeline.tools.doctor.version", lambda name: "0.6.2" if name == "safetensors" else "99.1+cpu")
    monkeypatch.setattr("shutil.which", lambda _name: None)
    found = {each.check: each for each in diagnose_machine(SOUND).findings}
    assert found["versions"].advice.startswith("safetensors: install 0.7 or newer")
    assert found["compiler"].level == "warning"


def test_this_machine_can_be_diagnosed():
    said = overnight("doctor")
    assert said.returncode == 0 and "instructions" in said.stdout
    assert DISK is directory_check.DISK
