"""Loads an AutoRound checkpoint packed, at the speed of the disk: nothing is built for single experts.

transformers builds the model without memory; every packed layer and every layer's experts are replaced by a module of
ours, whose tensors are filled straight from the files. What is not packed is transformers' own. On a GPU dense layers
are unpacked, since a GPU has no kernel of ours and they are few; routed experts stay packed wherever they lie.
"""
# pyright: basic

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pipeline.facts.architecture import read_architecture
from pipeline.facts.checkpoint import CONFIG, Checkpoint
from pipeline.facts.model_facts import SET_ASIDE, part_of
from pipeline.kernels.packed import BLOCK, PackedWeight, dequantize
from pipeline.loading.expert_stream import ExpertStream, Layer, LayerWeights
from pipeline.loading.unpack import GENERATION_CONFIG
from pipeline.loading.weight_files import Matrix, Plain, Wanted, WeightShape, read_tensors, stored_tensors
from pipeline.plan.plan import Plan

if TYPE_CHECKING:
    import torch

_WORD_BITS = 32
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def load_packed(
    plan: Plan, checkpoint: Checkpoint, show_progress: bool = False
) -> tuple[torch.nn.Module, dict[str, set[str]]]:
    """The model as the plan places it, and the keys that were missing, mismatched or unexpected.

    Raises NotFoundError for files that changed since they were looked at, or zero points of a layer that is not
    symmetric.
    """
    import torch
    from transformers import GenerationConfig

    model = _skeleton(checkpoint, getattr(torch, plan.dtype))
    loading = _Loading(plan, checkpoint, model)
    loading.replace_modules()
    loading.make_room()
    with _bar(loading.num_bytes, shown=show_progress) as progress:
        read_tensors(loading.wanted, progress)
        loading.finish(progress)
    if (checkpoint.directory / GENERATION_CONFIG).exists():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.directory)
    return model.eval(), loading.info


