"""Loads an AutoRound checkpoint packed, at the speed of the disk: nothing is built for single experts.

transformers builds the model without memory; every packed layer and every layer's experts are replaced by a module of
ours, whose tensors are filled straight from the files. What is not packed is transformers' own. On a GPU dense layers
are unpacked, since a GPU has no kernel of ours and they are few; routed experts stay packed wherever they lie.
"""
# pyright: basic

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline.facts.architecture import read_architecture
from pipeline.facts.checkpoint import CONFIG, Checkpoint
from pipeline.kernels.packed import PackedWeight, dequantize
from pipeline.loading.expert_stream import ExpertStream
from pipeline.loading.keeping import Keeping
from pipeline.loading.resolve import model_identity
from pipeline.loading.unpack import GENERATION_CONFIG
from pipeline.loading.weight_source import CheckpointSource, WeightSource
from pipeline.plan.plan import Plan

if TYPE_CHECKING:
    import torch


def load_packed(
    plan: Plan, checkpoint: Checkpoint, show_progress: bool = False, report: Callable[[str], object] = str
) -> tuple[torch.nn.Module, dict[str, set[str]]]:
    """The model as the plan places it, and the keys that were missing, mismatched or unexpected.

    From repacked weights where the plan keeps such and has them. `report` takes sentences for the user. Raises
    NotFoundError for files that changed since they were looked at, or zero points of a layer that is not symmetric.
    """
    keeping = plan.repack_cache and Keeping(plan.repack_cache, _identity(plan, checkpoint), report)
    source = keeping and keeping.open()
    if keeping and source is None and keeping.comes_first:
        thin = _spread_thin(plan, checkpoint)
        keeping.make(_load(thin, checkpoint, CheckpointSource(checkpoint), show_progress)[0])
        source = keeping.open()
    if source is not None:
        return _load(plan, checkpoint, source, show_progress)
    model, faults = _load(plan, checkpoint, CheckpointSource(checkpoint), show_progress)
    if keeping and not any(faults.values()):
        keeping.make_beside(model)
    return model, faults


def use_plain_kernel(plan: Plan, model: torch.nn.Module) -> None:
    """Have layers that are not packed computed by our kernel, if the plan says so and there is one."""
    from pipeline.kernels.plain import is_served
    from pipeline.loading.packed_modules import put_linears_in_blocks

    if plan.plain_kernel and is_served():
        put_linears_in_blocks(model)


def _identity(plan: Plan, checkpoint: Checkpoint) -> str:
    """What repacked weights depend on, their layout apart."""
    from pipeline.kernels.plain import is_served

    plain_kernel = plan.plain_kernel and is_served()
    return f"{model_identity(checkpoint.directory)} {plan.dtype} {plain_kernel}"


def _spread_thin(plan: Plan, checkpoint: Checkpoint) -> Plan:
    """The same with no more than two layers of experts in memory."""
    architecture = read_architecture(checkpoint.config, file=str(checkpoint.directory / CONFIG))
    return replace(plan, num_streamed_layers=len(architecture.sparse_layers))


