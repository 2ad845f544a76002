"""Repacked weights: the same model, mapped; whole or made anew, whoever else makes them and whatever the disk does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.make_checkpoint import make_checkpoint
from pipeline.kernels.packed import LAYOUT
from pipeline.kernels.place import in_blocks
from pipeline.loading import load_model
from pipeline.loading.weight_files import Reader
from pipeline.plan.plan import Plan
from pipeline.plan.repack_cache import RepackCache
from tests.test_packed_loading import CONFIGS, plan_of, scores

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("repacked") / "m", CONFIGS["qwen3-next"], shard_bytes=200_000)


def keeping(directory: Path, cache: Path, made: Any = "first", **changes: Any) -> Plan:
    return plan_of(directory, repack_cache=RepackCache(str(cache), 1 << 20, made), **changes)


def entries(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


def weights(cache: Path) -> Path:
    (entry,) = entries(cache)
    return entry / "weights.safetensors"


@pytest.fixture
def no_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads weights of the checkpoint fails."""

    def read(*_: object) -> None:
        raise AssertionError("the checkpoint is read")

    monkeypatch.setattr("pipeline.loading.packed.CheckpointSource", read)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_is_the_same_mapped(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    made = make_checkpoint(tmp_path / "m", CONFIGS[name])
    wanted = load_model(plan_of(made)).model
    told: list[str] = []
    first = load_model(keeping(made, tmp_path / "cache"), report=told.append).model
    assert torch.equal(scores(first), scores(wanted))
    assert "kept repacked" in told[0]
    request.getfixturevalue("no_checkpoint")
    again = load_model(keeping(made, tmp_path / "cache"), report=told.append).model
    assert torch.equal(scores(again), scores(wanted))
    assert len(told) == 1
    assert {name for name, _ in again.named_modules()} == {name for name, _ in wanted.named_modules()}


@pytest.mark.parametrize("streamed", [1, 4])
def test_layers_are_streamed_from_repacked_weights(
    directory: Path, tmp_path: Path, streamed: int, request: pytest.FixtureRequest
) -> None:
    wanted = scores(load_model(plan_of(directory)).model)
    load_model(keeping(directory, tmp_path, num_streamed_layers=streamed))
    request.getfixturevalue("no_checkpoint")
    for made in ("first", "never"):
        model = load_model(keeping(directory, tmp_path, made, num_streamed_layers=streamed)).model
        kinds = [type(layer.mlp.experts).__name__ for layer in model.model.layers]  # type: ignore[union-attr]
        assert kinds.count("StreamedExperts") == streamed
        for _ in range(2):
            assert torch.equal(scores(model), wanted)


def test_any_safetensors_reader_reads_them(directory: Path, tmp_path: Path) -> None:
    model = load_model(keeping(directory, tmp_path)).model
    found = load_file(weights(tmp_path))
    assert torch.equal(found["model.norm.weight"], model.model.norm.weight)  # type: ignore[union-attr]
    codes = model.model.layers[0].mlp.experts.down_codes  # type: ignore[union-attr]
    assert torch.equal(found["model.layers.0.mlp.experts.down_codes"], codes)


def damaged(path: Path, kind: str) -> None:
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    if kind == "cut short":
        data = data[:-5]
    elif kind == "zeroed":
        data[8 + length :] = bytes(len(data) - 8 - length)
    elif kind == "header":
        data[9] ^= 255
    elif kind == "bit":
        data[8 + length + 17] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["cut short", "zeroed", "header", "bit", "no notes", "no manifest"])
def test_damaged_ones_are_noticed_and_made_anew(directory: Path, tmp_path: Path, kind: str) -> None:
    wanted = scores(load_model(keeping(directory, tmp_path)).model)
    path = weights(tmp_path)
    before = path.read_bytes()
    if kind.startswith("no "):
        path.with_name({"no notes": "weights.json", "no manifest": "manifest.json"}[kind]).unlink()
    else:
        damaged(path, kind)
        assert path.read_bytes() != before
    told: list[str] = []
    assert torch.equal(scores(load_model(keeping(directory, tmp_path), report=told.append).model), wanted)
    assert "kept repacked" in told[0]
    assert path.read_bytes() == before


def test_what_the_weights_depend_on_has_an_entry_of_its_own(directory: Path, tmp_path: Path) -> None:
    load_model(keeping(directory, tmp_path / "c"))
    load_model(keeping(directory, tmp_path / "c", dtype="bfloat16"))
    other = make_checkpoint(tmp_path / "m", CONFIGS["qwen3-next"], seed=2)
    load_model(keeping(other, tmp_path / "c"))
    assert len(entries(tmp_path / "c")) == 3


