"""The speeds that runs have achieved on this machine, kept in the cache directory for the next forecast.

A file for each model, machine and set of library versions, with what was measured last. Nothing depends on it: what
cannot be read or written is left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import cast

from pydantic import TypeAdapter, ValidationError

from pipeline.cache import cache_directory
from pipeline.errors import NotFoundError
from pipeline.forecast.forecast import Speed
from pipeline.spec.fingerprint import fingerprint_fields
from pipeline.spec.keys import JobSpec

_MOST_KEPT = 20  # of one key; the oldest goes
_SPEEDS = TypeAdapter(tuple[Speed, ...])
# Another input or seed gives answers of about the same length.
_NOT_OF_LENGTHS = ("input.path", "input.max_line", "input.id_field", "generation.seed", "generation.num_samples")


class SpeedBook:
    """What is known of the speed of one model on one machine (`Plan.speed_key`) with these library versions."""

    def __init__(self, key: Iterable[tuple[str, str]], versions: Mapping[str, str]) -> None:
        self._key = {**dict(key), **versions}

    def read(self) -> tuple[Speed, ...]:
        """The speeds that are known, oldest first; none where there is no file that can be read."""
        try:
            page = cast("object", json.loads(self._path.read_bytes()))
            if not isinstance(page, dict) or page.get("key") != self._key:  # pyright: ignore[reportUnknownMemberType]
                return ()
            return _SPEEDS.validate_python(cast("dict[str, object]", page)["speeds"])
        except (OSError, NotFoundError, ValueError, KeyError, ValidationError):
            return ()

    def write(self, speed: Speed) -> None:
        """Add a speed. Of two processes that write at the same time one may be forgotten."""
        speeds = [asdict(each) for each in (*self.read(), speed)][-_MOST_KEPT:]
        with suppress(OSError, NotFoundError):
            path = self._path
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_suffix(f".{os.getpid()}")
            try:
                new.write_text(json.dumps({"key": self._key, "speeds": speeds}, indent=1))
                new.replace(path)
            finally:
                new.unlink(missing_ok=True)

    @property
    def _path(self) -> Path:
        digest = sha256(json.dumps(self._key, sort_keys=True).encode()).hexdigest()
        return cache_directory() / "speeds" / f"{digest[:32]}.json"


def lengths_of(spec: JobSpec) -> str:
    """A digest of what shapes the length of answers, the prompts themselves apart."""
    fields = {key: value for key, value in fingerprint_fields(spec).items() if key not in _NOT_OF_LENGTHS}
    return sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
