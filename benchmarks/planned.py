"""The plan for a model on the CPU of this machine, as a job without further wishes would have it."""

from __future__ import annotations

from pathlib import Path

from pipeline.facts.model_facts import read_facts
from pipeline.loading.builtin import prepare_builtin
from pipeline.plan.plan import Plan, make_plan
from pipeline.probe import probe_machine
from pipeline.spec.keys import JobSpec


def planned(model: str) -> Plan:
    """`model` is a directory or builtin:NAME, which is made if need be. Raises as `read_facts` and `make_plan` do."""
    name = model.removeprefix("builtin:")
    directory = prepare_builtin(name) if name != model else Path(model)
    spec = JobSpec.model_validate(
        {
            "model": {"path": str(directory), "load_strategy": "no-gpu"},
            "input": {"path": "none"},
            "output": {"path": "none.jsonl"},
        }
    )
    return make_plan(spec, probe_machine(), read_facts(directory))
