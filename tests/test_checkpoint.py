"""A model directory is judged before anything in it is used: what may run code, reach outside, or lie, is refused."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import NotFoundError, OvernightError, SpecError
from pipeline.facts.checkpoint import open_checkpoint
from tests.model_files import INT4, LLAMA, QWEN3_NEXT, expected_tensors, write_model, write_shard

WEIGHTS = "model.safetensors"


def header(entries: object, data: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int, end: int, *, dtype: object = "F32", shape: object = (1,)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("num_shards", [1, 3])
def test_all_tensors_of_all_shards_are_seen(tmp_path: Path, num_shards: int) -> None:
    config = QWEN3_NEXT | {"quantization_config": INT4}
    checkpoint = open_checkpoint(write_model(tmp_path, config, num_shards=num_shards))
    assert len(checkpoint.shards) == num_shards
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors()} == expected_tensors(config)
    assert checkpoint.config == config


def test_a_configuration_alone_is_a_checkpoint_without_shards(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert open_checkpoint(tmp_path).shards == ()


def refused(directory: Path, error: type[OvernightError]) -> str:
    with pytest.raises(error) as caught:
        open_checkpoint(directory)
    assert type(caught.value) is error
    assert all(problem.field == "model.path" for problem in caught.value.problems)
    return str(caught.value)


HOSTILE: dict[str, bytes] = {
    "header longer than any model needs": struct.pack("<Q", 1 << 40) + b"{}",
    "nesting without end": header(b'{"a":' + b"[" * 200_000),
    "a name twice": header(b'{"a":%b,"a":%b}' % ((json.dumps(entry(0, 4)).encode(),) * 2), bytes(4)),
    "overlapping tensors": header({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6)),
    "a gap between tensors": header({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)),
    "a size that is not that of the shape": header({"a": entry(0, 8)}, bytes(8)),
    "a negative place": header({"a": entry(-4, 0)}),
    "places the wrong way round": header({"a": entry(4, 0)}, bytes(4)),
    "a shape whose product overflows": header({"a": entry(0, 4, shape=[1 << 40, 1 << 40])}, bytes(4)),
    "a shape of words": header({"a": entry(0, 4, shape=["1"])}, bytes(4)),
    "a shape of booleans": header({"a": entry(0, 4, shape=[True])}, bytes(4)),
    "no dtype": header({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "an entry that is a list": header({"a": [0, 4]}, bytes(4)),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_headers_that_lie_are_refused(tmp_path: Path, content: bytes) -> None:
    write_model(tmp_path, LLAMA)
    (tmp_path / WEIGHTS).write_bytes(content)
    assert WEIGHTS in refused(tmp_path, SpecError)


DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "a few bytes": b"\x08\0\0",
    "cut within the header": struct.pack("<Q", 100) + b'{"a"',
    "cut within the data": header({"a": entry(0, 4)}, bytes(3)),
    "bytes after the data": header({"a": entry(0, 4)}, bytes(5)),
    "no JSON": header(b"not json"),
    "a list": header([]),
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_weights_are_not_a_model(tmp_path: Path, content: bytes) -> None:
    write_model(tmp_path, LLAMA)
    (tmp_path / WEIGHTS).write_bytes(content)
    assert WEIGHTS in refused(tmp_path, NotFoundError)


@given(data=st.data())
def test_a_file_cut_anywhere_or_flipped_in_its_header_is_never_misread(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever is done to a header, it is refused in our own words or still describes the file exactly."""
    directory = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text("{}")
    path = directory / WEIGHTS
    write_shard(path, {"a": ("BF16", (4, 2)), "b.qweight": ("I32", (2, 3)), "c": ("F32", ())})
    content = bytearray(path.read_bytes())
    length = 8 + struct.unpack("<Q", content[:8])[0]
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content[data.draw(st.integers(0, length - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        checkpoint = open_checkpoint(directory)
    except (SpecError, NotFoundError):
        return
    sizes = [tensor.num_bytes for _, tensor in checkpoint.tensors()]
    assert sum(sizes) + length == len(content)


def add_python(directory: Path) -> None:
    (directory / "modeling_llama.py").write_text("import os")


def add_python_in_a_folder(directory: Path) -> None:
    (directory / "code").mkdir()
    (directory / "code" / "model.py").write_text("import os")


def add_auto_map(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps({**LLAMA, "auto_map": {"AutoModel": "modeling.Model"}}))


def add_auto_map_of_the_tokenizer(directory: Path) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["t.T", None]}}))


