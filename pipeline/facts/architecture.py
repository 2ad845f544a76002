"""Architecture: what a model's config.json says about its shape, and the modules with weights that follow from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from pipeline.errors import NotFoundError, Problem

_STATE_BYTES = 4  # the delta rule is computed, and its state kept, in float32
_MAX_LAYERS = 4096  # bounds what a hostile configuration can make us enumerate
_MAX_SIZE = 1 << 31


class Module(NamedTuple):
    """Parameters that a configuration implies; a linear layer of `num_inputs` to `num_outputs` if it has inputs."""

    name: str  # as in the checkpoint, without the leaf (.weight); of equal experts the first stands for all
    num_outputs: int
    num_inputs: int = 0  # 0: a vector or a convolution of `num_outputs` values, never quantized
    copies: int = 1
    bias: bool = False
    linear: bool = True  # False: a table or router that quantizers leave alone unless told otherwise


@dataclass(frozen=True, slots=True)
class _Family:
    """How a model type differs from Llama, as far as its parameters go."""

    qkv_bias: bool = False
    head_norms: bool = False  # a norm over the heads of queries and keys
    gated_attention: bool = False  # queries carry an output gate
    split_projections: bool = False  # in_proj_{qkv,z,b,a} instead of in_proj_{qkvz,ba}


_QWEN3_NEXT = _Family(head_norms=True, gated_attention=True)
_QWEN3_5 = _Family(head_norms=True, gated_attention=True, split_projections=True)
_FAMILIES = {
    "llama": _Family(),
    "mistral": _Family(),
    "qwen2": _Family(qkv_bias=True),
    "qwen3": _Family(head_norms=True),
    "qwen3_moe": _Family(head_norms=True),
    "qwen3_next": _QWEN3_NEXT,
    "qwen3_5_text": _QWEN3_5,
    "qwen3_5_moe_text": _QWEN3_5,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearAttention:
    """Sizes of the recurrent layers (gated delta rule)."""

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    kernel_size: int

    @property
    def key_dim(self) -> int:
        return self.num_key_heads * self.key_head_dim

    @property
    def value_dim(self) -> int:
        return self.num_value_heads * self.value_head_dim

    @property
    def conv_dim(self) -> int:
        return 2 * self.key_dim + self.value_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The shape of a decoder."""

    name: str  # the class that the configuration names: Qwen3NextForCausalLM
    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    context_length: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    layer_types: tuple[str, ...]  # one a layer: full_attention, sliding_attention, linear_attention
    tied_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    prefix: str  # of the names of the decoder's modules in the checkpoint
    num_experts: int  # routed experts a layer; 0 for a dense model
    num_experts_per_token: int
    expert_size: int
    shared_expert_size: int
    sparse_layers: frozenset[int]  # layers with experts
    linear_attention: LinearAttention | None

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that the attention layers keep of each token; times the size of a number gives bytes."""
        num_attention_layers = sum(kind != "linear_attention" for kind in self.layer_types)
        return num_attention_layers * 2 * self.num_kv_heads * self.head_dim

    def state_bytes_per_sequence(self, value_bytes: int) -> int:
        """Recurrent state and convolution window of one sequence.

        Our kernel keeps both in float32, the window without the newest column; transformers' own layers keep a whole
        window of numbers of `value_bytes`.
        """
        if self.linear_attention is None:
            return 0
        sizes = self.linear_attention
        num_layers = self.layer_types.count("linear_attention")
        recurrent = sizes.num_value_heads * sizes.key_head_dim * sizes.value_head_dim * _STATE_BYTES
        window = sizes.conv_dim * max((sizes.kernel_size - 1) * _STATE_BYTES, sizes.kernel_size * value_bytes)
        return num_layers * (recurrent + window)

    @property
    def is_enumerable(self) -> bool:
        """Whether we know this family's modules well enough to count them without its weights."""
        return self.model_type in _FAMILIES

    def modules(self) -> Iterator[Module]:
        """Every module with parameters, in the order of the layers; only where `is_enumerable`."""
        family = _FAMILIES[self.model_type]
        hidden = self.hidden_size
        yield Module(f"{self.prefix}embed_tokens", self.vocab_size, hidden, linear=False)
        for index, kind in enumerate(self.layer_types):
            layer = f"{self.prefix}layers.{index}."
            if kind == "linear_attention":
                yield from self._linear_attention(f"{layer}linear_attn.", family)
            else:
                yield from self._attention(f"{layer}self_attn.", family)
            if index in self.sparse_layers:
                yield from self._experts(f"{layer}mlp.")
            else:
                yield from _gated_mlp(f"{layer}mlp.", hidden, self.intermediate_size, bias=self.mlp_bias)
            yield Module(f"{layer}input_layernorm", hidden)
            yield Module(f"{layer}post_attention_layernorm", hidden)
        yield Module(f"{self.prefix}norm", hidden)
        if not self.tied_embeddings:
            yield Module("lm_head", self.vocab_size, hidden, linear=False)

    def _attention(self, prefix: str, family: _Family) -> Iterator[Module]:
        hidden, queries, keys = (
            self.hidden_size,
            self.num_attention_heads * self.head_dim,
            self.num_kv_heads * self.head_dim,
        )
        bias = self.attention_bias or family.qkv_bias
        yield Module(f"{prefix}q_proj", queries * (2 if family.gated_attention else 1), hidden, bias=bias)
        yield Module(f"{prefix}k_proj", keys, hidden, bias=bias)
        yield Module(f"{prefix}v_proj", keys, hidden, bias=bias)
        yield Module(f"{prefix}o_proj", hidden, queries, bias=self.attention_bias)
        if family.head_norms:
            yield Module(f"{prefix}q_norm", self.head_dim)
            yield Module(f"{prefix}k_norm", self.head_dim)

    def _linear_attention(self, prefix: str, family: _Family) -> Iterator[Module]:
        hidden, sizes = self.hidden_size, self.linear_attention
        assert sizes is not None  # read_architecture sees to it
        heads = sizes.num_value_heads
        if family.split_projections:
            projections = {"qkv": sizes.conv_dim, "z": sizes.value_dim, "b": heads, "a": heads}
        else:
            projections = {"qkvz": sizes.conv_dim + sizes.value_dim, "ba": 2 * heads}
        for name, width in projections.items():
            yield Module(f"{prefix}in_proj_{name}", width, hidden)
        yield Module(f"{prefix}out_proj", hidden, sizes.value_dim)
        yield Module(f"{prefix}conv1d", sizes.conv_dim * sizes.kernel_size)
        yield Module(f"{prefix}norm", sizes.value_head_dim)
        yield Module(f"{prefix}A_log", heads)
        yield Module(f"{prefix}dt_bias", heads)

    def _experts(self, prefix: str) -> Iterator[Module]:
        hidden, width = self.hidden_size, self.expert_size
        for name, outputs, inputs in (("gate", width, hidden), ("up", width, hidden), ("down", hidden, width)):
            yield Module(f"{prefix}experts.0.{name}_proj", outputs, inputs, copies=self.num_experts)
        yield Module(f"{prefix}gate", self.num_experts, hidden, linear=False)
        if self.shared_expert_size:
            yield from _gated_mlp(f"{prefix}shared_expert.", hidden, self.shared_expert_size)
            yield Module(f"{prefix}shared_expert_gate", 1, hidden)


