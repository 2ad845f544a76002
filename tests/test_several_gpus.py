"""Plans for machines with several GPUs: layers of experts on all of them, all else on the one with most memory free."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from pipeline.engines.recorded_steps import can_record
from pipeline.errors import MachineError
from pipeline.facts.model_facts import ModelFacts, read_facts
from pipeline.machine import Machine
from pipeline.plan.plan import Plan, make_plan
from tests.model_files import FLAGSHIP
from tests.test_plan import GIB, TWO_GPUS, check, decision, facts, job, machine, needs

MAX = job(load_strategy="max-gpu")


@pytest.fixture(scope="module")
def flagship() -> ModelFacts:
    return read_facts(FLAGSHIP)


def layer_bytes(model: ModelFacts) -> int:
    return model.part("experts").disk_bytes // 48


def planned(where: Machine, model: ModelFacts, **asked: str) -> Plan:
    """The plan, after what holds of every plan for several GPUs."""
    plan = make_plan(job(load_strategy="max-gpu", **asked), where, model)
    check(plan)
    assert len(plan.expert_layers_on_gpus) == len(where.gpus)
    for gpu, layers in enumerate(plan.expert_layers_on_gpus):
        of_gpu = needs(plan, f"cuda:{gpu}")
        assert of_gpu.get("experts", 0) == layers * layer_bytes(model)
        if plan.device == f"cuda:{gpu}":
            assert {"attention", "context cache", "recurrent state"} <= of_gpu.keys()
        else:
            assert of_gpu.keys() == ({"experts", "libraries", "working memory"} if layers else set())
    in_host = 48 - sum(plan.expert_layers_on_gpus) - plan.num_streamed_layers
    assert needs(plan, "host").get("experts", 0) == in_host * layer_bytes(model)
    return plan


def test_two_gpus_hold_more_layers_than_one_and_the_rest_is_in_host_memory(flagship: ModelFacts) -> None:
    plan = planned(TWO_GPUS, flagship)
    one = planned(replace(TWO_GPUS, gpus=TWO_GPUS.gpus[1:]), flagship)
    helping, main = plan.expert_layers_on_gpus
    assert plan.device == "cuda:1"  # the first one also drives the screen
    assert (main,) == one.expert_layers_on_gpus
    assert helping > main > 0
    assert plan.slots == one.slots
    value, reason = decision(plan, "experts")
    assert value == f"{helping} on GPU 0, {main} on GPU 1, {48 - helping - main} in host memory"
    assert reason == "of all layers; only the hidden states of tokens cross"
    text = plan.explain()
    assert "memory of GPU 0: " in text and "memory of GPU 1: " in text
    assert json.loads(json.dumps(plan.to_json()))["expert_layers_on_gpus"] == [helping, main]
    assert dict(plan.speed_key)["experts on the GPU"] == f"{helping} {main}"
    # One more layer would not have fitted.
    for budget in plan.budgets[1:]:
        assert budget.allowed_bytes - budget.needed_bytes < layer_bytes(flagship)


def test_the_main_gpu_holds_all_where_it_can(flagship: ModelFacts) -> None:
    plan = planned(machine(64, 40, 80), flagship)
    assert plan.expert_layers_on_gpus == (0, 48)
    assert [budget.device for budget in plan.budgets] == ["host", "cuda:1"]
    assert decision(plan, "device")[1] == "the whole model is on the card 1"


def test_where_layers_have_to_go_elsewhere_the_batch_has_what_they_leave(flagship: ModelFacts) -> None:
    pair = planned(machine(64, 48, 48), flagship)
    assert sum(pair.expert_layers_on_gpus) == 48
    assert "experts" not in needs(pair, "host")
    assert pair.slots > planned(machine(64, 48), flagship).slots
    assert "everything but routed experts" in decision(pair, "device")[1]


@pytest.mark.parametrize("sizes", [(24, 8), (8, 24), (12, 16, 6), (24, 24, 24), (16, 16, 16, 16)])
def test_uneven_gpus_are_filled_as_far_as_each_goes(sizes: tuple[float, ...], flagship: ModelFacts) -> None:
    plan = planned(machine(64, *sizes), flagship)
    main = int(plan.device.removeprefix("cuda:"))
    assert sizes[main] == max(sizes)
    helping = [layers for gpu, layers in enumerate(plan.expert_layers_on_gpus) if gpu != main]
    assert all(helping)
    assert sum(plan.expert_layers_on_gpus) <= 48


def test_a_gpu_without_room_is_left_alone(flagship: ModelFacts) -> None:
    full = machine(64, 24, 24)
    full = replace(full, gpus=(full.gpus[0], replace(full.gpus[1], free_bytes=GIB)))
    plan = planned(full, flagship)
    assert plan.expert_layers_on_gpus == (planned(machine(64, 24), flagship).expert_layers_on_gpus[0], 0)
    assert [budget.device for budget in plan.budgets] == ["host", "cuda:0"]
    assert "GPU 1" not in decision(plan, "experts")[0]


def test_the_jobs_cap_is_one_for_each_gpu(flagship: ModelFacts) -> None:
    capped = planned(machine(64, 24, 24), flagship, gpu_memory="16GiB")
    assert {budget.device: budget.allowed_bytes for budget in capped.budgets[1:]} == {
        "cuda:0": 16 * GIB,
        "cuda:1": 16 * GIB,
    }
    free = planned(machine(64, 24, 24), flagship)
    assert all(
        0 < few < many for few, many in zip(capped.expert_layers_on_gpus, free.expert_layers_on_gpus, strict=True)
    )


def test_what_neither_gpus_nor_host_hold_is_read_from_disk(flagship: ModelFacts) -> None:
    plan = planned(machine(20, 16, 16), flagship)
    assert plan.num_streamed_layers > 0
    assert decision(plan, "experts")[0].endswith(f"{plan.num_streamed_layers} on disk")
    assert plan.num_streamed_layers < planned(machine(20, 16), flagship).num_streamed_layers


def test_a_gpu_that_does_not_compute_the_type_is_not_used_and_named(flagship: ModelFacts) -> None:
    pair = machine(64, 24, 24)
    old = replace(pair.gpus[0], capability=(7, 5))
    plan = planned(replace(pair, gpus=(pair.gpus[1], old)), flagship)
    assert plan.expert_layers_on_gpus[1] == 0
    assert decision(plan, "experts")[1].endswith("; GPU 1 does not compute bfloat16 and is not used")
    both_old = planned(replace(pair, gpus=(old, old)), flagship)
    assert both_old.dtype == "float16" and all(both_old.expert_layers_on_gpus)


def test_min_gpu_and_models_without_experts_keep_to_one_gpu(flagship: ModelFacts) -> None:
    for spec, model in ((job(load_strategy="min-gpu"), flagship), (MAX, facts())):
        plan = make_plan(spec, machine(64, 24, 24), model)
        check(plan)
        assert plan.expert_layers_on_gpus == (0, 0)
        assert [budget.device for budget in plan.budgets] == ["host", "cuda:0"]


def test_a_shortage_names_the_gpu(flagship: ModelFacts) -> None:
    with pytest.raises(MachineError, match=r"max-gpu needs .* of memory of GPU 1 \(.*may be used"):
        make_plan(MAX, machine(64, 3, 4), flagship)


def test_steps_are_recorded_where_all_of_a_model_lies_on_its_gpu() -> None:
    """`torch.device` alone needs no GPU; a tensor's device is what `meta` stands in for."""

    class OnGpu(nn.Module):
        def __init__(self, *devices: str) -> None:
            super().__init__()
            self.places = [Placed(torch.device(device)) for device in devices]

        def parameters(self, recurse: bool = True):  # type: ignore[override]
            return iter(self.places[:1])

        def buffers(self, recurse: bool = True):  # type: ignore[override]
            return iter(self.places[1:])

    class Placed:
        def __init__(self, device: torch.device) -> None:
            self.device = device

    main = torch.device("cuda:0")
    assert can_record(OnGpu("cuda:0", "cuda:0"), main)
    assert not can_record(OnGpu("cuda:0", "cuda:1"), main)
    assert not can_record(OnGpu("cuda:0", "cpu"), main)
    assert not can_record(nn.Linear(2, 2), torch.device("cpu"))
    streamed = OnGpu("cuda:0", "cuda:0")
    streamed.add_module("experts", nn.Identity())
    streamed.experts.reads_for_every_pass = True
    assert not can_record(streamed, main)