CODE = (add_python, add_python_in_a_folder, add_auto_map, add_auto_map_of_the_tokenizer)


@pytest.mark.parametrize("add", CODE)
def test_code_is_refused_unless_it_is_trusted(tmp_path: Path, add: Callable[[Path], None]) -> None:
    add(write_model(tmp_path, LLAMA))
    assert "trust_remote_code" in refused(tmp_path, SpecError)
    assert open_checkpoint(tmp_path, trust_remote_code=True).shards


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.ckpt", "weights.pkl"])
def test_pickled_weights_are_refused_even_if_code_is_trusted(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(SpecError, match="pickled"):
        open_checkpoint(tmp_path, trust_remote_code=True)


def test_pickles_beside_safetensors_are_left_alone(tmp_path: Path) -> None:
    write_model(tmp_path, LLAMA)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert [shard.path.name for shard in open_checkpoint(tmp_path).shards] == [WEIGHTS]


def test_a_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    model = write_model(tmp_path / "model", LLAMA)
    (model / "tokenizer.json").symlink_to(secret)
    assert "outside the model directory" in refused(model, SpecError)


def test_links_within_the_directory_and_to_it_are_fine(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", LLAMA)
    (model / "again.json").symlink_to(model / "config.json")
    (tmp_path / "link").symlink_to(model)
    assert open_checkpoint(tmp_path / "link").shards


def test_the_hub_cache_links_to_its_blobs(tmp_path: Path) -> None:
    snapshot = write_model(tmp_path / "models--a--b" / "snapshots" / "0123", LLAMA)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    os.replace(snapshot / WEIGHTS, blobs / "feed")  # noqa: PTH105
    (snapshot / WEIGHTS).symlink_to(Path("../../blobs/feed"))
    assert open_checkpoint(snapshot).shards
    os.replace(blobs / "feed", tmp_path / "feed")  # noqa: PTH105
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to(tmp_path / "feed")
    assert "outside" in refused(snapshot, SpecError)


def test_only_the_hub_cache_may_link_to_blobs(tmp_path: Path) -> None:
    model = write_model(tmp_path / "a" / "model", LLAMA)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "secret").write_text("{}")
    (model / "tokenizer.json").symlink_to(tmp_path / "blobs" / "secret")
    assert "outside" in refused(model, SpecError)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin", 7])
def test_an_index_may_only_name_files_beside_it(tmp_path: Path, file: object) -> None:
    write_model(tmp_path, LLAMA)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    assert "no safetensors file beside it" in refused(tmp_path, SpecError)


def test_what_an_index_promises_and_is_not_there_is_told_all_at_once(tmp_path: Path) -> None:
    model = write_model(tmp_path, LLAMA, num_shards=3)
    (model / "model-00001-of-00003.safetensors").unlink()
    write_shard(model / "model-00003-of-00003.safetensors", {})
    message = refused(model, NotFoundError)
    assert "model-00001-of-00003.safetensors: model.path: cannot be read" in message
    assert "model-00003-of-00003.safetensors: model.path: lacks" in message


def test_a_configuration_that_says_two_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"auto_map": {}, "auto_map": {}}')
    assert "a name appears twice" in refused(tmp_path, SpecError)


@pytest.mark.parametrize("content", ["", "[]", "{", "\xff"])
def test_a_configuration_that_is_no_object_is_not_found(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert "config.json" in refused(tmp_path, NotFoundError)


def test_a_directory_is_read_once_and_again_when_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path, LLAMA)
    first = open_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path) is first
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LLAMA | {"rope_theta": 1.0}))
    assert open_checkpoint(tmp_path).config["rope_theta"] == 1.0
    (tmp_path / "pickled.py").write_text("")
    with pytest.raises(SpecError):
        open_checkpoint(tmp_path)
