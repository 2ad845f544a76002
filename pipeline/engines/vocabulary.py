"""What a model's token ids mean: their text, which of them end an answer, and which pads a batch."""
# pyright: basic

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline.engines.reply import Vocabulary
from pipeline.prompting.tokenizer import decode_answer

if TYPE_CHECKING:
    from pipeline.prompting.encoder import ThinkingTags


def vocabulary_of(model: Any, tokenizer: Any, thinking: ThinkingTags | None) -> Vocabulary:
    """The end tokens are those of the model's generation configuration and of its tokenizer."""
    generation_config = getattr(model, "generation_config", None)
    named = getattr(generation_config, "eos_token_id", None)
    end_ids = [*named] if isinstance(named, list | tuple) else [named]
    end_ids.append(tokenizer.eos_token_id)  # a chat model's end of turn is sometimes named here alone
    return Vocabulary(
        decode=partial(decode_answer, tokenizer),
        end_ids=frozenset(token for token in end_ids if token is not None),
        open_id=thinking.open_id if thinking else None,
        close_id=thinking.close_id if thinking else None,
    )


def pad_id_of(tokenizer: Any, vocabulary: Vocabulary) -> int:
    """Any id will do, since padding is hidden; a model may want it within its vocabulary."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(vocabulary.end_ids, default=0)
