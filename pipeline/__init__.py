"""Offline bulk generation with large quantized language models: a job in, a file of answers out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.job import run_job
    from pipeline.outcome import Outcome
    from pipeline.output.results import read_results
    from pipeline.spec.job_file import load_spec as load_job
    from pipeline.spec.keys import JobSpec

__version__ = "0.1.0"

__all__ = ["JobSpec", "Outcome", "load_job", "read_results", "run_job"]

_HOMES = {
    "JobSpec": ("pipeline.spec.keys", "JobSpec"),
    "Outcome": ("pipeline.outcome", "Outcome"),
    "load_job": ("pipeline.spec.job_file", "load_spec"),
    "read_results": ("pipeline.output.results", "read_results"),
    "run_job": ("pipeline.job", "run_job"),
}


def __getattr__(name: str) -> Any:
    """Names are fetched from their modules when asked for, so that the commands start without what they do not use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)
