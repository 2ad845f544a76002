"""A sound directory and machine are found sound, and each fault is found by its check."""

import json
import os
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from pipeline import bandwidth
from pipeline.errors import OutputError
from pipeline.kernels.native import Native
from pipeline.ledger import directory_check
from pipeline.ledger.files import DISK, Files
from pipeline.machine import Cgroup, Gpu, Machine, load_machine
from pipeline.tools import machine_checks as checks
from pipeline.tools.doctor import diagnose_directory, diagnose_machine, recommend
from pipeline.tools.model_checks import check_model
from tests.command import REPOSITORY, overnight, write_job
from tests.model_files import LLAMA, write_model

SOUND = Machine(
    name="sound",
    physical_cores=8,
    logical_cpus=16,
    memory_total_bytes=64 << 30,
    memory_available_bytes=60 << 30,
    cpu_features=frozenset({"avx2", "avx512_bf16"}),
)
GPU = Gpu(name="GPU", total_bytes=80 << 30, free_bytes=79 << 30, capability=(9, 0))
HUGE = "sys/kernel/mm/transparent_hugepage/enabled"
GOVERNOR = "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"


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


OF_THE_SYSTEM = {"swap", "numa", "load", "clock", "large pages", "kernels"}  # of wherever the tests run


def test_a_sound_machine_has_no_warning(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    diagnosis = diagnose_machine(SOUND)
    found = {check: level for check, level in levels(diagnosis).items() if check not in OF_THE_SYSTEM}
    assert set(found.values()) == {"good"}, str(diagnosis)
    assert "memory speed" not in found  # another machine cannot be measured


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
        ("gpu", {"gpus": (replace(GPU, free_bytes=40 << 30),)}, "40.0 of 80.0 GiB"),
        ("interpreter", {"free_threaded": True, "gil_enabled": True}, "with the GIL"),
    ],
)
def test_each_fault_of_a_machine_is_found(check, change, word):
    diagnosis = diagnose_machine(replace(SOUND, **change))
    finding = next(each for each in diagnosis.findings if each.check == check)
    assert finding.level == "warning" and word in finding.found and finding.advice
    assert diagnosis.exit_code == 0 and finding.advice in str(diagnosis)


@pytest.mark.parametrize(
    ("check", "file", "bad", "good", "word"),
    [
        (
            checks.check_swap,
            "proc/meminfo",
            "SwapTotal: 8388608 kB\nSwapFree: 1048576 kB",
            "SwapTotal: 0 kB",
            "7.0 of 8",
        ),
        (checks.check_load, "proc/loadavg", "6.50 1 1 1/1 1", "0.10 1 1 1/1 1", "6.5 processes"),
        (checks.check_large_pages, HUGE, "always madvise [never]", "always [madvise] never", "never"),
        (checks.check_clock, GOVERNOR, "powersave", "performance", "powersave"),
        (checks.check_numa, "sys/devices/system/node/node1/x", "", None, "2 nodes"),
    ],
)
def test_each_fault_of_the_system_is_found(tmp_path, check, file, bad, good, word):
    (tmp_path / "sys/devices/system/node/node0").mkdir(parents=True)
    assert check(SOUND, tmp_path).level == "good"  # a system that says nothing
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(bad)
    finding = check(SOUND, tmp_path)
    assert finding.level == "warning" and word in finding.found and finding.advice
    if good is not None:
        (tmp_path / file).write_text(good)
        assert check(SOUND, tmp_path).level == "good"


def test_threads_kept_few_by_another_library_and_a_preloaded_allocator_are_named(monkeypatch):
    monkeypatch.setenv("MKL_NUM_THREADS", "2")
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libtcmalloc.so.4")
    assert checks.check_threads(SOUND).found == "MKL_NUM_THREADS=2 leaves cores idle"
    assert "libtcmalloc.so.4" in checks.check_allocator(SOUND).found


