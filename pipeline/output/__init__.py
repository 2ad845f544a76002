"""Answers to the file that is published: one form of output each, and what they have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pipeline.columnar import is_columnar
from pipeline.output.forms import Form
from pipeline.output.native import NATIVE
from pipeline.output.openai_batch import KEPT_FIELDS, OpenAIBatch
from pipeline.output.parquet import Parquet
from pipeline.spec.fingerprint import fingerprint
from pipeline.spec.keys import JobSpec


def choose_form(spec: JobSpec, output: Path) -> Form:
    """The form that the job asks for, in the file `output`: that of the job, or of a shard, which is never a table."""
    if spec.output.format == "openai-batch":
        return OpenAIBatch(model=spec.model.path or spec.model.engine, fingerprint=fingerprint(spec))
    return Parquet() if is_columnar(output.name) else NATIVE


def kept_fields(spec: JobSpec) -> Literal["all", "none"] | Sequence[str]:
    """What of an input line the native line of its answer repeats, for the user or for the form to work with."""
    return KEPT_FIELDS if spec.output.format == "openai-batch" else spec.output.keep_fields
