"""Plans: for the flagship on the example machines, for machines that are too small, and for whatever is asked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import MachineError, SpecError
from pipeline.facts.model_facts import ModelFacts, facts_from_config, read_facts
from pipeline.machine import Cgroup, Gpu, Machine, load_machine
from pipeline.plan.plan import Plan, PromptStats, make_plan
from pipeline.spec.job_file import load_spec
from pipeline.spec.keys import JobSpec
from tests.model_files import FLAGSHIP, INT4, LLAMA, QWEN3_NEXT

GIB = 1 << 30
LLAMA_8B = LLAMA | {
    **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": False},
}
LAPTOP = load_machine(Path("examples/machines/rtx4090-laptop-64gb.yaml"))
DESKTOP = load_machine(Path("examples/machines/cpu-64gb.yaml"))
SERVER = load_machine(Path("examples/machines/gpu-80gb.yaml"))
TWO_GPUS = load_machine(Path("examples/machines/two-24gb-gpus.yaml"))


def job(*, new_tokens: int = 256, batch: dict[str, Any] | None = None, **model: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "model": {"path": "a-model"} | model,
            "input": {"path": "prompts.jsonl"},
            "output": {"path": "answers.jsonl"},
            "generation": {"max_new_tokens": new_tokens},
            "batch": batch or {},
        }
    )


def facts(config: dict[str, Any] = LLAMA_8B, **changes: Any) -> ModelFacts:
    return facts_from_config(config | changes, name="a-model")


def machine(memory_gib: float = 64, *gpus_gib: float, **changes: Any) -> Machine:
    size = int(memory_gib * GIB)
    cards = [
        Gpu(name=f"card {n}", total_bytes=int(g * GIB), free_bytes=int(g * GIB), capability=(8, 0))
        for n, g in enumerate(gpus_gib)
    ]
    values = {"name": "test", "physical_cores": 8, "logical_cpus": 16, "memory_total_bytes": size}
    return Machine(**(values | {"memory_available_bytes": size, "gpus": tuple(cards)} | changes))


@pytest.fixture(scope="module")
def flagship() -> ModelFacts:
    return read_facts(FLAGSHIP)


def decision(plan: Plan, name: str) -> tuple[str, str]:
    return next((made.value, made.reason) for made in plan.decisions if made.name == name)


def needs(plan: Plan, device: str) -> dict[str, int]:
    return {need.part: need.num_bytes for budget in plan.budgets if budget.device == device for need in budget.needs}


def check(plan: Plan) -> None:
    """What holds of every plan."""
    assert plan.slots >= 1
    assert plan.num_threads >= 1
    for budget in plan.budgets:
        assert 0 < budget.needed_bytes <= budget.allowed_bytes
    text = plan.explain()
    for made in plan.decisions:
        assert made.reason
        assert made.value != "auto"
        assert f"{made.name} " in text
    assert "auto" not in json.loads(json.dumps(plan.to_json())).values()


JOBS = sorted(Path("jobs").glob("qwen3-next-80b-*.yaml"))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
@pytest.mark.parametrize("where", [LAPTOP, DESKTOP, SERVER, TWO_GPUS], ids=lambda where: where.name)
def test_the_flagships_jobs_are_planned_on_the_example_machines(
    path: Path, where: Machine, flagship: ModelFacts
) -> None:
    plan = make_plan(load_spec(path), where, flagship)
    check(plan)
    asked = path.stem.removeprefix("qwen3-next-80b-")
    assert plan.load_strategy == (asked if where.gpus else "no-gpu")
    assert plan.asked_strategy == asked
    assert plan.slots >= 8


def test_the_flagship_jobs_are_three() -> None:
    assert len(JOBS) == 3


def test_min_gpu_puts_all_but_routed_experts_on_the_gpu(flagship: ModelFacts) -> None:
    plan = make_plan(job(load_strategy="min-gpu"), LAPTOP, flagship)
    assert needs(plan, "host").keys() == {"experts", "libraries", "loading"}
    assert "experts" not in needs(plan, "cuda:0")
    assert decision(plan, "experts") == (
        "48 in host memory",
        "of all layers; only the hidden states of tokens cross",
    )
    assert needs(plan, "cuda:0")["recurrent state"] == (plan.slots + 2) * flagship.state_bytes_per_sequence(2)
    assert needs(plan, "cuda:0")["context cache"] == plan.cache_tokens * 24_576
    assert plan.device == "cuda:0"
    assert plan.dtype == "bfloat16"
    assert dict(plan.environment)["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


def test_max_gpu_fills_the_gpu_with_whole_layers_of_experts(flagship: ModelFacts) -> None:
    plan = make_plan(job(load_strategy="max-gpu"), LAPTOP, flagship)
    check(plan)
    (on_gpu,) = plan.expert_layers_on_gpus
    assert 0 < on_gpu < 48
    layer = flagship.part("experts").disk_bytes // 48
    assert needs(plan, "cuda:0")["experts"] == on_gpu * layer
    assert needs(plan, "host")["experts"] == (48 - on_gpu) * layer
    assert decision(plan, "experts")[0] == f"{on_gpu} on the GPU, {48 - on_gpu} in host memory"
    assert "GPU memory: " in plan.explain()
    whole = make_plan(job(load_strategy="max-gpu"), SERVER, flagship)
    assert whole.expert_layers_on_gpus == (48,)
    assert "experts" not in needs(whole, "host")


def test_without_bfloat16_instructions_a_cpu_computes_float32(flagship: ModelFacts) -> None:
    plain = make_plan(job(load_strategy="no-gpu"), replace(DESKTOP, cpu_features=frozenset({"avx2"})), flagship)
    assert (plain.dtype, decision(plain, "dtype")[1][:24]) == ("float32", "this CPU has no bf16 ins")
    fast = make_plan(job(load_strategy="no-gpu"), DESKTOP, flagship)
    assert fast.dtype == "bfloat16"
    assert needs(plain, "host")["embeddings"] == 2 * needs(fast, "host")["embeddings"]
    assert needs(plain, "host")["experts"] == needs(fast, "host")["experts"]


def test_an_80b_model_is_refused_on_6_gb_with_the_figures(flagship: ModelFacts) -> None:
    with pytest.raises(MachineError) as caught:
        make_plan(job(load_strategy="no-gpu"), machine(6), flagship)
    assert caught.value.exit_code == 69
    message = str(caught.value)
    assert "experts 37.4 GiB" in message
    assert "5.5 GiB may be used" in message
    assert caught.value.problems[0].field == "model.load_strategy"


@pytest.mark.parametrize(("memory_gib", "gpus"), [(24, ()), (40, ()), (24, (16,))])
def test_experts_for_which_memory_is_short_are_read_for_every_pass(
    memory_gib: float, gpus: tuple[float, ...], flagship: ModelFacts
) -> None:
    plan = make_plan(job(load_strategy="min-gpu"), machine(memory_gib, *gpus), flagship)
    check(plan)
    layer = flagship.part("experts").disk_bytes // 48
    kept = 48 - plan.num_streamed_layers
    assert 0 < kept < 48
    assert needs(plan, "host")["experts"] == kept * layer
    assert needs(plan, "host")["experts being read"] == 2 * layer
    value, reason = decision(plan, "experts")
    assert value == f"{kept} in host memory, {plan.num_streamed_layers} on disk"
    assert "every step of the batch reads" in reason
    assert plan.slots >= 8
    assert make_plan(job(load_strategy="no-gpu"), machine(64), flagship).num_streamed_layers == 0


@pytest.mark.parametrize("asked", ["min-gpu", "max-gpu"])
def test_without_a_gpu_it_runs_on_the_cpu_and_says_why(asked: str) -> None:
    plan = make_plan(job(load_strategy=asked), machine(), facts())
    check(plan)
    assert (plan.load_strategy, plan.device) == ("no-gpu", "cpu")
    assert decision(plan, "load strategy") == (
        "no-gpu",
        f"{asked} was asked for and runs as no-gpu: this machine has no GPU",
    )
    broken = machine(gpu_problem="torch 2.13.0 is built without GPU support")
    assert (
        "built without GPU support"
        in decision(make_plan(job(load_strategy=asked), broken, facts()), "load strategy")[1]
    )
    with pytest.raises(MachineError, match="built without GPU support") as caught:
        make_plan(job(load_strategy=asked, strict=True), broken, facts())
    assert caught.value.problems[0].field == "model.load_strategy"


def test_strict_says_nothing_to_what_runs_as_asked() -> None:
    check(make_plan(job(load_strategy="no-gpu", strict=True), machine(), facts()))
    check(make_plan(job(load_strategy="min-gpu", strict=True), machine(64, 24), facts()))


@pytest.mark.parametrize("asked", ["min-gpu", "max-gpu"])
def test_a_dense_model_goes_onto_the_gpu_whole(asked: str) -> None:
    plan = make_plan(job(load_strategy=asked), machine(64, 8, 24, 16), facts())
    check(plan)
    assert plan.device == "cuda:1"  # the one with most memory free
    assert needs(plan, "host").keys() == {"libraries"}
    old = Gpu(name="old", total_bytes=24 * GIB, free_bytes=24 * GIB, capability=(7, 5))
    assert make_plan(job(load_strategy=asked), machine(gpus=(old,)), facts()).dtype == "float16"


def test_a_gpu_that_is_too_small_is_refused_with_what_would_fit() -> None:
    with pytest.raises(MachineError) as caught:
        make_plan(job(load_strategy="min-gpu"), machine(64, 8), facts())
    assert "of GPU memory" in str(caught.value)
    assert "what would fit: model.load_strategy: no-gpu" in str(caught.value)
    check(make_plan(job(load_strategy="no-gpu"), machine(64, 8), facts()))


def test_caps_of_the_job_bind_and_are_named() -> None:
    with pytest.raises(MachineError, match=r"what would fit: model\.cpu_memory left out"):
        make_plan(job(load_strategy="no-gpu", cpu_memory="8GiB"), machine(), facts())
    with pytest.raises(MachineError, match=r"model\.gpu_memory left out; or model\.load_strategy: no-gpu"):
        make_plan(job(gpu_memory="8GiB"), machine(64, 24), facts())
    capped = make_plan(job(gpu_memory="20GiB"), machine(64, 24), facts())
    assert {budget.device: budget.allowed_bytes for budget in capped.budgets}["cuda:0"] == 20 * GIB
    assert capped.slots < make_plan(job(), machine(64, 24), facts()).slots or capped.slots == 64


def test_a_reserve_that_is_in_the_way_is_named_with_what_to_allow_instead() -> None:
    crowded = machine(64, memory_available_bytes=33 * GIB)  # the reserve is 3.2 GiB of these, and 31 are needed
    with pytest.raises(
        MachineError, match=r"what would fit: model\.cpu_memory: [0-9]+MiB, which takes of the reserve"
    ) as caught:
        make_plan(job(load_strategy="no-gpu"), crowded, facts())
    allowed = str(caught.value).split("cpu_memory: ")[1].split(",")[0]
    check(make_plan(job(load_strategy="no-gpu", cpu_memory=allowed), crowded, facts()))


def test_a_control_group_binds_like_memory() -> None:
    group = Cgroup(version=2, memory_limit_bytes=8 * GIB)
    with pytest.raises(MachineError):
        make_plan(job(load_strategy="no-gpu"), machine(64, cgroup=group), facts())


@pytest.mark.parametrize(("key", "number"), [("slots", 70), ("cache_tokens", 1000)])
def test_numbers_asked_for_are_kept_or_refused_with_the_number_that_fits(key: str, number: int) -> None:
    asked = make_plan(job(batch={key: number}, load_strategy="no-gpu"), machine(), facts())
    assert getattr(asked, key) == number
    if key == "cache_tokens":
        assert asked.slots == 1  # more sequences of 512 + 256 tokens would wait for one another
    assert decision(asked, key.replace("_", " "))[1].startswith("as asked")
    with pytest.raises(MachineError, match=f"what would fit: batch.{key}: [0-9]+") as caught:
        make_plan(job(batch={key: 10_000_000}, load_strategy="no-gpu"), machine(), facts())
    fitting = int(str(caught.value).split(f"batch.{key}: ")[1].split(";")[0])
    check(make_plan(job(batch={key: fitting}, load_strategy="no-gpu"), machine(), facts()))


def test_answers_too_long_for_the_memory_are_refused_with_the_length_that_fits() -> None:
    with pytest.raises(MachineError, match=r"generation.max_new_tokens: [0-9]+") as caught:
        make_plan(job(new_tokens=100_000, load_strategy="no-gpu"), machine(36), facts())
    fitting = int(str(caught.value).split("max_new_tokens: ")[1].split(";")[0])
    check(make_plan(job(new_tokens=fitting, load_strategy="no-gpu"), machine(36), facts()))
    assert fitting > 1000


def test_counted_prompts_make_the_batch() -> None:
    counted = PromptStats(num_items=100, num_tokens_mean=2000.0, num_tokens_max=9000)
    plan = make_plan(job(load_strategy="no-gpu"), machine(), facts(), counted)
    check(plan)
    assert "2000 tokens (counted in the input)" in decision(plan, "cache tokens")[1]
    assert plan.slots < make_plan(job(load_strategy="no-gpu"), machine(), facts()).slots
    # A batch of the longest is not cut by the cache where memory is plenty.
    roomy = make_plan(job(load_strategy="no-gpu"), machine(1024), facts(), counted)
    assert 64 * (9000 + 256) < roomy.cache_tokens <= roomy.slots * (9000 + 256)


def test_packed_weights_are_unpacked_on_a_cpu_if_half_the_memory_holds_them() -> None:
    packed = facts(quantization_config=INT4)
    roomy = make_plan(job(load_strategy="no-gpu"), machine(128), packed)
    assert (roomy.weights, roomy.dtype) == ("unpacked", "float32")
    check(roomy)
    tight = make_plan(job(load_strategy="no-gpu"), machine(32), packed)
    assert tight.weights == "packed"
    assert "more than half" in decision(tight, "weights")[1]
    check(tight)
    assert sum(needs(tight, "host").values()) < 32 * GIB
    assert make_plan(job(load_strategy="no-gpu"), machine(48), packed).weights == "packed"  # they fit, and leave little
    # What is asked for comes before speed.
    many = job(load_strategy="no-gpu", batch={"slots": 250})
    assert make_plan(many, machine(128), packed).weights == "packed"
    on_gpu = make_plan(job(), machine(128, 80), packed)
    assert on_gpu.weights == "stock"
    assert make_plan(job(trust_remote_code=True, load_strategy="no-gpu"), machine(128), packed).weights == "stock"
    other = facts(quantization_config=INT4 | {"packing_format": "auto_round:auto_awq"})
    assert make_plan(job(load_strategy="no-gpu"), machine(128), other).weights == "stock"


def test_packed_experts_stay_packed_and_what_we_cannot_read_is_loaded_by_transformers(flagship: ModelFacts) -> None:
    assert make_plan(job(load_strategy="no-gpu"), machine(1000), flagship).weights == "packed"
    assert make_plan(job(load_strategy="max-gpu"), machine(128, 80), flagship).weights == "packed"
    other = facts(QWEN3_NEXT, quantization_config=INT4 | {"sym": False})
    for asked, where in (("no-gpu", machine()), ("min-gpu", machine(64, 24))):
        plan = make_plan(job(load_strategy=asked), where, other)
        assert plan.weights == "unpacked" if asked == "no-gpu" else "stock"
    on_gpu = make_plan(job(load_strategy="min-gpu"), machine(64, 24), other)
    assert "they are not symmetric" in decision(on_gpu, "weights")[1]
    assert "experts" in needs(on_gpu, "cuda:0")  # whole in one place, as transformers loads it


def test_stock_loading_of_packed_experts_needs_room_for_a_second_copy(flagship: ModelFacts) -> None:
    stock = job(load_strategy="no-gpu", trust_remote_code=True)
    with pytest.raises(MachineError, match="loading 30"):
        make_plan(stock, DESKTOP, flagship)
    check(make_plan(stock, SERVER, flagship))


def test_other_quantizations_are_refused() -> None:
    with pytest.raises(SpecError, match="quantized with fp8") as caught:
        make_plan(job(), machine(), facts(quantization_config={"quant_method": "fp8"}))
    assert caught.value.problems[0].field == "model.path"


@pytest.mark.parametrize(
    ("changes", "threads", "reason"),
    [
        ({}, 8, "one for each core; 16 logical processors"),
        ({"logical_cpus": 8}, 8, "one for each core"),
        ({"thread_limit": 3}, 3, "OMP_NUM_THREADS was already set"),
        ({"thread_limit": 99}, 8, "one for each core"),
        ({"cgroup": Cgroup(version=2, cpu_quota=2.5)}, 3, "the control group allows 2.5 processors"),
    ],
)
def test_threads(changes: dict[str, Any], threads: int, reason: str) -> None:
    plan = make_plan(job(load_strategy="no-gpu"), machine(**changes), facts())
    assert plan.num_threads == threads
    assert decision(plan, "threads")[1].startswith(reason)
    assert dict(plan.environment) == {
        "OMP_NUM_THREADS": str(threads),
        "GOMP_SPINCOUNT": "1000",
        "TOKENIZERS_PARALLELISM": "false",
    }


@pytest.mark.parametrize(
    ("free_threaded", "gil_enabled", "value"), [(False, True, "on"), (True, True, "on"), (True, False, "off")]
)
def test_the_gil_is_reported(free_threaded: bool, gil_enabled: bool, value: str) -> None:
    here = machine(free_threaded=free_threaded, gil_enabled=gil_enabled)
    made = decision(make_plan(job(load_strategy="no-gpu"), here, facts()), "GIL")
    assert made[0] == value
    assert ("turned it on" in made[1]) == (free_threaded and gil_enabled)


def test_the_echo_engine_needs_no_model() -> None:
    plan = make_plan(job(path=None, engine="echo"), machine(0.001))
    check(plan)
    assert (plan.engine, plan.model_dir, plan.budgets) == ("echo", None, ())
    assert make_plan(job(path=None, engine="echo", batch={"slots": 3}), machine()).slots == 3
    with pytest.raises(ValueError, match="only the echo engine"):
        make_plan(job(), machine())


def test_a_short_context_bounds_what_is_assumed() -> None:
    plan = make_plan(job(new_tokens=4096, load_strategy="no-gpu"), machine(), facts(LLAMA))
    check(plan)
    assert plan.cache_tokens == 256 * LLAMA["max_position_embeddings"]  # type: ignore[operator]


CONFIGS = [
    LLAMA,
    LLAMA_8B,
    QWEN3_NEXT,
    LLAMA_8B | {"quantization_config": INT4},
    QWEN3_NEXT | {"quantization_config": INT4},
]


@given(
    config=st.sampled_from(CONFIGS),
    strategy=st.sampled_from(["no-gpu", "min-gpu", "max-gpu"]),
    memory_gib=st.floats(0.1, 200),
    gpus_gib=st.lists(st.floats(0.1, 200), max_size=2),
    new_tokens=st.integers(1, 200_000),
    slots=st.just("auto") | st.integers(1, 10_000),
    cache_tokens=st.just("auto") | st.integers(1, 10_000_000),
    stats=st.none() | st.tuples(st.integers(1, 5000), st.integers(0, 200_000)),
)
def test_whatever_is_asked_fits_or_is_refused_and_what_is_said_to_fit_does(**asked: Any) -> None:
    """A plan keeps to its budgets; a refusal's remedies, taken at their word, are plans."""
    model = facts(asked["config"])
    where = machine(asked["memory_gib"], *asked["gpus_gib"])
    batch = {"slots": asked["slots"], "cache_tokens": asked["cache_tokens"]}
    stats = asked["stats"] and PromptStats(7, float(asked["stats"][0]), sum(asked["stats"]))
    spec = job(new_tokens=asked["new_tokens"], batch=batch, load_strategy=asked["strategy"])
    try:
        plan = make_plan(spec, where, model, stats)
    except MachineError as error:
        remedies = str(error).partition("what would fit: ")[2]
        for remedy in filter(None, remedies.split("; or ")):
            key, _, value = remedy.partition(",")[0].partition(": ")
            value = str(int(value[:-3]) << 20) if value.endswith("MiB") else value
            section, _, name = key.partition(".")
            changed = getattr(spec, section).model_copy(update={name: int(value) if value.isdigit() else value})
            check(make_plan(spec.model_copy(update={section: changed}), where, model, stats))
        return
    check(plan)
    for key, value in batch.items():
        assert value in ("auto", getattr(plan, key))
    if stats is None and asked["cache_tokens"] == "auto":
        assert plan.cache_tokens >= plan.slots * min(2, model.architecture.context_length)


