"""Load a model's own tokenizer, and find the tags between which the model reasons."""

# pyright: basic
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import NotFoundError, OvernightError, Problem, SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Pairs that models reason between; in each model of its family both are single tokens.
_REASONING_TAGS = (
    ("<think>", "</think>"),  # Qwen3, DeepSeek-R1, GLM-4.5, SmolLM3, MiniMax, Nemotron, ...
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<longcat_think>", "</longcat_think>"),  # LongCat-Flash-Thinking
)


@dataclass(frozen=True, slots=True)
class ThinkingTags:
    """The two tokens between which a model reasons."""

    open_id: int
    close_id: int
    open_text: str
    close_text: str


def find_thinking(tokenizer: PreTrainedTokenizerFast) -> ThinkingTags | None:
    """The reasoning tags of this vocabulary; None where it has no such pair of single tokens."""
    backend = tokenizer.backend_tokenizer
    for open_text, close_text in _REASONING_TAGS:
        open_id, close_id = backend.token_to_id(open_text), backend.token_to_id(close_text)
        if open_id is None or close_id is None:
            continue
        # In the vocabulary is not enough: the model must be able to read the text as that token.
        ids = backend.encode(f"{open_text}\n\n{close_text}", add_special_tokens=False).ids
        if open_id in ids and close_id in ids:
            return ThinkingTags(open_id, close_id, open_text, close_text)
    return None


def decode_answer(tokenizer: PreTrainedTokenizerFast, token_ids: Sequence[int]) -> str:
    """The text of generated tokens without special tokens and without tidied spaces."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)  # for one row of tokens
    return text


def load_tokenizer(model_dir: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a local model directory, without any network.

    Raises NotFoundError where the directory has no tokenizer or a damaged one; SpecError where the tokenizer is the
    model's own Python code and `trust_remote_code` is off, or has no fast form (speed, and the guard against forged
    control tokens, need one).
    """
    if not model_dir.is_dir():
        raise NotFoundError(_problem("no such directory", model_dir))
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(model_dir), local_files_only=True, trust_remote_code=trust_remote_code
        )
    # transformers, tokenizers and a model's own code raise anything here, from KeyError to bare Exception.
    except Exception as error:
        raise _loading_error(model_dir, trust_remote_code, error) from error
    if not getattr(tokenizer, "is_fast", False):
        message = f"its tokenizer ({type(tokenizer).__name__}) has no fast form; add the model's tokenizer.json"
        raise SpecError(_problem(message, model_dir))
    # Where the files are missing, transformers builds a tokenizer that knows its special tokens and no other.
    own_tokens = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    if own_tokens.keys() <= {token.content for token in tokenizer.added_tokens_decoder.values()}:
        raise NotFoundError(_problem("has no tokenizer: no tokenizer.json nor another vocabulary file", model_dir))
    return tokenizer


def _loading_error(model_dir: Path, trust_remote_code: bool, error: Exception) -> OvernightError:
    if not trust_remote_code and _has_own_code(model_dir):
        message = f"{model_dir}: this tokenizer is Python code of the model; it runs only if this is set to true"
        return SpecError(Problem(message, field="model.trust_remote_code"))
    if not any(model_dir.glob("*token*")) and not any(model_dir.glob("*vocab*")):
        return NotFoundError(_problem("has no tokenizer: no tokenizer.json nor another vocabulary file", model_dir))
    reason = " ".join(str(error).split())[:300]
    message = f"its tokenizer cannot be read ({type(error).__name__}: {reason}); copy the model's files again"
    return NotFoundError(_problem(message, model_dir))


def _has_own_code(model_dir: Path) -> bool:
    for name in ("tokenizer_config.json", "config.json"):
        try:
            config = json.loads((model_dir / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(config, dict) and config.get("auto_map"):
            return True
    return False


def _problem(message: str, model_dir: Path) -> Problem:
    return Problem(f"{model_dir}: {message}", field="model.path")