def test_those_of_another_layout_are_removed(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("keeping", "repacked"):
        monkeypatch.setattr(f"pipeline.loading.{module}.LAYOUT", LAYOUT + 1)
    load_model(keeping(directory, tmp_path))
    (old,) = entries(tmp_path)
    monkeypatch.undo()
    load_model(keeping(directory, tmp_path))
    assert entries(tmp_path) != [old]
    assert len(entries(tmp_path)) == 1


def test_the_layout_is_the_one_that_has_this_number() -> None:
    """Whoever changes how weights lie in memory raises LAYOUT, and then this test: kept files would be misread."""
    matrix = torch.arange(3 * 64, dtype=torch.int32).view(3, 64)
    assert LAYOUT == 1
    assert in_blocks(matrix).flatten()[[0, 31, 32, 95, 96, 191]].tolist() == [0, 31, 64, 159, 32, 191]


def test_a_disk_without_room_costs_nothing_but_the_next_start(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = scores(load_model(plan_of(directory)).model)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 1000}))
    told: list[str] = []
    model = load_model(keeping(directory, tmp_path), report=told.append).model
    assert torch.equal(scores(model), wanted)
    assert "not kept repacked" in told[0]
    assert entries(tmp_path) == []


def test_a_write_that_fails_leaves_nothing(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.loading.repacked._SYNC_BYTES", 1)
    monkeypatch.setattr("os.fdatasync", full)
    told: list[str] = []
    load_model(keeping(directory, tmp_path), report=told.append)
    assert "No space left" in told[0]
    assert entries(tmp_path) == []


def test_a_directory_that_cannot_be_made_is_told(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told: list[str] = []
    load_model(keeping(directory, tmp_path / "file" / "cache"), report=told.append)
    assert "not kept repacked" in told[0]


def test_beside_a_run_they_are_made_for_the_next(
    directory: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    import threading

    told: list[str] = []
    wanted = scores(load_model(keeping(directory, tmp_path, "beside"), report=told.append).model)
    for thread in threading.enumerate():
        if thread.name == "repacking":
            thread.join()
    assert "kept repacked" in told[0]
    request.getfixturevalue("no_checkpoint")
    assert torch.equal(scores(load_model(keeping(directory, tmp_path, "beside")).model), wanted)


@pytest.mark.slow
def test_a_process_that_ends_gives_up_what_it_was_making(directory: Path, tmp_path: Path) -> None:
    """A writer that is held up after its first piece: the process ends all the same, and nothing is left."""
    code = f"""
import sys, threading, time
sys.path.insert(0, {str(Path.cwd())!r})
import pipeline.loading.repacked as repacked
from tests.test_repacked import *
begun, write = threading.Event(), repacked._write
def slow(directory, model, num_bytes, progress):
    (directory / "x").write_text("")
    begun.set()
    while True:
        progress("", 0.0)
        time.sleep(0.01)
repacked._write = slow
load_model(keeping(Path({str(directory)!r}), Path({str(tmp_path)!r}), "beside"))
assert begun.wait(60)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert entries(tmp_path) == []


@pytest.mark.slow
def test_two_processes_that_make_the_same_end_with_one(directory: Path, tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(Path.cwd())!r})
from tests.test_repacked import *
plan = keeping(Path({str(directory)!r}), Path({str(tmp_path)!r}))
print(json.dumps(scores(load_model(plan).model)[0, -1, :5].tolist()))
"""
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said[0] == said[1] == scores(load_model(plan_of(directory)).model)[0, -1, :5].tolist()
    assert len(entries(tmp_path)) == 1


def test_a_cache_that_is_never_made_is_not(directory: Path, tmp_path: Path) -> None:
    load_model(keeping(directory, tmp_path, "never"))
    assert entries(tmp_path) == []


def test_direct_reads_give_what_buffered_ones_do(directory: Path, tmp_path: Path) -> None:
    """Past the page cache, with ends that no block of the disk begins at."""
    from pipeline.facts.checkpoint import open_checkpoint
    from pipeline.loading.weight_files import Plain, stored_tensors

    found: list[list[torch.Tensor]] = []
    for past_cache in (False, True):
        stored = [one for one in stored_tensors(open_checkpoint(directory)).values() if one.dtype == "BF16"]
        targets = [torch.zeros(one.shape, dtype=torch.bfloat16) for one in stored]
        with Reader(past_cache=past_cache) as reader:
            reader.read(
                [Plain("x", one, target) for one, target in zip(stored, targets, strict=True)], lambda _size: None
            )
        found.append(targets)
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))
    assert any(target.any() for target in found[0])