def deterministic(spec: JobSpec) -> JobSpec:
    return spec.model_copy(update={"generation": spec.generation.model_copy(update={"deterministic": True})})


def test_deterministic_answers_are_refused_on_a_gpu_and_said_on_a_cpu(flagship: ModelFacts) -> None:
    with pytest.raises(SpecError, match="is promised on a CPU only, and min-gpu computes on a GPU") as caught:
        make_plan(deterministic(job(load_strategy="min-gpu")), LAPTOP, flagship)
    assert caught.value.problems[0].field == "generation.deterministic"
    plan = make_plan(deterministic(job(load_strategy="no-gpu")), LAPTOP, flagship)
    assert decision(plan, "arithmetic")[0] == "row by row"
    assert "arithmetic" not in {made.name for made in make_plan(job(), machine(), facts()).decisions}


@pytest.mark.parametrize(
    ("features", "kernel", "kernel_row_by_row"),
    [
        (("avx512_bf16",), "native kernel", "native kernel"),
        (("avx512_bf16", "amx_bf16"), "native kernel", "native kernel"),
        (("bf16",), "torch", "native kernel"),
    ],
)
def test_bfloat16_is_multiplied_by_what_is_faster_on_the_processor(
    features: tuple[str, ...], kernel: str, kernel_row_by_row: str
) -> None:
    narrow = machine(cpu_features=frozenset(features))
    for asked, expected in ((job(), kernel), (deterministic(job()), kernel_row_by_row)):
        plan = make_plan(asked, narrow, facts())
        assert (plan.dtype, plan.plain_kernel) == ("bfloat16", expected != "torch")
        assert decision(plan, "plain layers")[0] == expected


def test_deterministic_weights_do_not_depend_on_what_memory_is_free() -> None:
    asked, model = deterministic(job(load_strategy="no-gpu")), facts(quantization_config=INT4)
    roomy, crowded = machine(128), machine(128, memory_available_bytes=24 * GIB)
    assert make_plan(asked, roomy, model).weights == "unpacked"
    with pytest.raises(MachineError):
        make_plan(asked, crowded, model)
    assert make_plan(job(load_strategy="no-gpu"), crowded, model).weights == "packed"


def test_a_head_that_is_the_embedding_too_is_counted_again_where_it_is_put_in_blocks() -> None:
    tied, apart = facts(tie_word_embeddings=True), facts()
    size = 128256 * 4096
    for where, kernel, value_bytes in (
        (machine(), True, 4),
        (machine(cpu_features=frozenset({"avx512_bf16"})), True, 2),
        (machine(cpu_features=frozenset({"bf16"})), False, 2),
        (machine(64, 24), False, 2),
    ):
        plan = make_plan(job(), where, tied)
        assert plan.plain_kernel == kernel
        assert needs(plan, "host").get("head in blocks", 0) == (size * value_bytes if kernel else 0)
        assert "head in blocks" not in needs(make_plan(job(), where, apart), "host")