def _load(
    plan: Plan, checkpoint: Checkpoint, source: WeightSource, show_progress: bool
) -> tuple[torch.nn.Module, dict[str, set[str]]]:
    import torch
    from transformers import GenerationConfig

    model = _skeleton(checkpoint, getattr(torch, plan.dtype))
    loading = _Loading(plan, source, model)
    loading.put_plain_in_blocks()
    loading.replace_modules()
    loading.make_room()
    with _bar(source.num_bytes, shown=show_progress) as progress:
        source.fill(progress)
        loading.finish(progress)
    if (checkpoint.directory / GENERATION_CONFIG).exists():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.directory)
    use_plain_kernel(plan, model)
    return model.eval(), source.faults


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
    """One load: which module takes the place of which, and where its weights go."""

    def __init__(self, plan: Plan, source: WeightSource, model: Any) -> None:
        import torch

        self._plan, self._model, self._source = plan, model, source
        self._int8 = plan.activation == "int8"
        self._device = torch.device(plan.device)
        numbered = enumerate(plan.expert_layers_on_gpus)
        # The first layers' experts: one GPU after the other.
        self._gpus = [torch.device(self._device.type, gpu) for gpu, layers in numbered for _ in range(layers)]
        self._stream = ExpertStream()
        self._unpack: dict[str, PackedWeight] = {}
        self._for_gpus: dict[str, tuple[Any, torch.device]] = {}

    def put_plain_in_blocks(self) -> None:
        """Layers that are not packed, one by one and before all else: changing their form takes twice their room.

        A head that is the embedding too waits for that (`use_plain_kernel`).
        """
        from torch import nn

        from pipeline.kernels.plain import in_plain_blocks, is_served
        from pipeline.loading.packed_modules import PlainLinear

        if not self._plan.plain_kernel or not is_served():
            return
        tied = self._model.get_input_embeddings().weight
        for name, module in list(self._model.named_modules()):
            if type(module) is not nn.Linear or module.weight is tied or self._source.has_linear(name):
                continue
            weight = self._source.plain_linear(name, module)
            if weight is None:
                values = self._source.plain(f"{name}.weight", module.weight)
                if values is None:
                    continue
                self._source.fill(lambda _num_bytes: None)
                weight = in_plain_blocks(values)
            self._model.set_submodule(name, PlainLinear(weight, module.bias))

    def replace_modules(self) -> None:
        from torch import nn

        modules = list(self._model.named_modules())
        experts = [(name, module) for name, module in modules if self._source.has_experts(name)]
        for place, (name, module) in enumerate(experts):
            self._replace_experts(name, module, place, len(experts))
        for name, module in modules:
            if isinstance(module, nn.Linear) and self._source.has_linear(name):
                self._replace_linear(name, module)

    def _replace_linear(self, name: str, module: Any) -> None:
        from pipeline.loading.packed_modules import QuantizedLinear

        weight = self._source.linear(name)
        if self._device.type == "cpu":
            self._model.set_submodule(name, QuantizedLinear(weight, module.bias, int8=self._int8))
        else:
            self._unpack[name] = weight
            module.weight = None

    def _replace_experts(self, name: str, module: Any, place: int, num_layers: int) -> None:
        from pipeline.loading.packed_modules import QuantizedExperts, StreamedExperts

        if self._is_streamed(place, num_layers):
            layer = self._source.layer(name, module)
            self._model.set_submodule(name, StreamedExperts(self._stream, self._stream.add(layer), int8=self._int8))
        elif place < len(self._gpus):
            self._for_gpus[name] = module, self._gpus[place]
        else:
            self._model.set_submodule(name, QuantizedExperts(*self._source.experts(name, module), int8=self._int8))

    def _is_streamed(self, place: int, num_layers: int) -> bool:
        """Streamed layers are spread evenly over those that are not on a GPU: reading has the time of the others."""
        streamed, on_gpus = self._plan.num_streamed_layers, len(self._gpus)
        host, at = num_layers - on_gpus, place - on_gpus
        return at >= 0 and (at + 1) * streamed // host > at * streamed // host

    def make_room(self) -> None:
        """What is not packed."""
        from torch import nn

        self._model.tie_weights()
        later = tuple(f"{name}." for name in self._for_gpus)
        for name, parameter in list(self._model.named_parameters()):
            if name.startswith(later):
                continue
            values = self._source.plain(name, parameter)
            if values is not None:
                owner, _, leaf = name.rpartition(".")
                setattr(self._model.get_submodule(owner), leaf, nn.Parameter(values, requires_grad=False))
        self._model.tie_weights()

    def finish(self, progress: Callable[[int], object]) -> None:
        """Bring everything to its device; experts for GPUs layer by layer, so that the host never holds them all."""
        if self._device.type == "cpu":
            return
        from torch import nn

        from pipeline.loading.packed_modules import QuantizedExperts

        for name, (module, gpu) in self._for_gpus.items():
            gate_up, down = self._source.experts(name, module)
            self._source.fill(progress)
            self._model.set_submodule(name, QuantizedExperts(_moved(gate_up, gpu), _moved(down, gpu)))
        for name, weight in self._unpack.items():
            unpacked = dequantize(_moved(weight, self._device), self._model.dtype)
            self._model.get_submodule(name).weight = nn.Parameter(unpacked, requires_grad=False)
        for module in self._model.modules():
            if not isinstance(module, QuantizedExperts):  # which lie where they are to stay
                _move_own(module, self._device)
        self._model.tie_weights()


def _moved(weight: PackedWeight, device: torch.device) -> PackedWeight:
    return PackedWeight(weight.codes.to(device), weight.scales.to(device), weight.bits)


def _move_own(module: Any, device: torch.device) -> None:
    """What a module itself holds, without its children."""
    from torch import nn

    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(parameter.data.to(device), requires_grad=False))
    for name, buffer in list(module.named_buffers(recurse=False)):
        setattr(module, name, buffer.to(device))
