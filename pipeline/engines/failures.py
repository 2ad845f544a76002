"""What an exception out of a model means for the requests it was computing."""
# pyright: basic

from __future__ import annotations

from pipeline.records import ItemError

NOT_FINITE = ItemError("engine_error", "the model's scores for the next token are not numbers (NaN or infinite)")


def item_error(exception: Exception, num_tokens: int, num_tokens_to_come: int) -> ItemError:
    """The answer to a request that fails alone: `out_of_memory` or `engine_error`."""
    if is_out_of_memory(exception):
        message = f"{num_tokens} tokens and up to {num_tokens_to_come} more need more memory than there is"
        return ItemError("out_of_memory", f"{message}; shorten the prompt or lower max_new_tokens")
    return ItemError("engine_error", f"the model failed on this prompt: {type(exception).__name__}: {exception}")


def is_out_of_memory(exception: Exception) -> bool:
    import torch

    if isinstance(exception, MemoryError | torch.OutOfMemoryError):
        return True
    # The allocator for CPU memory raises a plain RuntimeError.
    return isinstance(exception, RuntimeError) and "DefaultCPUAllocator" in str(exception)


def is_fatal(exception: Exception) -> bool:
    """After an error of the device itself every further call fails: the process has to end, the run can resume."""
    import torch

    return isinstance(exception, torch.AcceleratorError) and not is_out_of_memory(exception)
