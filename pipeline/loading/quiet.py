"""Keeps the talk of the model libraries from the user, whose plan has already decided what they give advice about."""
# pyright: basic

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Generator

_LOGGERS = ("transformers", "autoround", "accelerate", "huggingface_hub")


@contextlib.contextmanager
def quiet_libraries(*, show_progress: bool = False) -> Generator[None]:
    """Within the block errors are logged and nothing else; bars are drawn only if wanted.

    Without bars stdout and stderr lead nowhere, since auto-round draws its own whatever one asks: what is meant for the
    user must be said outside the block.
    """
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    had_bars = transformers_logging.is_progress_bar_enabled()
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(logging.ERROR)
            stack.callback(logger.setLevel, level)
        if not show_progress:
            transformers_logging.disable_progress_bar()
            if had_bars:
                stack.callback(transformers_logging.enable_progress_bar)
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        yield
