"""Memory that a placement of a model needs, part by part, and how many sequences what is left of it holds; pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from pipeline.facts.model_facts import EMBEDDINGS, EXPERTS, NORMS, ModelFacts, Part
from pipeline.plan.streaming import WIDE_STEP_TOKENS

Device: TypeAlias = str  # "host", or a GPU by torch's name: "cuda:0"
LoadStrategy: TypeAlias = Literal["no-gpu", "min-gpu", "max-gpu"]
# How weights are loaded and lie: by transformers as stored; by us, packed as stored; by us, quantized ones made plain.
Form: TypeAlias = Literal["stock", "packed", "unpacked"]

MAX_SLOTS = 256  # beyond this a step gains little: the products of matrices are near their peak
# Beside those of the slots, for recurrent layers: of what prompts begin with alike; and, on a GPU, of nobody's rows.
_KEPT_STATES, _KEPT_STATES_ON_GPU = 1, 2
HOST: Device = "host"
_MIB = 1 << 20
# Measured on Linux: the interpreter with torch and transformers imported; the CUDA libraries and the context on top.
_RUNTIME_BYTES = 700 * _MIB
_CUDA_HOST_BYTES = 2048 * _MIB
_CUDA_BYTES = 600 * _MIB  # of each GPU that is used
# Measured peaks of a prefill (a Llama and a Qwen3-Next, 2 to 16 rows of 256 to 1024 tokens) are 1.8 to 2.1 times what
# is alive in the widest layer at once: what a layer frees is not given back in time for the next.
_WORK_FACTOR = 2
_BFLOAT16_BYTES = 2
_LOGIT_BYTES = 2 * 4  # float32 scores, and the copy that sampling works on
_STOCK_SURPLUS = 0.75  # of the weights: what transformers and auto-round took beside packed experts while loading
_STAGING_BYTES = 256 * _MIB  # that reads of our loader pass through
STREAM_BUFFERS = 2  # layers in memory of those that are read for every pass: one computes while the next is read
_LIBRARIES = "libraries"
_LOADING = "loading"
_BEING_READ = "experts being read"
_HEAD_IN_BLOCKS = "head in blocks"
_CACHE = "context cache"
_STATE = "recurrent state"
_WORK = "working memory"


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model's weights go, and in which form."""

    strategy: LoadStrategy
    value_bytes: int  # of an unquantized number: 2 or 4
    form: Form = "stock"
    main_gpu: int = 0  # with no-gpu none is used
    expert_layers_on_gpus: tuple[int, ...] = ()  # for each GPU; but for packed ones, experts are where all the rest is
    num_streamed_layers: int = 0  # of which the experts are read from disk for every pass
    plain_kernel: bool = False  # unquantized layers lie in blocks, for our kernel ...
    narrow_blocks: bool = False  # ... in bfloat16, as they are stored, though what they are multiplied with is float32

    @property
    def on_gpu(self) -> bool:
        """Whether everything but routed experts is computed on a GPU."""
        return self.strategy != "no-gpu"

    @property
    def device(self) -> Device:
        """Where everything but routed experts is computed, and the cache lies."""
        return gpu_device(self.main_gpu) if self.on_gpu else HOST

    @property
    def helping_gpus(self) -> list[int]:
        """GPUs that hold experts and nothing else."""
        return [gpu for gpu, layers in enumerate(self.expert_layers_on_gpus) if layers and gpu != self.main_gpu]

    @property
    def gpus(self) -> list[int]:
        """All GPUs that are used."""
        return sorted([self.main_gpu, *self.helping_gpus]) if self.on_gpu else []

    @property
    def num_expert_layers_on_gpus(self) -> int:
        """Layers whose experts lie on any GPU."""
        return sum(self.expert_layers_on_gpus)

    def bytes_of(self, part: Part) -> int:
        """What a part takes. On a GPU our loader keeps only experts packed: all else is small there and often used."""
        plain = self.form == "unpacked" or (self.form == "packed" and self.on_gpu and part.name != EXPERTS)
        in_blocks = part.name not in (EXPERTS, EMBEDDINGS, NORMS)
        return part.num_bytes(self.linear_value_bytes if in_blocks else self.value_bytes, unpacked=plain)

    @property
    def linear_value_bytes(self) -> int:
        """What an unquantized weight of a linear layer takes."""
        return _BFLOAT16_BYTES if self.narrow_blocks else self.value_bytes


