"""How far a run is, for people: a bar on a terminal or in a notebook, else a plain line now and then; or nothing."""

from __future__ import annotations

import sys
import time
import warnings
from typing import TYPE_CHECKING, Any, TextIO

from pipeline import talk

if TYPE_CHECKING:
    from tqdm import tqdm

    from pipeline.summary import Tally

_FIRST_LINE_S = 10.0
_LINE_EVERY_S = 60.0


class Progress:
    """Shows what is committed of `num_answers`; rates count this session only."""

    def __init__(self, num_answers: int, before: Tally, *, quiet: bool, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._num_answers = num_answers
        self._answers_before = before.completed + before.failed
        self._tokens_before = before.output_tokens
        self._started = time.monotonic()
        self._next_line_s = _FIRST_LINE_S
        self._quiet = quiet
        self._bar: tqdm[Any] | None = None
        if not quiet and (bar := _bar_class(self._stream)) is not None:
            self._bar = bar(
                total=num_answers, initial=self._answers_before, unit=" items", file=self._stream, dynamic_ncols=True
            )
            self._bar.set_postfix_str("0 tok/s")

    def show(self, tally: Tally) -> None:
        if self._quiet:
            return
        elapsed_s = time.monotonic() - self._started
        done = tally.completed + tally.failed
        tokens_per_s = (tally.output_tokens - self._tokens_before) / elapsed_s if elapsed_s > 0 else 0.0
        if self._bar is not None:
            failures = f", {tally.failed} failed" if tally.failed else ""
            self._bar.set_postfix_str(f"{tokens_per_s:.1f} tok/s{failures}", refresh=False)
            self._bar.update(done - self._bar.n)
        elif elapsed_s >= self._next_line_s:
            self._next_line_s = elapsed_s + _LINE_EVERY_S
            rate = (done - self._answers_before) / elapsed_s
            left = _clock((self._num_answers - done) / rate) if rate > 0 else "unknown"
            share = 100 * done / self._num_answers if self._num_answers else 100.0
            if talk.is_json():
                talk.log(
                    "progress",
                    done=done,
                    total=self._num_answers,
                    failed=tally.failed,
                    output_tokens=tally.output_tokens,
                    tokens_per_second=round(tokens_per_s, 3),
                    left=left,
                )
                return
            self._stream.write(
                f"{done}/{self._num_answers} items ({share:.1f} %), {tokens_per_s:.1f} tok/s, "
                f"{tally.failed} failed, {left} left\n"
            )
            self._stream.flush()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Preparation:
    """How far a model is that is made before its first use: a bar on a terminal, a line for each stage elsewhere."""

    def __init__(self, *, quiet: bool, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._quiet = quiet
        self._stage = ""
        self._bar: tqdm[Any] | None = None

    def __call__(self, stage: str, fraction: float) -> None:
        """`fraction` (0 to 1) of the whole is done, and `stage` is what is being done now."""
        if self._quiet:
            return
        if self._bar is None and (bar := _bar_class(self._stream)) is not None:
            self._bar = bar(total=100, file=self._stream, bar_format="{desc} {bar} {n:.0f} %", leave=False)
        if self._bar is not None:
            self._bar.set_description_str(stage, refresh=False)
            self._bar.n = round(100 * fraction)
            self._bar.refresh()
        elif stage != self._stage:
            if talk.is_json():
                talk.log("preparing", stage=stage)
            else:
                self._stream.write(f"preparing the model: {stage}\n")
                self._stream.flush()
        self._stage = stage

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _bar_class(stream: TextIO) -> type[tqdm[Any]] | None:
    """The bar for where `stream` goes; None where a bar would only fill a log."""
    if talk.is_json():
        return None
    if _in_notebook():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without ipywidgets the bar is text, which is as good
            from tqdm.auto import tqdm

        return tqdm
    if stream.isatty():
        from tqdm import tqdm

        return tqdm
    return None


def _in_notebook() -> bool:
    """Whether this is the kernel of a notebook, as tqdm itself asks; its standard error is no terminal."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
