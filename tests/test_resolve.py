"""Finding local and embedded models, and telling one model from another."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import NotFoundError, SpecError
from pipeline.loading.resolve import find_model, model_identity
from pipeline.spec.keys import ModelSpec
from tests.model_files import LLAMA, write_model


def find(path: str, **options: Any) -> Path:
    config_only = options.pop("config_only", False)
    return find_model(ModelSpec(path=path, **options), config_only=config_only, report=lambda _: None)


def test_a_local_directory_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "org" / "model", LLAMA)
    assert find(str(model)) == model
    monkeypatch.chdir(tmp_path)
    assert find("org/model") == Path("org/model")  # before a hub model of that name
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find("~/org/model") == model


@pytest.mark.parametrize(
    ("path", "advice"),
    [
        ("./missing", "no such directory"),
        ("/missing/too", "no such directory"),
        ("missing", "named ORGANIZATION/NAME"),
        ("a/b/c", "no such directory"),
        ("model.gguf", "is a file"),
        ("empty", "no config.json in it"),
    ],
)
def test_what_is_no_model_directory_is_said_to_be_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, advice: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(NotFoundError, match=advice) as caught:
        find(path)
    assert (caught.value.exit_code, caught.value.problems[0].field) == (66, "model.path")
    assert path in str(caught.value)


def test_a_revision_of_what_has_none_is_refused(tmp_path: Path) -> None:
    for path in (str(write_model(tmp_path, LLAMA)), "builtin:smollm2-135m"):
        with pytest.raises(SpecError) as caught:
            find(path, revision="main")
        assert caught.value.problems[0].field == "model.revision"


def test_embedded_models_are_prepared_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, object]] = []

    def prepare(name: str, *, progress: object) -> Path:
        asked.append((name, progress))
        return tmp_path

    monkeypatch.setattr("pipeline.loading.builtin.prepare_builtin", prepare)
    assert find("builtin:some-name") == tmp_path
    assert asked == [("some-name", None)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = write_model(tmp_path / "model", LLAMA, num_shards=2)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


def test_identity_is_of_the_content_not_of_the_place_or_time(model: Path, tmp_path: Path) -> None:
    before = model_identity(model)
    copy = tmp_path / "elsewhere"
    shutil.copytree(model, copy)
    (copy / "README.md").write_text("a note")
    (copy / "manifest.json").write_text('{"made": "today"}')
    os.utime(copy / "config.json", (1, 1))
    assert model_identity(copy) == before
    assert len(before) == 64


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def rename(model: Path) -> None:
    index = model / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002-of", "model-00003-of"))
    (model / "model-00002-of-00002.safetensors").rename(model / "model-00003-of-00002.safetensors")


CHANGES: dict[str, Callable[[Path], object]] = {
    "configuration": lambda model: (model / "config.json").write_text(json.dumps(LLAMA | {"rope_theta": 5e5})),
    "tokenizer": lambda model: (model / "tokenizer.json").write_text("{ }"),
    "template": lambda model: (model / "chat_template.jinja").write_text("{{ messages }} "),
    "a new template": lambda model: (model / "chat_template.json").write_text("{}"),
    "sampling defaults": lambda model: (model / "generation_config.json").write_text("{}"),
    "a tensor's name": lambda model: flip(model / "model-00001-of-00002.safetensors", 40),
    "a weight": lambda model: flip(model / "model-00002-of-00002.safetensors", -4000),
    "names of files": rename,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_identity_changes_with_whatever_changes_answers(model: Path, change: Callable[[Path], object]) -> None:
    before = model_identity(model)
    change(model)
    try:
        assert model_identity(model) != before
    except NotFoundError:  # a damaged file is not identified at all
        assert change is CHANGES["a tensor's name"]