@dataclass(frozen=True, slots=True)
class Workload:
    """Tokens of a sequence: as measured in the input, or as assumed before it is read."""

    prompt_tokens: int  # of a typical prompt
    new_tokens: int  # at most, of an answer
    longest_tokens: int  # prompt and answer of the longest sequence
    measured: bool

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.new_tokens


@dataclass(frozen=True, slots=True)
class Need:
    """Memory of one kind on one device."""

    device: Device
    part: str
    num_bytes: int


def gpu_device(gpu: int) -> Device:
    """A GPU by its number."""
    return f"cuda:{gpu}"


def weight_needs(facts: ModelFacts, placement: Placement) -> list[Need]:
    """The model's parts, each where the placement puts it; experts may lie on several devices, by whole layers."""
    needs: list[Need] = []
    for part in facts.loaded_parts:
        if part.name == EXPERTS and placement.form == "packed":
            needs += _expert_needs(facts, placement)
        else:
            needs.append(Need(placement.device, part.name, placement.bytes_of(part)))
    if placement.plain_kernel and facts.architecture.tied_embeddings:  # rows are looked up where they lie as stored
        shape = facts.architecture
        needs.append(Need(HOST, _HEAD_IN_BLOCKS, shape.vocab_size * shape.hidden_size * placement.linear_value_bytes))
    needs.append(Need(HOST, _LOADING, _loading_bytes(facts, placement)))
    needs.append(Need(HOST, _LIBRARIES, _RUNTIME_BYTES + (_CUDA_HOST_BYTES if placement.on_gpu else 0)))
    needs += [Need(gpu_device(gpu), _LIBRARIES, _CUDA_BYTES) for gpu in placement.gpus]
    return [need for need in needs if need.num_bytes]


def _expert_needs(facts: ModelFacts, placement: Placement) -> Iterator[Need]:
    one, num_layers = expert_layer_bytes(facts, placement), len(facts.architecture.sparse_layers)
    for gpu, layers in enumerate(placement.expert_layers_on_gpus):
        yield Need(gpu_device(gpu), EXPERTS, layers * one)
    streamed = placement.num_streamed_layers
    yield Need(HOST, EXPERTS, (num_layers - placement.num_expert_layers_on_gpus - streamed) * one)
    yield Need(HOST, _BEING_READ, min(streamed, STREAM_BUFFERS) * one)


def _loading_bytes(facts: ModelFacts, placement: Placement) -> int:
    """Host memory that only loading needs."""
    if placement.form == "packed":
        staging = _STAGING_BYTES
        if placement.on_gpu:  # what is unpacked there comes packed
            staging += sum(part.packed_bytes for part in facts.loaded_parts if part.name != EXPERTS)
        if placement.num_expert_layers_on_gpus:
            staging += expert_layer_bytes(facts, placement)
        return staging
    stock_experts = placement.form == "stock" and facts.part(EXPERTS).packed_parameters
    return round(_STOCK_SURPLUS * sum(map(placement.bytes_of, facts.loaded_parts))) if stock_experts else 0


def batch_needs(
    facts: ModelFacts, placement: Placement, workload: Workload, slots: int, cache_tokens: int
) -> list[Need]:
    """What `slots` sequences with `cache_tokens` tokens of context between them need while they are computed."""
    states = slots + (_KEPT_STATES_ON_GPU if placement.on_gpu else _KEPT_STATES)
    work = cache_tokens * _work_bytes_per_token(facts, placement, workload) + slots * _logit_bytes(facts)
    needs = {
        _CACHE: cache_tokens * facts.kv_bytes_per_token(placement.value_bytes),
        _STATE: states * facts.state_bytes_per_sequence(placement.value_bytes),
        _WORK: work,
    }
    elsewhere = max(slots, WIDE_STEP_TOKENS) * _expert_work_bytes_per_token(facts, placement)
    return [
        *(Need(placement.device, part, num_bytes) for part, num_bytes in needs.items() if num_bytes),
        *(Need(gpu_device(gpu), _WORK, elsewhere) for gpu in placement.helping_gpus),
    ]


