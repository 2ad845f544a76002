"""Where things are kept that took work to make: embedded models, compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.errors import NotFoundError

CACHE_VARIABLE = "OVERNIGHT_CACHE"


def cache_directory() -> Path:
    """$OVERNIGHT_CACHE, or `overnight` in the user's cache directory. NotFoundError for a user who has no home."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).absolute()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if Path(shared).is_absolute():  # the XDG specification has others ignored
        return Path(shared) / "overnight"
    try:
        return Path.home() / ".cache" / "overnight"
    except RuntimeError:
        message = f"there is no home directory to keep models in; set {CACHE_VARIABLE} to a directory of yours"
        raise NotFoundError(message) from None
