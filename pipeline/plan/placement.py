"""Chooses where weights go and how many sequences fit beside them, or says what is short and what would fit."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from pipeline.errors import Problem
from pipeline.facts.model_facts import ModelFacts
from pipeline.machine import Machine
from pipeline.plan.budget import (
    HOST,
    MAX_SLOTS,
    Device,
    Form,
    LoadStrategy,
    Need,
    Placement,
    Workload,
    allowed_bytes,
    batch_needs,
    expert_layer_bytes,
    gpu_device,
    slots_that_fit,
    tokens_that_fit,
    total,
    weight_needs,
)
from pipeline.spec.keys import BatchSpec, JobSpec

DType: TypeAlias = Literal["bfloat16", "float16", "float32"]

_VALUE_BYTES: dict[DType, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
_STRATEGIES: tuple[LoadStrategy, ...] = ("max-gpu", "min-gpu", "no-gpu")
_UNPACK_SHARE = 2  # unpacked weights may take one part in so many of the memory
_SLOTS_BEFORE_EXPERTS = 64  # with max-gpu; more sequences take only what whole layers of experts leave
_LEAST_WITH_BF16 = (8, 0)  # CUDA compute capability
_FEWEST_NEW_TOKENS = 16  # shorter answers are no remedy


@dataclass(frozen=True, slots=True)
class Budget:
    """Memory of one device: what is needed of what may be used."""

    device: Device
    allowed_bytes: int
    needs: tuple[Need, ...]

    @property
    def needed_bytes(self) -> int:
        return sum(need.num_bytes for need in self.needs)


@dataclass(frozen=True, slots=True)
class Fit:
    """A placement with the batch that goes with it; it fits unless a budget is short."""

    placement: Placement
    slots: int
    cache_tokens: int
    budgets: tuple[Budget, ...]

    @property
    def short(self) -> list[Budget]:
        return [budget for budget in self.budgets if budget.needed_bytes > budget.allowed_bytes]

    def budget(self, device: Device) -> Budget:
        return next(budget for budget in self.budgets if budget.device == device)


@dataclass(frozen=True, slots=True)
class Placer:
    """Tries placements of one model on one machine for one job."""

    spec: JobSpec
    machine: Machine
    facts: ModelFacts
    workload: Workload

    @property
    def main_gpu(self) -> int:
        """The GPU with most memory free: all but routed experts is there, where anything is on a GPU."""
        gpus = self.machine.gpus
        return max(range(len(gpus)), key=lambda index: gpus[index].free_bytes, default=0)

    def helping_gpus(self) -> list[int]:
        """The other GPUs that compute what the main one does, the emptiest first."""
        gpus = self.machine.gpus
        others = [gpu for gpu in range(len(gpus)) if gpu != self.main_gpu and gpu not in self.too_old_gpus()]
        return sorted(others, key=lambda index: -gpus[index].free_bytes)

    def too_old_gpus(self) -> list[int]:
        """GPUs that do not compute bfloat16, where the main one does."""
        gpus = self.machine.gpus
        old = [index for index, gpu in enumerate(gpus) if gpu.capability < _LEAST_WITH_BF16]
        return [] if self.main_gpu in old else old

    def dtype(self, strategy: LoadStrategy) -> tuple[DType, str]:
        """In what the model computes, and why."""
        if strategy != "no-gpu":
            if self.machine.gpus[self.main_gpu].capability >= _LEAST_WITH_BF16:
                return "bfloat16", "half the memory of float32, and this GPU computes it"
            return "float16", "this GPU is older than bfloat16"
        if self.machine.has_cpu_bf16:
            return "bfloat16", "half the memory of float32, and this CPU has instructions for it"
        return "float32", "this CPU has no bf16 instructions, and emulated they are slower than float32"

    def plain_kernel(self, strategy: LoadStrategy) -> tuple[bool, str]:
        """Whether our kernel multiplies what is not quantized, and why."""
        if strategy != "no-gpu":
            return False, "its products use this device's own instructions for the type"
        if self.dtype(strategy)[0] == "float32":
            reason = "float32 sums over weights that stay bfloat16 where they are, which halves what a step reads"
        elif self.machine.multiplies_bf16_natively:
            reason = "weights lie as this CPU multiplies bfloat16, which torch would arrange anew for every product"
        elif self.spec.generation.deterministic:
            reason = "each row is summed in one order, which torch's products for the type do not promise"
        else:
            return False, "its products use this CPU's own instructions for the type"
        return True, f"{reason}; torch where there is no compiler"

    def place(self, strategy: LoadStrategy) -> Fit:
        """The best placement of a strategy; it may be short.

        Packed experts are spread over the places there are. Other packed weights are unpacked on a CPU where memory
        allows; what transformers loads lies in one place.
        """
        dtype, form, plain_kernel = self.dtype(strategy)[0], self._form(strategy), self.plain_kernel(strategy)[0]
        narrow = plain_kernel and dtype == "float32" and form == "stock" and self.facts.is_bfloat16
        how = (form, self.main_gpu, (0,) * len(self.machine.gpus))
        placement = Placement(strategy, _VALUE_BYTES[dtype], *how, plain_kernel=plain_kernel, narrow_blocks=narrow)
        fit = self._fit(placement)
        if fit.placement.form == "packed" and self.facts.architecture.num_experts:
            return self._spread(fit)
        # Our own reader of packed weights knows no code but transformers' own.
        exact = self.spec.model.activation == "exact"
        if strategy == "no-gpu" and self.facts.can_unpack and exact and not self.spec.model.trust_remote_code:
            unpacked = self._fit(replace(fit.placement, form="unpacked"))
            fits = not unpacked.short or self.spec.generation.deterministic
            if self.unpacked_bytes(fit) <= self.unpacked_limit(fit) and fits:
                return unpacked
        return fit

    def _form(self, strategy: LoadStrategy) -> Form:
        if not self.facts.can_pack or self.spec.model.trust_remote_code:
            return "stock"
        return "packed" if self.facts.architecture.num_experts or strategy == "no-gpu" else "stock"

    def _spread(self, fit: Fit) -> Fit:
        """Packed experts by whole layers: on GPUs if asked, in host memory, on disk where that is too small.

        A batch of up to half the room that the other weights leave comes first, since sequences decoded together
        bring more than experts at hand.
        """
        placement, num_layers = fit.placement, len(self.facts.architecture.sparse_layers)
        one = expert_layer_bytes(self.facts, placement)
        if placement.strategy == "max-gpu":
            fit = self._fit(replace(placement, expert_layers_on_gpus=self._layers_on_gpus(placement, one)))
            num_layers -= fit.placement.num_expert_layers_on_gpus
        if HOST in {budget.device for budget in fit.short} and num_layers:
            streamed = replace(fit.placement, num_streamed_layers=num_layers)
            kept = min(num_layers - 1, self._room(streamed, HOST, MAX_SLOTS) // one)
            spilled = self._fit(replace(streamed, num_streamed_layers=num_layers - kept))
            if not spilled.short:
                return spilled
        return fit

    def _layers_on_gpus(self, placement: Placement, one: int) -> tuple[int, ...]:
        """How many layers of `one` byte count each GPU takes: the main one all of them beside a batch if it can.

        Otherwise the others come first: hidden states cross anyway, and what they take leaves room to the batch.
        """
        left, layers = len(self.facts.architecture.sparse_layers), [0] * len(self.machine.gpus)
        on_main = min(left, self._room(placement, placement.device, _SLOTS_BEFORE_EXPERTS) // one)
        for gpu in self.helping_gpus() if on_main < left else ():
            layers[gpu] = min(left, self._most_layers(placement, gpu, one))
            left -= layers[gpu]
        layers[placement.main_gpu] = min(left, on_main)
        return tuple(layers)

    def _most_layers(self, placement: Placement, gpu: int, one: int) -> int:
        """Layers of experts that a GPU holds which has nothing else to do."""
        first = tuple(int(each == gpu) for each in range(len(self.machine.gpus)))
        budget = self._fit(replace(placement, expert_layers_on_gpus=first)).budget(gpu_device(gpu))
        return max(0, 1 + (budget.allowed_bytes - budget.needed_bytes) // one)

    def _room(self, placement: Placement, device: Device, most_slots: int) -> int:
        """Bytes left of a device beside the weights and half the batch that would fit, or one of so many slots."""
        budget = self._fit(placement, share=2, most_slots=most_slots).budget(device)
        return max(0, budget.allowed_bytes - budget.needed_bytes)

    def unpacked_bytes(self, fit: Fit) -> int:
        """What the weights would take unpacked."""
        return sum(map(replace(fit.placement, form="unpacked").bytes_of, self.facts.loaded_parts))

    def unpacked_limit(self, fit: Fit) -> int:
        """The most that unpacked weights may take.

        Both forms round in their own way, so in deterministic mode the choice follows from the machine's whole memory:
        what is free may be other when the run is resumed.
        """
        if self.spec.generation.deterministic:
            return self.machine.memory_total_bytes // _UNPACK_SHARE
        return fit.budget(HOST).allowed_bytes // _UNPACK_SHARE

    def _fit(self, placement: Placement, share: int = 1, most_slots: int = MAX_SLOTS) -> Fit:
        """Slots and cache for a placement: as asked, or as many as help and fit one part in `share` of what is left.

        At least one typical sequence, whether it fits or not.
        """
        facts, workload, batch = self.facts, self.workload, self.spec.batch
        needs = weight_needs(facts, placement)
        allowed = {HOST: self._allowed_in_host()} | {gpu_device(gpu): self._allowed_on(gpu) for gpu in placement.gpus}
        left = (allowed[placement.device] - total(needs, placement.device)) // share
        slots, cache_tokens = batch.slots, batch.cache_tokens
        if slots == "auto":
            fitting = slots_that_fit(facts, placement, workload, left)
            if cache_tokens != "auto":
                fitting = cache_tokens // workload.tokens
            slots = max(1, min(most_slots, fitting))
        if cache_tokens == "auto":
            fitting = tokens_that_fit(facts, placement, workload, slots, left)
            cache_tokens = max(slots * workload.tokens, min(slots * workload.longest_tokens, fitting))
        needs = [*needs, *batch_needs(facts, placement, workload, slots, cache_tokens)]
        budgets = [
            Budget(device, num_bytes, tuple(need for need in needs if need.device == device))
            for device, num_bytes in allowed.items()
        ]
        return Fit(placement, slots, cache_tokens, tuple(budgets))

    def _allowed_in_host(self) -> int:
        machine = self.machine
        return allowed_bytes(machine.usable_memory_bytes, machine.memory_total_bytes, self.spec.model.cpu_memory)

    def _allowed_on(self, gpu: int) -> int:
        card = self.machine.gpus[gpu]
        return allowed_bytes(card.free_bytes, card.total_bytes, self.spec.model.gpu_memory)

    def shortage(self, fit: Fit) -> Iterator[Problem]:
        """What is short, by part, and what to change: the nearest plans that fit."""
        for budget in fit.short:
            parts = ", ".join(f"{need.part} {show_bytes(need.num_bytes)}" for need in budget.needs)
            place = memory_of(budget.device, len(self.machine.gpus))
            message = f"{fit.placement.strategy} needs {show_bytes(budget.needed_bytes)} of {place} ({parts})"
            yield Problem(f"{message}; {show_bytes(budget.allowed_bytes)} may be used", field="model.load_strategy")
        remedies = list(dict.fromkeys(self._remedies(fit)))
        if remedies:
            yield Problem("what would fit: " + "; or ".join(remedies))
        else:
            yield Problem(f"no plan of this model fits; {self._least()} would be needed")

    def _remedies(self, fit: Fit) -> Iterator[str]:
        """Changes of the job after which it fits, nearest first."""
        strategy, asked = fit.placement.strategy, self.spec.batch
        if asked.slots != "auto":
            best = self._with(batch=BatchSpec(cache_tokens=asked.cache_tokens)).place(strategy)
            if not best.short:
                yield f"batch.slots: {best.slots}"
        if asked.cache_tokens != "auto":
            best = self._with(batch=BatchSpec(slots=asked.slots)).place(strategy)
            if not best.short:
                yield f"batch.cache_tokens: {best.cache_tokens}"
        if (new_tokens := self._new_tokens_that_fit(fit)) >= _FEWEST_NEW_TOKENS:
            yield f"generation.max_new_tokens: {new_tokens}"
        yield from self._caps_in_the_way(fit)
        yield from self._reserves_in_the_way(fit)
        for other in _STRATEGIES if self.machine.gpus else ():
            if other != strategy and not self.place(other).short:
                yield f"model.load_strategy: {other}"

    def _caps_in_the_way(self, fit: Fit) -> Iterator[str]:
        for key in ("gpu_memory", "cpu_memory"):
            model = self.spec.model.model_copy(update={key: None})
            if model != self.spec.model and not self._with(model=model).place(fit.placement.strategy).short:
                yield f"model.{key} left out"

    def _reserves_in_the_way(self, fit: Fit) -> Iterator[str]:
        """What to allow where only the reserve for other programs is too large, on a machine that they have filled."""
        for budget in fit.short:
            key = "cpu_memory" if budget.device == HOST else "gpu_memory"
            mebibytes = -(-budget.needed_bytes // 2**20)
            model = self.spec.model.model_copy(update={key: mebibytes * 2**20})
            if (
                getattr(self.spec.model, key) is None
                and not self._with(model=model).place(fit.placement.strategy).short
            ):
                yield f"model.{key}: {mebibytes}MiB, which takes of the reserve for other programs"

    def _new_tokens_that_fit(self, fit: Fit) -> int:
        """The longest answer with which one sequence fits; 0 where none does or the length is not what is short."""
        device = fit.placement.device
        if fit.slots > 1 or self.spec.batch != BatchSpec() or {budget.device for budget in fit.short} != {device}:
            return 0
        left = fit.budget(device).allowed_bytes - total(weight_needs(self.facts, fit.placement), device)

        def needed(new_tokens: int) -> int:
            workload = replace(self.workload, new_tokens=new_tokens)
            return total(batch_needs(self.facts, fit.placement, workload, 1, workload.tokens), device)

        return bisect_right(range(self.workload.new_tokens), left, key=needed) - 1

    def _least(self) -> str:
        """The smallest machine that a plan needs, for one typical sequence."""
        fit = self._with(batch=BatchSpec(slots=1)).place("no-gpu")
        return f"{show_bytes(fit.budget(HOST).needed_bytes)} of {memory_of(HOST)} with no-gpu"

    def _with(self, **changes: object) -> Placer:
        return replace(self, spec=self.spec.model_copy(update=changes))


def memory_of(device: Device, num_gpus: int = 1) -> str:
    """A device's memory for people; of several GPUs its number says which."""
    if device == HOST:
        return "host memory"
    return "GPU memory" if num_gpus == 1 else f"memory of GPU {device.partition(':')[2]}"


def show_bytes(num_bytes: int) -> str:
    """A size for people, rounded."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.1f} GiB"
    return f"{num_bytes / 2**20:.0f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.0f} KiB"
