"""Where the weights of a packed model come from: the checkpoint's own files, put into the kernels' order while read."""
# pyright: basic

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from pipeline.facts.architecture import read_architecture
from pipeline.facts.checkpoint import CONFIG, Checkpoint
from pipeline.facts.model_facts import SET_ASIDE, part_of
from pipeline.kernels.packed import BLOCK, PackedWeight
from pipeline.kernels.plain import PlainWeight
from pipeline.loading.weight_files import Matrix, Plain, Wanted, WeightShape, read_tensors, stored_tensors

if TYPE_CHECKING:
    from torch import Tensor

LayerWeights: TypeAlias = "tuple[PackedWeight, PackedWeight]"  # gate and up, down

_WORD_BITS = 32
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class Layer(NamedTuple):
    """What a layer's experts look like, and what is to be read into memory of theirs."""

    shape: tuple[WeightShape, WeightShape]
    wanted: Callable[[LayerWeights], Sequence[Wanted]]


class WeightSource(Protocol):
    """Weights by the names of the model's modules. What is asked for holds its values once `fill` has returned."""

    faults: dict[str, set[str]]  # keys that were missing, mismatched or unexpected, as transformers calls them

    @property
    def num_bytes(self) -> int:
        """What the next `fill` reads."""
        ...

    def has_linear(self, name: str) -> bool:
        """Whether the layer is packed."""
        ...

    def has_experts(self, name: str) -> bool: ...

    def linear(self, name: str) -> PackedWeight: ...

    def plain_linear(self, name: str, module: Any, /) -> PlainWeight | None:
        """A layer that is not packed in the kernel's own layout; None where that has to be made of `plain`."""
        ...

    def experts(self, name: str, module: Any) -> LayerWeights: ...

    def layer(self, name: str, module: Any) -> Layer:
        """The same for experts that are to be read anew for every pass."""
        ...

    def plain(self, name: str, parameter: Any) -> Tensor | None:
        """An unpacked parameter in the type and shape of the model's; None, and a fault, where there is none."""
        ...

    def fill(self, progress: Callable[[int], object]) -> None:
        """Read what was asked for. Raises NotFoundError as `Reader.read` does."""
        ...


class CheckpointSource:
    """A checkpoint of AutoRound's."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        architecture = read_architecture(checkpoint.config, file=str(checkpoint.directory / CONFIG))
        self._stored = {
            # The decoder of a model that also sees has a longer name in the files than alone.
            name.replace(architecture.prefix, "model.", 1) if name.startswith(architecture.prefix) else name: stored
            for name, stored in stored_tensors(checkpoint).items()
            if part_of(name) != SET_ASIDE
        }
        self._wanted: list[Wanted] = []
        self.faults = {"missing_keys": set(), "mismatched_keys": set(), "unexpected_keys": set()}

    @property
    def num_bytes(self) -> int:
        return sum(one.stored.num_bytes for one in self._wanted)

    def has_linear(self, name: str) -> bool:
        return f"{name}.qweight" in self._stored

    def has_experts(self, name: str) -> bool:
        return f"{name}.0.gate_proj.qweight" in self._stored

    def linear(self, name: str) -> PackedWeight:
        weight = self._shape(name, ()).new()
        self._wanted += self._matrices(name, weight)
        return weight

    def plain_linear(self, _name: str, _module: Any, /) -> None:
        return None

    def experts(self, name: str, module: Any) -> LayerWeights:
        layer = self.layer(name, module)
        weights = layer.shape[0].new(), layer.shape[1].new()
        self._wanted += layer.wanted(weights)
        return weights

    def layer(self, name: str, module: Any) -> Layer:
        gate_up = self._shape(f"{name}.0.gate_proj", (module.num_experts,), twice=True)
        down = self._shape(f"{name}.0.down_proj", (module.num_experts,))
        return Layer((gate_up, down), lambda weights: list(self._expert_matrices(name, weights)))

    def plain(self, name: str, parameter: Any) -> Tensor | None:
        import torch

        sources = list(self._sources(name, parameter))
        if not sources:
            self.faults["missing_keys"].add(name)
            return None
        values = torch.empty(parameter.shape, dtype=parameter.dtype)
        for key, index in sources:
            target, stored = values[index], self._stored[key]
            if target.numel() != torch.Size(stored.shape).numel():
                self.faults["mismatched_keys"].add(key)
            else:
                self._wanted.append(Plain(key, stored, target))
        return values

    def fill(self, progress: Callable[[int], object]) -> None:
        wanted, self._wanted = self._wanted, []
        read_tensors(wanted, progress)

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
                self.faults["missing_keys"].add(f"{name}.{leaf}")
            else:
                rows, columns = stored.shape
                yield Matrix(f"{name}.{leaf}", stored, target, rows, columns, size)
