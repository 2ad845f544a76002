"""What it means that experts are read from disk for every pass of a model: bytes, seconds, and how wide a step is."""

from __future__ import annotations

from dataclasses import dataclass

STEP_TOKENS = 1024  # of prompts and answers in one step; with 512 a CPU with AMX was 5 % slower over prompts
WIDE_STEP_TOKENS = (
    2048  # where a step costs much whatever its width: a reading of the disk, a GPU that waits for Python
)
ASSUMED_BYTES_PER_S = 1_000_000_000  # of a disk that was not measured
CHECK_PASSES = 6  # before the first answer: one tries the native forms of layers, five check the packing


@dataclass(frozen=True, slots=True)
class Streaming:
    """Experts of some layers, read anew by every pass, each layer ahead of need."""

    bytes_per_pass: int
    bytes_once: int  # of the files: all that is read only when the model is loaded
    bytes_per_s: int
    is_measured: bool  # that speed, and not assumed

    @property
    def pass_s(self) -> float:
        """Seconds of reading for one pass, and so for one token of each sequence."""
        return self.bytes_per_pass / self.bytes_per_s

    @property
    def load_s(self) -> float:
        """Seconds of reading until the first answer may begin."""
        return self.bytes_once / self.bytes_per_s + CHECK_PASSES * self.pass_s
