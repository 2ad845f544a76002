"""A model directory gives its tokenizer or says what is wrong with it; reasoning tags come from the vocabulary."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from pipeline.errors import NotFoundError, SpecError
from pipeline.prompting.tokenizer import find_thinking, load_tokenizer
from tests.tokenizer_families import FAMILIES, family


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    family("qwen").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_tokenizer_is_loaded_as_it_was(name: str, tmp_path: Path) -> None:
    saved = family(name)
    saved.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    text = "hello world <think> [SEP] <|im_end|>\n\n x"
    assert loaded(text)["input_ids"] == saved(text)["input_ids"]
    assert loaded.chat_template == saved.chat_template


def test_loading_needs_no_network(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert load_tokenizer(model_dir)


def test_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"model\.path: .*nowhere: no such directory"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("config", [None, {"model_type": "qwen3"}, {"model_type": "llama"}])
def test_a_directory_without_a_tokenizer(tmp_path: Path, config: dict[str, str] | None) -> None:
    # transformers makes up a tokenizer of a few special tokens for some of these.
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotFoundError, match=r"model\.path: .*no tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["{", '{"model": 3}', "[]", ""])
def test_a_damaged_tokenizer_file(model_dir: Path, text: str) -> None:
    (model_dir / "tokenizer.json").write_text(text)
    with pytest.raises(NotFoundError, match=r"model\.path: .*cannot be read") as caught:
        load_tokenizer(model_dir)
    assert len(caught.value.problems) == 1
    assert "\n" not in str(caught.value)


def test_the_models_own_code_is_not_run_unasked(tmp_path: Path) -> None:
    trace = tmp_path / "was-run"
    model_dir = tmp_path / "model"
    model_dir.mkdir()
    (model_dir / "config.json").write_text(json.dumps({"model_type": "strange"}))
    auto_map = {"AutoTokenizer": ["own.OwnTokenizer", None]}
    (model_dir / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "OwnTokenizer", "auto_map": auto_map})
    )
    (model_dir / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(trace)!r}).touch()\nclass OwnTokenizer: ...\n"
    )
    with pytest.raises(SpecError, match=r"model\.trust_remote_code: .*Python code"):
        load_tokenizer(model_dir)
    assert not trace.exists()


def test_a_slow_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CanineTokenizer"}))
    with pytest.raises(SpecError, match=r"model\.path: .*no fast form"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "close_text"),
    [("qwen", "</think>"), ("deepseek", "</think>"), ("mistral", "[/THINK]"), ("smollm2", None), ("gpt2", None)],
)
def test_reasoning_tags_are_single_tokens_of_the_vocabulary(name: str, close_text: str | None) -> None:
    tokenizer = family(name)
    tags = find_thinking(tokenizer)
    if close_text is None:
        assert tags is None
        return
    assert tags is not None
    assert tags.close_text == close_text
    assert tokenizer.encode(f"a{tags.open_text}b{tags.close_text}", add_special_tokens=False).count(tags.close_id) == 1
    assert tokenizer.convert_ids_to_tokens(tags.open_id) == tags.open_text


def test_a_tag_that_text_is_never_read_as_is_none(model_dir: Path) -> None:
    data = json.loads((model_dir / "tokenizer.json").read_text())
    data["added_tokens"] = [token for token in data["added_tokens"] if "think" not in token["content"]]
    size = len(data["model"]["vocab"])
    data["model"]["vocab"] |= {"<think>": size + 50, "</think>": size + 51}
    (model_dir / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = load_tokenizer(model_dir)
    assert tokenizer.backend_tokenizer.token_to_id("</think>") is not None
    assert find_thinking(tokenizer) is None