def _skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """transformers' own model without memory for its weights; of a model that also sees, the part that writes."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    config: Any = AutoConfig.from_pretrained(checkpoint.directory, local_files_only=True)
    vars(config).pop("quantization_config", None)
    tied = checkpoint.config.get("tie_word_embeddings")
    config = config.get_text_config()
    if tied is not None:  # a model that also sees says it outside its `text_config`
        config.tie_word_embeddings = tied
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        model = model_class._from_config(config, dtype=dtype)
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):  # rotary frequencies: computed, not stored
            model.set_submodule(name, type(module)(module.config))
    return model


@contextlib.contextmanager
def _bar(num_bytes: int, *, shown: bool) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="loading", disable=not shown) as bar:
        yield bar.update


class _Loading:
    """One load: which tensor of the files goes where."""

    def __init__(self, plan: Plan, checkpoint: Checkpoint, model: Any) -> None:
        import torch

        architecture = read_architecture(checkpoint.config, file=str(checkpoint.directory / CONFIG))
        self._plan, self._model, self._int8 = plan, model, plan.activation == "int8"
        self._device = torch.device(plan.device)
        self._num_expert_layers = len(architecture.sparse_layers)
        self._stream = ExpertStream()
        self._stored = {
            # The decoder of a model that also sees has a longer name in the files than alone.
            name.replace(architecture.prefix, "model.", 1) if name.startswith(architecture.prefix) else name: stored
            for name, stored in stored_tensors(checkpoint).items()
            if part_of(name) != SET_ASIDE
        }
        self.wanted: list[Wanted] = []
        self.info: dict[str, set[str]] = {"missing_keys": set(), "mismatched_keys": set(), "unexpected_keys": set()}
        self._unpack: dict[str, PackedWeight] = {}
        self._for_gpu: dict[str, tuple[WeightShape, WeightShape]] = {}

    @property
    def num_bytes(self) -> int:
        return sum(one.stored.num_bytes for one in self.wanted)

    def replace_modules(self) -> None:
        from torch import nn

        place = 0
        for name, module in list(self._model.named_modules()):
            if isinstance(module, nn.Linear) and f"{name}.qweight" in self._stored:
                self._replace_linear(name, module)
            elif f"{name}.0.gate_proj.qweight" in self._stored:
                self._replace_experts(name, module, place)
                place += 1

    def _replace_linear(self, name: str, module: Any) -> None:
        from pipeline.loading.packed_modules import QuantizedLinear

        weight = self._shape(name, ()).new()
        self.wanted += self._matrices(name, weight)
        if self._device.type == "cpu":
            self._model.set_submodule(name, QuantizedLinear(weight, module.bias, int8=self._int8))
        else:
            self._unpack[name] = weight
            module.weight = None

    def _replace_experts(self, name: str, module: Any, place: int) -> None:
        from pipeline.loading.packed_modules import QuantizedExperts, StreamedExperts

        gate_up = self._shape(f"{name}.0.gate_proj", (module.num_experts,), twice=True)
        down = self._shape(f"{name}.0.down_proj", (module.num_experts,))
        if self._is_streamed(place):
            layer = Layer((gate_up, down), lambda weights: list(self._expert_matrices(name, weights)))
            self._model.set_submodule(name, StreamedExperts(self._stream, self._stream.add(layer), int8=self._int8))
            return
        if self._device.type != "cpu" and place < self._plan.num_expert_layers_on_gpu:
            self._for_gpu[name] = gate_up, down
            return
        weights = gate_up.new(), down.new()
        self.wanted += self._expert_matrices(name, weights)
        self._model.set_submodule(name, QuantizedExperts(*weights, int8=self._int8))

    def _is_streamed(self, place: int) -> bool:
        """Streamed layers are spread evenly over those that are not on a GPU: reading has the time of the others."""
        streamed, on_gpu = self._plan.num_streamed_layers, self._plan.num_expert_layers_on_gpu
        host, at = self._num_expert_layers - on_gpu, place - on_gpu
        return at >= 0 and (at + 1) * streamed // host > at * streamed // host

    def _expert_matrices(self, name: str, weights: LayerWeights) -> Iterator[Matrix]:
        gate_up, down = weights
        half = gate_up.num_outputs // 2 // BLOCK
        for expert in range(len(gate_up.codes)):
            into = gate_up[expert]
            for projection, weight in zip(_PROJECTIONS, (into[:half], into[half:], down[expert]), strict=True):
                yield from self._matrices(f"{name}.{expert}.{projection}", weight)

    def _shape(self, name: str, stack: tuple[int, ...], *, twice: bool = False) -> WeightShape:
        """Of layers like the stored one called `name`, or of two such side by side."""
        codes, scales, zeros = (self._stored[f"{name}.{leaf}"].shape for leaf in ("qweight", "scales", "qzeros"))
        bits = zeros[1] * _WORD_BITS // scales[1]
        return WeightShape(stack, scales[1] * (2 if twice else 1), codes[0], scales[0], bits)

    def _matrices(self, name: str, weight: PackedWeight) -> Iterator[Matrix]:
        half = 1 << (weight.bits - 1)
        zero = sum((half - 1) << shift for shift in range(0, _WORD_BITS, weight.bits))
        if zero >= 1 << 31:
            zero -= 1 << 32
        targets = (
            ("qweight", weight.codes.data_ptr(), 4),
            ("scales", weight.scales.data_ptr(), 2),
            ("qzeros", zero, 0),
        )
        for leaf, target, size in targets:
            stored = self._stored.get(f"{name}.{leaf}")
            if stored is None:
                self.info["missing_keys"].add(f"{name}.{leaf}")
            else:
                rows, columns = stored.shape
                yield Matrix(f"{name}.{leaf}", stored, target, rows, columns, size)

    def make_room(self) -> None:
        """Memory for what is not packed, and where it is read from."""
        import torch
        from torch import nn

        self._model.tie_weights()
        later = tuple(f"{name}." for name in self._for_gpu)
        for name, parameter in list(self._model.named_parameters()):
            if name.startswith(later):
                continue
            sources = list(self._sources(name, parameter))
            if not sources:
                self.info["missing_keys"].add(name)
                continue
            values = torch.empty(parameter.shape, dtype=parameter.dtype)
            for key, index in sources:
                target, stored = values[index], self._stored[key]
                if target.numel() != torch.Size(stored.shape).numel():
                    self.info["mismatched_keys"].add(key)
                else:
                    self.wanted.append(Plain(key, stored, target))
            owner, _, leaf = name.rpartition(".")
            setattr(self._model.get_submodule(owner), leaf, nn.Parameter(values, requires_grad=False))
        self._model.tie_weights()

    def _sources(self, name: str, parameter: Any) -> Iterator[tuple[str, Any]]:
        """The stored tensors that make up a parameter, each with its place in it."""
        if name in self._stored:
            yield name, ...
            return
        experts, _, leaf = name.rpartition(".")
        half = parameter.shape[1] // 2 if parameter.dim() == 3 else 0
        places = {
            "gate_up_proj": {"gate_proj": slice(None, half), "up_proj": slice(half, None)},
            "down_proj": {"down_proj": slice(None)},
        }
        for projection, rows in places.get(leaf, {}).items() if half else ():
            for expert in range(len(parameter)):
                key = f"{experts}.{expert}.{projection}.weight"
                if key in self._stored:
                    yield key, (expert, rows)

    def finish(self, progress: Callable[[int], object]) -> None:
        """Bring everything to its device; experts for a GPU layer by layer, so that the host never holds them all."""
        if self._device.type == "cpu":
            return
        from torch import nn

        from pipeline.loading.packed_modules import QuantizedExperts

        on_host = {name for name, module in self._model.named_modules() if isinstance(module, QuantizedExperts)}
        for name, (gate_up, down) in self._for_gpu.items():
            weights = gate_up.new(), down.new()
            read_tensors(self._expert_matrices(name, weights), progress)
            self._model.set_submodule(name, QuantizedExperts(*map(self._on_device, weights)))
        for name, weight in self._unpack.items():
            unpacked = dequantize(self._on_device(weight), self._model.dtype)
            self._model.get_submodule(name).weight = nn.Parameter(unpacked, requires_grad=False)
        for name, module in self._model.named_modules():
            if name not in on_host:
                _move_own(module, self._device)
        self._model.tie_weights()

    def _on_device(self, weight: PackedWeight) -> PackedWeight:
        return PackedWeight(weight.codes.to(self._device), weight.scales.to(self._device), weight.bits)


def _move_own(module: Any, device: torch.device) -> None:
    """What a module itself holds, without its children."""
    from torch import nn

    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(parameter.data.to(device), requires_grad=False))
    for name, buffer in list(module.named_buffers(recurse=False)):
        setattr(module, name, buffer.to(device))