def total(needs: Iterable[Need], device: Device) -> int:
    """Bytes needed of one device."""
    return sum(need.num_bytes for need in needs if need.device == device)


def slots_that_fit(facts: ModelFacts, placement: Placement, workload: Workload, left_bytes: int) -> int:
    """How many typical sequences `left_bytes` on the placement's device hold; may be 0."""
    fixed = total(batch_needs(facts, placement, workload, 0, 0), placement.device)
    one = total(batch_needs(facts, placement, workload, 1, workload.tokens), placement.device) - fixed
    return max(0, left_bytes - fixed) // one


def tokens_that_fit(facts: ModelFacts, placement: Placement, workload: Workload, slots: int, left_bytes: int) -> int:
    """How many tokens of context fit beside what `slots` sequences need whatever their length."""
    fixed = total(batch_needs(facts, placement, workload, slots, 0), placement.device)
    each = facts.kv_bytes_per_token(placement.value_bytes) + _work_bytes_per_token(facts, placement, workload)
    return max(0, left_bytes - fixed) // max(1, each)


def allowed_bytes(free_bytes: int, size_bytes: int, cap: int | None) -> int:
    """What may be used of a memory: the job's cap, and never more than is free; without a cap a reserve is left.

    The reserve, a twentieth and at least 512 MiB, is for what cannot be foreseen: other programs, fragmentation.
    """
    return min(free_bytes, cap) if cap is not None else max(0, free_bytes - max(size_bytes // 20, 512 * _MIB))


def expert_layer_bytes(facts: ModelFacts, placement: Placement) -> int:
    """Bytes of the routed experts of one layer."""
    return placement.bytes_of(facts.part(EXPERTS)) // max(1, len(facts.architecture.sparse_layers))


def _logit_bytes(facts: ModelFacts) -> int:
    return facts.architecture.vocab_size * _LOGIT_BYTES


def _work_bytes_per_token(facts: ModelFacts, placement: Placement, workload: Workload) -> int:
    """Activations of the widest layer, per token of context; only a prompt's tokens are computed at the same time."""
    return _WORK_FACTOR * sum(_widths(facts, placement)) * workload.prompt_tokens // max(1, workload.tokens)


def _expert_work_bytes_per_token(facts: ModelFacts, placement: Placement) -> int:
    """What a token of a step takes where only experts are computed.

    It as it came, sorted for the kernel, and answered, in float32 too; and for each of its experts what is between the
    two products, and the answer.
    """
    shape = facts.architecture
    each = (shape.expert_size + shape.hidden_size) * placement.value_bytes
    return _WORK_FACTOR * (shape.hidden_size * (3 * placement.value_bytes + 4) + shape.num_experts_per_token * each)


def _widths(facts: ModelFacts, placement: Placement) -> Iterator[int]:
    """Bytes that one token of a prompt takes in the widest layer: what stays alive together there, counted roughly.

    The residual stream with its norms; queries, keys and values and their rotated copies, or the float32 copies that
    the chunked delta rule makes; gate, up and their product of the experts of one token or of the dense layer.
    """
    shape = facts.architecture
    yield 4 * shape.hidden_size * placement.value_bytes
    attention = 4 * (shape.num_attention_heads + shape.num_kv_heads) * shape.head_dim * placement.value_bytes
    linear = 8 * shape.linear_attention.conv_dim * 4 if shape.linear_attention else 0
    mlp = 3 * max(shape.intermediate_size, shape.num_experts_per_token * shape.expert_size) * placement.value_bytes
    yield max(attention, linear, mlp)
