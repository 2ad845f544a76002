"""A machine as a value: read from and written to YAML, its limits told apart from its size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import NotFoundError, UsageError
from pipeline.machine import Cgroup, Gpu, Machine, load_machine

GIB = 1 << 30
BYTES = st.integers(0, 1 << 50)


def machine(**changes: object) -> Machine:
    values = {"name": "test", "physical_cores": 4, "logical_cpus": 8, "memory_total_bytes": 16 * GIB}
    return Machine(**({"memory_available_bytes": 12 * GIB} | values | changes))  # type: ignore[arg-type]


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    cores, total = draw(st.integers(1, 256)), draw(BYTES)
    size = draw(BYTES)
    gpu = Gpu(name=draw(st.text()), total_bytes=size, free_bytes=draw(st.integers(0, size)), capability=(8, 9))
    limits = st.builds(
        Cgroup,
        version=st.sampled_from([1, 2]),
        memory_limit_bytes=st.none() | BYTES,
        memory_used_bytes=BYTES,
        cpu_quota=st.none() | st.floats(0.1, 512),
    )
    return Machine(
        name=draw(st.text()),
        physical_cores=cores,
        logical_cpus=draw(st.integers(cores, 512)),
        memory_total_bytes=total,
        memory_available_bytes=draw(st.integers(0, total)),
        cpu_features=frozenset(draw(st.lists(st.sampled_from(["avx2", "amx_bf16", "fma"])))),
        cgroup=draw(st.none() | limits),
        gpus=tuple([gpu] * draw(st.integers(0, 3))),
        gpu_problem=draw(st.none() | st.text()),
        thread_limit=draw(st.none() | st.integers(1, 64)),
        free_threaded=draw(st.booleans()),
        gil_enabled=draw(st.booleans()),
    )


@given(machines())
def test_written_and_read_it_is_the_same(original: Machine) -> None:
    assert Machine.from_dict(json.loads(json.dumps(original.to_dict()))) == original


@given(machines())
def test_never_more_than_is_free_or_allowed(one: Machine) -> None:
    assert 0 <= one.usable_memory_bytes <= one.memory_available_bytes
    if one.cgroup and one.cgroup.memory_limit_bytes is not None:
        assert one.usable_memory_bytes <= one.cgroup.memory_limit_bytes
    assert 1 <= one.usable_cores <= one.physical_cores


def test_the_control_group_counts_what_is_left_of_its_limit() -> None:
    tight = machine(cgroup=Cgroup(version=2, memory_limit_bytes=8 * GIB, memory_used_bytes=3 * GIB))
    assert tight.usable_memory_bytes == 5 * GIB
    full = machine(cgroup=Cgroup(version=2, memory_limit_bytes=8 * GIB, memory_used_bytes=9 * GIB))
    assert full.usable_memory_bytes == 0
    assert machine(cgroup=Cgroup(version=2)).usable_memory_bytes == 12 * GIB


@pytest.mark.parametrize(("quota", "cores"), [(None, 4), (0.5, 1), (1.5, 2), (3.0, 3), (64.0, 4)])
def test_a_part_of_a_processor_is_worth_a_thread(quota: float | None, cores: int) -> None:
    assert machine(cgroup=Cgroup(version=2, cpu_quota=quota)).usable_cores == cores


def test_bfloat16_needs_instructions_of_its_own() -> None:
    assert not machine(cpu_features=frozenset({"avx2", "avx512f", "avx512_vnni"})).has_cpu_bf16
    for feature in ("avx512_bf16", "amx_bf16"):
        assert machine(cpu_features=frozenset({"avx2", feature})).has_cpu_bf16


def test_a_file_may_write_sizes_as_people_do(tmp_path: Path) -> None:
    file = tmp_path / "machine.yaml"
    file.write_text(
        "name: small\nphysical_cores: 2\nlogical_cpus: 4\nmemory_total_bytes: 8GiB\nmemory_available_bytes: 1.5 GiB\n"
        "gpus: [{name: one, total_bytes: 4GB, free_bytes: 0, capability: [7, 5]}]\n"
    )
    read = load_machine(file)
    assert (read.memory_total_bytes, read.memory_available_bytes) == (8 * GIB, 3 * GIB // 2)
    assert read.gpus == (Gpu(name="one", total_bytes=4_000_000_000, free_bytes=0, capability=(7, 5)),)


def test_all_mistakes_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "machine.yaml"
    file.write_text(
        "name: small\nphysical_cores: 0\nlogical_cpus: 4\nmemory_total_bytes: 8 apples\nmemory_available_bytes: 1\n"
        "colour: red\ngpus: [{name: one, total_bytes: 4GB, capability: [7]}]\n"
    )
    with pytest.raises(UsageError) as caught:
        load_machine(file)
    fields = {problem.field for problem in caught.value.problems}
    assert fields == {
        *("physical_cores", "memory_total_bytes", "colour"),
        *("gpus.0.free_bytes", "gpus.0.capability.1"),
    }
    assert all(problem.file == str(file) for problem in caught.value.problems)
    lines = {problem.field: problem.line for problem in caught.value.problems}
    assert (lines["physical_cores"], lines["colour"], lines["gpus.0.capability.1"]) == (2, 6, 7)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"logical_cpus": 2}, "more physical cores"),
        ({"memory_available_bytes": 17 * GIB}, "more memory is available"),
        ({"gpus": [{"name": "g", "total_bytes": 1, "free_bytes": 2, "capability": [9, 0]}]}, "more memory free"),
    ],
)
def test_numbers_that_contradict_each_other_are_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        Machine.from_dict(machine().to_dict() | changes)


@pytest.mark.parametrize(
    "text", ["- a list", "just words", "{unclosed: [", "\x00", "a: 1\n" * 20_000, "{" * 60_000, "", "a: 1\na: 2"]
)
def test_what_describes_no_machine_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "machine.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_machine(file)
    assert str(file) in str(caught.value)


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="cannot be read"):
        load_machine(tmp_path / "none.yaml")


@pytest.mark.parametrize("file", sorted(Path("examples/machines").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_examples_are_machines(file: Path) -> None:
    assert load_machine(file).usable_memory_bytes > 16 * GIB
