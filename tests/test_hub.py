"""Models from a hub that answers, that fails, that is out of reach, and from its cache."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import MachineError, NotFoundError, SpecError
from pipeline.loading.resolve import find_model
from pipeline.spec.keys import ModelSpec
from tests.model_files import LLAMA, write_model

GIB = 1 << 30
NAME = "some-org/some-model"


def find(path: str, **options: Any) -> Path:
    config_only = options.pop("config_only", False)
    return find_model(ModelSpec(path=path, **options), config_only=config_only, report=lambda _: None)


FILES = {
    **{"config.json": 700, "generation_config.json": 100, "tokenizer.json": 7_000_000, "tokenizer_config.json": 3000},
    **{"model.safetensors.index.json": 5000, "model-00001-of-00002.safetensors": 20 * GIB, "chat_template.jinja": 900},
    **{"model-00002-of-00002.safetensors": 21 * GIB, "pytorch_model.bin": 160 * GIB, "modeling_x.py": 2000},
    **{"original/consolidated.safetensors": 160 * GIB, "README.md": 1000, "onnx/model.onnx": GIB},
}
WANTED = {
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
}


@dataclass
class FakeHub:
    """A hub with one model; `fault` is raised by whatever asks it, and downloads are noted, not made."""

    files: dict[str, int]
    fault: Exception | None = None
    download_fault: Exception | None = None
    free_bytes: int = 1000 * GIB

    def __post_init__(self) -> None:
        self.downloads: list[set[str]] = []
        self.asked = 0

    def model_info(self, *_args: object, **_options: object) -> SimpleNamespace:
        self.asked += 1
        if self.fault:
            raise self.fault
        siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in self.files.items()]
        return SimpleNamespace(sha="abc", siblings=siblings)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    import huggingface_hub

    fake = FakeHub(dict(FILES))
    real = huggingface_hub.snapshot_download

    def snapshot_download(name: str, **options: Any) -> str:
        if options.get("local_files_only"):
            return real(name, cache_dir=cache, **options)
        if fake.download_fault:
            raise fake.download_fault
        fake.downloads.append(set(options["allow_patterns"]))
        assert options["revision"] == "abc"
        return str(cached(cache))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "model_info", lambda _self, *args, **more: fake.model_info(*args, **more)
    )
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_args, **_options: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=fake.free_bytes))
    return fake


def cached(cache: Path, *, whole: bool = True) -> Path:
    """A snapshot as the hub's own cache lays it out."""
    repository = cache / "models--some-org--some-model"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text("abc")
    snapshot = repository / "snapshots" / "abc"
    if whole:
        write_model(snapshot, LLAMA, num_shards=2)
        (snapshot / "tokenizer.json").write_text("{}")
    else:
        snapshot.mkdir(parents=True, exist_ok=True)
        (snapshot / "config.json").write_text(json.dumps(LLAMA))
    return snapshot


def test_only_what_a_run_reads_is_downloaded(hub: FakeHub) -> None:
    assert (find(NAME) / "config.json").exists()
    assert hub.downloads == [WANTED]


def test_code_is_downloaded_only_if_it_is_trusted(hub: FakeHub) -> None:
    find(NAME, trust_remote_code=True)
    assert hub.downloads == [WANTED | {"modeling_x.py"}]


def test_a_plan_downloads_the_configuration_alone(hub: FakeHub) -> None:
    hub.free_bytes = 2 * GIB  # too little for the weights
    find(NAME, config_only=True)
    assert hub.downloads == [{"config.json"}]


def test_a_model_that_is_here_is_taken_without_asking_the_hub(hub: FakeHub, cache: Path) -> None:
    hub.fault = OSError("the network is down")
    snapshot = cached(cache)
    assert find(NAME) == snapshot
    assert (hub.asked, hub.downloads) == (0, [])


def test_a_model_that_is_partly_here_is_completed(hub: FakeHub, cache: Path) -> None:
    part = cached(cache, whole=False)
    assert find(NAME, config_only=True) == part
    assert hub.asked == 0
    find(NAME)
    assert hub.downloads == [WANTED]


def test_missing_shards_are_noticed_before_a_model_is_taken_for_whole(hub: FakeHub, cache: Path) -> None:
    (cached(cache) / "model-00002-of-00002.safetensors").unlink()
    find(NAME)
    assert hub.downloads == [WANTED]


def test_a_disk_that_is_too_small_is_told_before_the_download(hub: FakeHub) -> None:
    hub.free_bytes = 41 * GIB + GIB // 2  # the files fit; the rest of what uses the disk would not
    with pytest.raises(MachineError, match=r"needs 41\.0 GiB more of disk") as caught:
        find(NAME)
    assert "hf download" in str(caught.value)
    assert hub.downloads == []


@pytest.mark.parametrize("when", ["asking", "downloading"])
@pytest.mark.parametrize("partly", [False, True])
def test_out_of_reach_is_said_in_plain_words(hub: FakeHub, cache: Path, when: str, partly: bool) -> None:
    if partly:
        cached(cache, whole=False)
    fault = ConnectionError("Name or service not known\nand more")
    hub.fault, hub.download_fault = (fault, None) if when == "asking" else (None, fault)
    with pytest.raises(NotFoundError) as caught:
        find(NAME)
    message = str(caught.value)
    assert f"{NAME} {'is only partly' if partly else 'is not'} on this machine" in message
    assert "(Name or service not known)" in message
    assert "run the same command again" in message


def test_the_transport_library_of_the_hub_may_fail_too(hub: FakeHub) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    transport = next(base for base in HfHubHTTPError.__bases__ if base is not OSError)
    error = transport.__new__(transport)
    hub.fault = error
    with pytest.raises(NotFoundError, match="cannot be reached"):
        find(NAME)


def test_with_no_hub_at_all_the_answer_comes_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(NotFoundError, match="is not on this machine, and the hub cannot be reached"):
        find(NAME)


def hub_error(name: str) -> Exception:
    from huggingface_hub import errors

    error = getattr(errors, name)
    return error.__new__(error)


@pytest.mark.parametrize(
    ("name", "field", "advice"),
    [
        ("RepositoryNotFoundError", "model.path", "neither a directory here nor a model on the hub"),
        ("GatedRepoError", "model.path", "accept its terms"),
        ("RevisionNotFoundError", "model.revision", "has no revision 'v9'"),
    ],
)
def test_what_the_hub_does_not_have_is_told_by_kind(hub: FakeHub, name: str, field: str, advice: str) -> None:
    hub.fault = hub_error(name)
    with pytest.raises(NotFoundError, match=advice) as caught:
        find(NAME, revision="v9")
    assert caught.value.problems[0].field == field


@pytest.mark.parametrize(
    ("missing", "error", "reason"),
    [("config.json", NotFoundError, r"has no config\.json"), ("safetensors", SpecError, "no safetensors weights")],
)
def test_a_repository_of_something_else_is_refused(
    hub: FakeHub, missing: str, error: type[Exception], reason: str
) -> None:
    hub.files = {name: size for name, size in FILES.items() if missing not in name}
    with pytest.raises(error, match=reason):
        find(NAME)
    assert hub.downloads == []
