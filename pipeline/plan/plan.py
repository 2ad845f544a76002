"""Plan: everything that was decided for a run, each decision with its reason; pure, from spec, machine and facts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline.errors import MachineError, Problem, SpecError
from pipeline.facts.model_facts import ModelFacts
from pipeline.machine import Machine
from pipeline.plan.budget import MAX_SLOTS, Form, LoadStrategy, Placement, Workload, expert_layer_bytes
from pipeline.plan.expert_places import tell_experts
from pipeline.plan.placement import Budget, DType, Fit, Placer, memory_of, show_bytes
from pipeline.plan.repack_cache import RepackCache, choose_repack_cache
from pipeline.plan.streaming import ASSUMED_BYTES_PER_S, STEP_TOKENS, WIDE_STEP_TOKENS, Streaming
from pipeline.spec.keys import JobSpec

TYPICAL_PROMPT_TOKENS = 512  # assumed until the input is counted
_ECHO_SLOTS = 16


@dataclass(frozen=True, slots=True)
class PromptStats:
    """What counting the input's tokens found."""

    num_items: int
    num_tokens_mean: float
    num_tokens_max: int


@dataclass(frozen=True, slots=True)
class Decision:
    """One thing that was decided, and why."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What will run, and how; nothing in it says `auto`."""

    title: str
    engine: Literal["transformers", "echo"]
    model_dir: str | None  # None: the engine has no model
    trust_remote_code: bool
    asked_strategy: LoadStrategy
    load_strategy: LoadStrategy  # what runs
    device: str  # where prompts enter: cpu, cuda:0
    expert_layers_on_gpus: tuple[int, ...]  # for each GPU; the other layers' routed experts are in host memory ...
    num_streamed_layers: int  # ... but for those of so many layers, which are read from disk for every pass ...
    streaming: Streaming | None  # ... and what that takes
    step_tokens: int  # of prompts and answers that are computed together
    repack_cache: RepackCache | None  # None: weights are read from the checkpoint every time
    dtype: DType
    weights: Form
    num_threads: int
    slots: int
    cache_tokens: int
    environment: tuple[tuple[str, str], ...]
    budgets: tuple[Budget, ...]
    decisions: tuple[Decision, ...]
    speed_key: tuple[tuple[str, str], ...]  # what its speed depends on, the libraries' versions apart
    plain_kernel: bool = False  # unquantized layers are multiplied by our kernel, where it can be compiled
    activation: Literal["exact", "int8"] = "exact"  # what goes into packed layers on the CPU

    def explain(self) -> str:
        """The plan as a table for people: each decision with its reason, then memory by device and part."""
        names = max(len(made.name) for made in self.decisions)
        values = max(len(made.value) for made in self.decisions)
        lines = [self.title]
        lines += [f"  {made.name:{names}}  {made.value:{values}}  {made.reason}" for made in self.decisions]
        for budget in self.budgets:
            used, allowed = show_bytes(budget.needed_bytes), show_bytes(budget.allowed_bytes)
            place = memory_of(budget.device, len(self.expert_layers_on_gpus))
            lines.append(f"{place}: {used} of the {allowed} that may be used")
            lines += [f"  {need.part:{names}}  {show_bytes(need.num_bytes)}" for need in budget.needs]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values, sizes in bytes."""
        budgets = [asdict(budget) | {"needed_bytes": budget.needed_bytes} for budget in self.budgets]
        return asdict(self) | {
            "environment": dict(self.environment),
            "budgets": budgets,
            "speed_key": dict(self.speed_key),
        }


def make_plan(
    spec: JobSpec, machine: Machine, facts: ModelFacts | None = None, stats: PromptStats | None = None
) -> Plan:
    """Decide everything that the job leaves open; only the echo engine does without `facts`.

    Raises MachineError where the machine cannot hold what is asked, or may not run it (strict), with what is missing,
    by part, and the nearest plan that fits; SpecError for a model that none of our loaders reads, and for deterministic
    answers on a GPU.
    """
    if spec.model.engine == "echo":
        return _echo_plan(spec, machine)
    if facts is None:
        raise ValueError("only the echo engine does without a model")
    _check_quantization(facts)
    strategy, why_strategy = _strategy(spec, machine, facts)
    _check_deterministic(spec, strategy)
    placer = Placer(spec, machine, facts, _workload(spec, facts, stats))
    fit = placer.place(strategy)
    if fit.short:
        raise MachineError(list(placer.shortage(fit)))
    placement = fit.placement
    _check_activation(spec, facts, placement)
    streaming = _streaming(machine, facts, placement)
    where_experts = tell_experts(placer, placement, streaming)
    repack_cache, why_repack_cache = choose_repack_cache(spec.model.repack_cache, facts, placement)
    device = placement.device if placement.on_gpu else "cpu"
    dtype, why_dtype = placer.dtype(strategy)
    plain_kernel, why_products = placer.plain_kernel(strategy)
    num_threads, why_threads = _threads(machine)
    environment = list(_environment(num_threads, placement))
    decisions = [
        Decision("engine", "transformers", "runs every causal language model that transformers knows"),
        Decision("load strategy", strategy, why_strategy),
        Decision("device", device, _why_device(placer, placement)),
        Decision("dtype", dtype, why_dtype),
        Decision("plain layers", "native kernel" if plain_kernel else "torch", why_products),
        *_activation(spec),
        _weights(placer, fit),
        *([Decision("experts", *where_experts)] if where_experts else []),
        *([Decision("repacked weights", *why_repack_cache)] if why_repack_cache else []),
        *_deterministic(spec),
        Decision("threads", str(num_threads), why_threads),
        Decision("slots", str(fit.slots), _why_slots(placer, fit)),
        Decision("cache tokens", str(fit.cache_tokens), _why_cache(placer, fit)),
        *environment,
        _gil(machine),
    ]
    return Plan(
        title=_title(machine, facts),
        engine="transformers",
        model_dir=facts.directory,
        trust_remote_code=spec.model.trust_remote_code,
        asked_strategy=spec.model.load_strategy,
        load_strategy=strategy,
        device=device,
        expert_layers_on_gpus=placement.expert_layers_on_gpus,
        num_streamed_layers=placement.num_streamed_layers,
        streaming=streaming,
        step_tokens=WIDE_STEP_TOKENS if streaming or device != "cpu" else STEP_TOKENS,
        repack_cache=repack_cache,
        dtype=dtype,
        weights=placement.form,
        num_threads=num_threads,
        slots=fit.slots,
        cache_tokens=fit.cache_tokens,
        environment=tuple((made.name, made.value) for made in environment),
        budgets=fit.budgets,
        plain_kernel=plain_kernel,
        activation=spec.model.activation,
        decisions=tuple(decisions),
        speed_key=(
            *_hardware(machine),
            ("model", facts.architecture.name),
            ("parameters", str(facts.num_parameters)),
            ("bytes on disk", str(facts.disk_bytes)),
            ("load strategy", strategy),
            ("experts on the GPU", " ".join(map(str, placement.expert_layers_on_gpus)) or "0"),
            ("experts on disk", str(placement.num_streamed_layers)),
            ("dtype", dtype),
            ("weights", placement.form),
            ("activation", spec.model.activation),
            ("deterministic", str(spec.generation.deterministic)),
            ("threads", str(num_threads)),
        ),
    )


def _echo_plan(spec: JobSpec, machine: Machine) -> Plan:
    slots = spec.batch.slots if spec.batch.slots != "auto" else _ECHO_SLOTS
    why_slots = "as asked" if spec.batch.slots != "auto" else "enough for answers to finish out of order"
    return Plan(
        title=f"echo on {machine.name}",
        engine="echo",
        model_dir=None,
        trust_remote_code=False,
        asked_strategy=spec.model.load_strategy,
        load_strategy="no-gpu",
        device="cpu",
        expert_layers_on_gpus=(),
        num_streamed_layers=0,
        streaming=None,
        step_tokens=STEP_TOKENS,
        repack_cache=None,
        dtype="float32",
        weights="stock",
        num_threads=1,
        slots=slots,
        cache_tokens=0,
        environment=(),
        budgets=(),
        decisions=(
            Decision("engine", "echo", "as asked: every prompt is answered with itself, without a model"),
            Decision("slots", str(slots), why_slots),
        ),
        speed_key=(*_hardware(machine), ("echo", repr(spec.model.echo))),
    )


def _hardware(machine: Machine) -> Iterator[tuple[str, str]]:
    """What of a machine decides how fast it is, its name apart: in a container that is another one every day."""
    yield "cores", str(machine.usable_cores)
    yield "processors", str(machine.logical_cpus)
    yield "processor features", " ".join(sorted(machine.cpu_features))
    yield "GPUs", ", ".join(gpu.name for gpu in machine.gpus)


def _check_quantization(facts: ModelFacts) -> None:
    quantization = facts.quantization
    if quantization is not None and quantization.method != "auto-round":
        message = f"is quantized with {quantization.method}; AutoRound checkpoints and unquantized models can be loaded"
        raise SpecError(Problem(message, facts.directory, field="model.path"))


def _check_activation(spec: JobSpec, facts: ModelFacts, placement: Placement) -> None:
    if spec.model.activation == "int8" and placement.form != "packed":
        why = "is not quantized" if not facts.is_packed else facts.packed_fault or "is not computed packed on the CPU"
        message = f"int8 is for packed AutoRound weights on the CPU; this model {why}; use exact"
        raise SpecError(Problem(message, facts.directory, field="model.activation"))


def _activation(spec: JobSpec) -> Iterator[Decision]:
    if spec.model.activation == "int8":
        reason = (
            "as asked: what goes into packed layers on the CPU is rounded to 8 bits, which changes answers a little"
        )
        yield Decision("activation", "int8", reason)


def _check_deterministic(spec: JobSpec, strategy: LoadStrategy) -> None:
    if spec.generation.deterministic and strategy != "no-gpu":
        message = (
            f"is promised on a CPU only, and {strategy} computes on a GPU, whose libraries choose the order of sums by "
            "the size of the batch; set model.load_strategy: no-gpu, or leave it out"
        )
        raise SpecError(Problem(message, field="generation.deterministic"))


def _deterministic(spec: JobSpec) -> Iterator[Decision]:
    if spec.generation.deterministic:
        reason = (
            "each row is summed in one order, whatever is beside it: the same bits in any batch; slower long prompts"
        )
        yield Decision("arithmetic", "row by row", reason)


def _strategy(spec: JobSpec, machine: Machine, facts: ModelFacts) -> tuple[LoadStrategy, str]:
    asked = spec.model.load_strategy
    if asked == "no-gpu":
        return asked, "as asked"
    if machine.gpus:
        whole = "; a model without routed experts goes onto the GPU whole"
        return asked, "as asked" + ("" if facts.architecture.num_experts else whole)
    why = machine.gpu_problem or "this machine has no GPU"
    if spec.model.strict:
        message = f"{asked} needs a GPU: {why}; ask for no-gpu, or let it fall back with model.strict: false"
        raise MachineError(Problem(message, field="model.load_strategy"))
    return "no-gpu", f"{asked} was asked for and runs as no-gpu: {why}"


def _workload(spec: JobSpec, facts: ModelFacts, stats: PromptStats | None) -> Workload:
    context = facts.architecture.context_length
    typical, most = (
        (TYPICAL_PROMPT_TOKENS, context // 2) if stats is None else (round(stats.num_tokens_mean), context - 1)
    )
    prompt = max(1, min(typical, most))
    new = min(spec.generation.max_new_tokens, context - prompt)
    longest = prompt + new if stats is None else min(stats.num_tokens_max + spec.generation.max_new_tokens, context)
    return Workload(prompt, new, max(longest, prompt + new), measured=stats is not None)


def _title(machine: Machine, facts: ModelFacts) -> str:
    millions = facts.num_parameters / 1e6
    count = f"{millions / 1e3:.1f} billion" if millions >= 1e3 else f"{millions:.1f} million"
    size = f"{count} parameters, {show_bytes(facts.disk_bytes)} on disk"
    guess = ", estimated from its configuration" if facts.estimated else ""
    return f"{facts.architecture.name} ({size}{guess}) on {machine.name}"


def _why_device(placer: Placer, placement: Placement) -> str:
    if not placement.on_gpu:
        return "the model is in host memory" + ("; see experts" if placement.num_streamed_layers else ", all of it")
    gpu, shape = placer.machine.gpus[placement.main_gpu], placer.facts.architecture
    if not shape.num_experts:
        return f"the whole model is on the {gpu.name}"
    if placement.form != "packed" or placement.expert_layers_on_gpus[placement.main_gpu] == len(shape.sparse_layers):
        return f"the whole model is on the {gpu.name}"
    return f"everything but routed experts is on the {gpu.name}; see experts"


def _weights(placer: Placer, fit: Fit) -> Decision:
    facts, form = placer.facts, fit.placement.form
    if not facts.is_packed:
        return Decision("weights", form, "the model is not quantized; transformers loads it as it is stored")
    if form == "unpacked":
        return Decision(
            "weights", form, "plain weights decode large batches faster on a CPU than packed ones, and there is room"
        )
    if form == "stock":
        why = facts.packed_fault or "the job trusts the model's own code"
        if fit.placement.on_gpu and facts.can_pack and not facts.architecture.num_experts:
            why = "the kernels of a GPU compute on packed weights"
        return Decision("weights", form, f"transformers and auto-round load them: {why}")
    if facts.architecture.num_experts:
        return Decision("weights", form, "read straight into place; a batch reads each expert that it hits once")
    size, limit = show_bytes(placer.unpacked_bytes(fit)), show_bytes(placer.unpacked_limit(fit))
    return Decision("weights", form, f"unpacked they would take {size}, more than half of the memory ({limit})")


def _streaming(machine: Machine, facts: ModelFacts, placement: Placement) -> Streaming | None:
    if not placement.num_streamed_layers:
        return None
    per_pass = placement.num_streamed_layers * expert_layer_bytes(facts, placement)
    speed = machine.disk_read_bytes_per_s
    return Streaming(per_pass, facts.disk_bytes - per_pass, speed or ASSUMED_BYTES_PER_S, speed is not None)


def _why_slots(placer: Placer, fit: Fit) -> str:
    if placer.spec.batch.slots != "auto":
        return "as asked; they fit"
    if fit.slots == MAX_SLOTS:
        return "beyond so many a step gains little; memory would hold them"
    place = memory_of(fit.placement.device, len(placer.machine.gpus))
    return f"what the {place} left by the weights holds"


def _why_cache(placer: Placer, fit: Fit) -> str:
    if placer.spec.batch.cache_tokens != "auto":
        return "as asked; they fit"
    workload = placer.workload
    alone = "; a longer sequence runs alone" if workload.longest_tokens > fit.cache_tokens else ""
    source = "counted in the input" if workload.measured else "assumed until the input is counted"
    size = show_bytes(placer.facts.kv_bytes_per_token(fit.placement.value_bytes) * fit.cache_tokens)
    return (
        f"{size}: prompts of {workload.prompt_tokens} tokens ({source}), answers of {workload.new_tokens}, "
        f"up to {workload.longest_tokens} together{alone}"
    )


def _threads(machine: Machine) -> tuple[int, str]:
    cores = machine.usable_cores
    if machine.thread_limit is not None and machine.thread_limit < cores:
        return machine.thread_limit, "OMP_NUM_THREADS was already set to this"
    if machine.cgroup is not None and cores < machine.physical_cores:
        return cores, f"the control group allows {machine.cgroup.cpu_quota:g} processors"
    if machine.logical_cpus == machine.physical_cores:
        return cores, "one for each core"
    return cores, f"one for each core; {machine.logical_cpus} logical processors share the arithmetic units of these"


def _environment(num_threads: int, placement: Placement) -> Iterator[Decision]:
    yield Decision("OMP_NUM_THREADS", str(num_threads), "as many as threads above, in every library that uses OpenMP")
    yield Decision(
        "GOMP_SPINCOUNT",
        "1000",
        "a thread that waits gives its core away soon; spinning on, it would hold up the others on a shared machine",
    )
    yield Decision(
        "TOKENIZERS_PARALLELISM", "false", "prompts are encoded one by one beside the model, which has the cores"
    )
    if placement.on_gpu:
        reason = "batches change size all the time; fixed segments would leave gaps that no tensor fits"
        yield Decision("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", reason)


def _gil(machine: Machine) -> Decision:
    if not machine.free_threaded:
        return Decision("GIL", "on", "this Python is built with it; kernels release it while they compute")
    if machine.gil_enabled:
        return Decision("GIL", "on", "this Python is built without it, but a library or PYTHON_GIL turned it on")
    return Decision("GIL", "off", "this Python is built without it")
