"""Makes repacked weights as the plan says: before the model is loaded, or beside the run and given up at its end."""
# pyright: basic

from __future__ import annotations

import atexit
import contextlib
import hashlib
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import OvernightError
from pipeline.kernels.packed import LAYOUT
from pipeline.loading.repacked import RepackedSource, keep_repacked, open_repacked
from pipeline.plan.repack_cache import RepackCache

_JOIN_S = 5.0  # that the end of the process waits for a piece to be written


class _GivenUpError(Exception):
    """The process came to its end first."""


class Keeping:
    """The place of a model's repacked weights; `identity` is all that they depend on but the kernels' layout.

    What goes wrong costs the next start time and this run nothing: `report` is told, and the checkpoint is read.
    """

    def __init__(self, cache: RepackCache, identity: str, report: Callable[[str], object]) -> None:
        self._cache = cache
        self._report = report
        key = hashlib.sha256(f"{identity} {LAYOUT}".encode()).hexdigest()[:32]
        self._entry = Path(cache.directory) / key

    @property
    def comes_first(self) -> bool:
        return self._cache.made == "first"

    def open(self) -> RepackedSource | None:
        """What is kept, or None."""
        return open_repacked(self._entry)

    def make(self, model: Any, progress: Callable[[str, float], None] = lambda _stage, _part: None) -> None:
        """Write the weights of a model."""
        try:
            keep_repacked(self._entry, model, progress)
        except (OvernightError, OSError) as error:
            self._report(f"the weights are not kept repacked: {error}")
        else:
            self._report(f"the weights are kept repacked in {self._entry}; the next start maps them")

    def make_beside(self, model: Any) -> None:
        """The same in a thread of its own while the model works, if the plan says so and the disk has ample room.

        The end of the process ends it, and what is not whole then is gone.
        """
        if self._cache.made != "beside" or not self._has_room():
            return
        ended = threading.Event()

        def progress(_stage: str, _part: float) -> None:
            if ended.is_set():
                raise _GivenUpError

        def run() -> None:
            with contextlib.suppress(_GivenUpError):
                self.make(model, progress)

        thread = threading.Thread(target=run, name="repacking", daemon=True)

        def end() -> None:
            ended.set()
            thread.join(_JOIN_S)

        atexit.register(end)
        thread.start()

    def _has_room(self) -> bool:
        place = self._entry
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free >= 2 * self._cache.num_bytes