def test_old_and_missing_libraries_and_no_compiler_are_found(monkeypatch):
    def version(name):
        if name == "auto-round-lib":
            raise PackageNotFoundError
        return "0.6.2" if name == "safetensors" else "99.1+cpu"

    monkeypatch.setattr(checks, "version", version)
    monkeypatch.setattr("shutil.which", lambda _name: None)
    diagnosis = diagnose_machine(SOUND)
    found = {each.check: each for each in diagnosis.findings}
    assert found["versions"].advice.startswith("safetensors: install 0.7 or newer; with older ones each look-up")
    assert found["compiler"].level == "warning" and diagnosis.exit_code == 0
    assert "not installed" in found["auto-round kernels"].found


def test_a_missing_library_is_trouble(monkeypatch):
    def version(_name):
        raise PackageNotFoundError

    monkeypatch.setattr(checks, "version", version)
    assert diagnose_machine(SOUND).exit_code == 69


def test_kernels_that_do_not_compile_are_told_with_the_reason(monkeypatch):
    monkeypatch.setattr("pipeline.kernels.native.native", lambda _source: Native(None, "there is no C compiler"))
    finding = checks.check_kernels(SOUND)
    assert finding.level == "warning" and "there is no C compiler" in finding.found


@pytest.mark.parametrize(
    ("change", "strategy"),
    [
        ({}, "no-gpu for"),
        ({"gpus": (GPU,)}, "max-gpu for Qwen3"),
        ({"gpus": (replace(GPU, total_bytes=16 << 30, free_bytes=15 << 30),)}, "min-gpu for"),
        ({"memory_available_bytes": 20 << 30}, "no-gpu; smaller"),
    ],
)
def test_the_strategy_that_suits_a_machine_is_named(change, strategy):
    assert recommend(replace(SOUND, **change)).found.startswith(strategy)


@pytest.mark.parametrize("file", sorted((REPOSITORY / "examples/machines").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_machines_of_the_guide_are_recognized(file):
    expected = {
        "cpu-24gb": "no-gpu; smaller",
        "cpu-64gb": "no-gpu for Qwen3",
        "gpu-80gb": "max-gpu for Qwen3",
        "rtx4090-laptop-64gb": "min-gpu for Qwen3",
        "two-24gb-gpus": "max-gpu for Qwen3",
    }
    assert recommend(load_machine(file)).found.startswith(expected[file.stem])


def test_what_is_measured_is_plausible(tmp_path):
    assert 1e8 < bandwidth.memory_speed(2) < 1e13
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(64 << 20))
    assert bandwidth.cached_share([file]) in (None, 1.0)
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    share = bandwidth.cached_share([file])
    assert share is None or share < 0.1 or share == 1.0  # a file system in memory keeps all
    speed = bandwidth.read_speed([file])
    assert speed is None or 1e6 < speed < 1e12
    assert bandwidth.cached_share([file]) == share  # measuring leaves the cache as it is
    assert bandwidth.read_speed([]) is None and bandwidth.read_speed([tmp_path / "weights"]) != 0


def test_a_model_is_diagnosed_by_its_files(tmp_path, monkeypatch):
    model = tmp_path / "model"
    said = overnight("doctor", "--model", "builtin:tiny-qwen3-next", "--json")
    assert said.returncode == 0, said.stderr
    found = {each["check"]: each for each in json.loads(said.stdout)["findings"]}
    assert "packed weights are read straight into place" in found["model loading"]["found"]
    assert {"memory speed", "model disk", "model cache", "load strategy"} <= found.keys()
    write_model(model, LLAMA)
    monkeypatch.setattr(bandwidth, "read_speed", lambda _files: 1e3)
    monkeypatch.setattr(bandwidth, "cached_share", lambda _files: 0.5)
    findings = {each.check: each for each in check_model(model, usable_memory_bytes=10)}
    assert "not quantized" in findings["model loading"].found
    assert findings["model disk"].level == "warning" and "SSD" in findings["model disk"].advice
    assert findings["model cache"].level == "warning" and "larger than the memory" in findings["model cache"].advice
    assert overnight("doctor", "--model", tmp_path / "absent").returncode == 66
    assert overnight("doctor", tmp_path, "--model", model).returncode == 64


def test_a_job_is_diagnosed_with_machine_and_output(tmp_path):
    said = overnight("doctor", write_job(tmp_path, []))
    assert said.returncode == 0, said.stdout
    for check in ("instructions", "memory speed", "kernels", "lock", "truncate"):
        assert f" {check}: " in said.stdout
    assert DISK is directory_check.DISK