def _gated_mlp(prefix: str, hidden: int, width: int, *, bias: bool = False) -> Iterator[Module]:
    yield Module(f"{prefix}gate_proj", width, hidden, bias=bias)
    yield Module(f"{prefix}up_proj", width, hidden, bias=bias)
    yield Module(f"{prefix}down_proj", hidden, width, bias=bias)


def read_architecture(config: Mapping[str, Any], *, file: str) -> Architecture:
    """The shape that a config.json describes; a vision model's language part is taken from its `text_config`.

    Raises NotFoundError with all that is missing or impossible, naming `file`.
    """
    nested = config.get("text_config")
    text = _Reader(cast("Mapping[str, Any]", nested) if isinstance(nested, dict) else config)
    names = config.get("architectures")
    name = str(cast("list[object]", names)[0]) if isinstance(names, list) and names else ""
    if not name.endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")):
        text.fault("architectures", f"{name or 'nothing'} is not a model that writes text")
    num_layers = text.size("num_hidden_layers", most=_MAX_LAYERS)
    num_heads = text.size("num_attention_heads")
    hidden = text.size("hidden_size")
    num_experts = text.first("num_experts", "num_local_experts", "n_routed_experts")
    architecture = Architecture(
        name=name,
        model_type=str(text.values.get("model_type", "")),
        num_layers=num_layers,
        hidden_size=hidden,
        intermediate_size=text.size("intermediate_size", default=0),
        vocab_size=text.size("vocab_size"),
        context_length=text.size("max_position_embeddings"),
        num_attention_heads=num_heads,
        num_kv_heads=text.size("num_key_value_heads", default=num_heads),
        head_dim=text.size("head_dim", default=hidden // max(1, num_heads)),
        layer_types=_layer_types(text, num_layers),
        tied_embeddings=config.get("tie_word_embeddings", text.values.get("tie_word_embeddings", False)) is True,
        attention_bias=text.values.get("attention_bias") is True,
        mlp_bias=text.values.get("mlp_bias") is True,
        prefix="model.language_model." if isinstance(nested, dict) else "model.",
        num_experts=num_experts,
        num_experts_per_token=text.size("num_experts_per_tok", default=0) if num_experts else 0,
        expert_size=text.first("moe_intermediate_size", "intermediate_size") if num_experts else 0,
        shared_expert_size=text.size("shared_expert_intermediate_size", default=0) if num_experts else 0,
        sparse_layers=_sparse_layers(text, num_layers) if num_experts else frozenset(),
        linear_attention=_linear_attention(text),
    )
    if "linear_attention" in architecture.layer_types and architecture.linear_attention is None:
        text.fault("linear_num_value_heads", "is needed for layers of linear attention")
    if text.problems:
        raise NotFoundError(
            [Problem(f"{key}: {fault}", file, field="model.path") for key, fault in text.problems.items()]
        )
    return architecture


class _Reader:
    """Reads numbers from a configuration and remembers all that is wrong with them."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.problems: dict[str, str] = {}

    def fault(self, key: str, reason: str) -> None:
        self.problems.setdefault(key, reason)

    def size(self, key: str, *, default: int | None = None, most: int = _MAX_SIZE) -> int:
        value = self.values.get(key)
        if value is None:
            value = default
        if type(value) is int and (1 <= value <= most or value == default):
            return value
        self.fault(key, "is missing" if value is None else f"{value!r:.40} is not a number from 1 to {most}")
        return 1

    def first(self, *keys: str) -> int:
        """The first of several spellings that is there; 0 if none is."""
        return next((self.size(key, default=0) for key in keys if self.values.get(key)), 0)


def _layer_types(text: _Reader, num_layers: int) -> tuple[str, ...]:
    given = text.values.get("layer_types")
    if isinstance(given, list):
        if len(cast("list[object]", given)) != num_layers:
            text.fault("layer_types", f"names {len(cast('list[object]', given))} layers of {num_layers}")
        return tuple(str(kind) for kind in cast("list[object]", given))
    if "full_attention_interval" not in text.values and "linear_num_value_heads" not in text.values:
        return ("full_attention",) * num_layers
    # As transformers fills it in: every fourth layer is attention unless told otherwise.
    interval = text.size("full_attention_interval", default=4)
    return tuple("linear_attention" if (index + 1) % interval else "full_attention" for index in range(num_layers))


def _sparse_layers(text: _Reader, num_layers: int) -> frozenset[int]:
    step = text.size("decoder_sparse_step", default=1)
    dense = text.values.get("mlp_only_layers") or ()
    first_sparse = text.size("first_k_dense_replace", default=0)
    return frozenset(
        index for index in range(first_sparse, num_layers) if (index + 1) % step == 0 and index not in dense
    )


def _linear_attention(text: _Reader) -> LinearAttention | None:
    if "linear_num_value_heads" not in text.values:
        return None
    return LinearAttention(
        num_key_heads=text.size("linear_num_key_heads"),
        num_value_heads=text.size("linear_num_value_heads"),
        key_head_dim=text.size("linear_key_head_dim"),
        value_head_dim=text.size("linear_value_head_dim"),
        kernel_size=text.size("linear_conv_kernel_dim"),
    )
