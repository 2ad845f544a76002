"""Arithmetic in which a row's numbers never depend on the rows beside it, bit for bit: that of deterministic mode.

Libraries choose kernels by the sizes of matrices, so that a row's last bits change with the number of its neighbours;
and vectorized functions treat the last numbers of a tensor, or of a thread's share of it, in another way than the rest.
Within `row_invariant` both are replaced where a model's code calls them; what cannot be is refused. All else that a
decoder does to its rows (sums over a row, products and sums of numbers, choices) is the same for each row already.
"""
# pyright: basic

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from pipeline.engines.slot_cache import NotServedError
from pipeline.kernels.plain import matrix_linear

if TYPE_CHECKING:
    from torch import Tensor

_POINTWISE = (
    *("exp", "expm1", "log", "log1p", "sigmoid", "tanh", "erf", "cos", "sin"),
    *("silu", "gelu", "softplus", "mish", "elu", "selu", "hardsigmoid", "logsigmoid"),
)
_PRODUCTS = ("matmul", "mm", "__matmul__")
_REFUSED = (
    *("bmm", "baddbmm", "einsum", "tensordot", "bilinear", "conv1d", "conv2d", "conv_transpose1d"),
    *("scaled_dot_product_attention", "_grouped_mm", "grouped_mm"),
)
# What torch leaves to one thread (32768 numbers, with gelu 16384), and a multiple of the numbers that any processor's
# vectors, unrolled, take together: within such a piece all numbers are treated alike.
_PIECE, _WHOLE = 16384, 128


def row_invariant() -> AbstractContextManager[Any]:
    """Within this block torch's functions compute each row as if alone, or raise NotServedError.

    Call it where `plain.is_served`. What calls a kernel of ours directly answers for itself.
    """
    from torch.overrides import TorchFunctionMode

    class RowInvariant(TorchFunctionMode):
        """Replaces the functions of the table; the others pass."""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            replacement = _replacements().get(func)
            if replacement is None:
                return func(*args, **(kwargs or {}))
            return replacement(*args, **(kwargs or {}))

    return RowInvariant()


@cache
def _replacements() -> dict[Any, Callable[..., Any]]:
    import torch

    table: dict[Any, Callable[..., Any]] = {torch.nn.functional.linear: _linear, torch.addmm: _addmm}
    table |= {function: partial(_in_pieces, function) for function in _named(_POINTWISE)}
    in_place = {name: f"{name}_" for name in _POINTWISE if hasattr(torch.Tensor, f"{name}_")}
    table |= {getattr(torch.Tensor, own): partial(_in_place, getattr(torch, name)) for name, own in in_place.items()}
    table |= {function: partial(_product, function) for function in _named(_PRODUCTS)}
    table |= {function: partial(_sum, function) for function in _named(("sum", "mean"))}
    table |= {function: partial(_outer_or_refused, function) for function in _named(_REFUSED)}
    return table


def _named(names: tuple[str, ...]) -> Iterator[Any]:
    """The functions and methods of torch with these names."""
    import torch

    for name in names:
        for home in (torch, torch.Tensor, torch.nn.functional):
            if (function := getattr(home, name, None)) is not None:
                yield function


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = matrix_linear(x, weight)
    return out if bias is None else out + bias


def _addmm(bias: Tensor, x: Tensor, weight: Tensor, **factors: float) -> Tensor:
    if factors:
        raise NotServedError("a product with factors")
    return _linear(x, weight.T, bias)


def _product(function: Any, x: Tensor, other: Tensor) -> Tensor:
    if other.dim() == 2 and x.dim() >= 2:
        return matrix_linear(x, other.T)
    return _outer_or_refused(function, x, other)


def _outer_or_refused(function: Any, *arguments: Any, **named: Any) -> Any:
    """A product over one number is exact in any order; of others no row's order is known."""
    import torch

    first, second = (*arguments, None, None)[:2]
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor) and min(first.dim(), second.dim()) >= 2:
        name = getattr(function, "__name__", "")
        if name in {*_PRODUCTS, "bmm"} and first.shape[-1] == second.shape[-2] == 1:
            return function(*arguments, **named)
    raise NotServedError(f"it computes {getattr(function, '__name__', function)} in a way that is not row by row")


def _in_pieces(function: Any, x: Tensor, *others: Any, **named: Any) -> Tensor:
    """A function of each number, over whole vectors of one thread only."""
    import torch

    if not x.is_floating_point():
        return function(x, *others, **named)
    if named.pop("inplace", False):
        return x.copy_(_in_pieces(function, x, *others, **named))
    flat = x.contiguous().view(-1)
    size = len(flat)
    if size % _WHOLE:
        flat = torch.nn.functional.pad(flat, (0, -size % _WHOLE))
    pieces = [function(piece, *others, **named) for piece in flat.split(_PIECE)]
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces))[:size].view(x.shape)


def _in_place(function: Any, x: Tensor) -> Tensor:
    return x.copy_(_in_pieces(function, x))


def _sum(function: Any, x: Tensor, *others: Any, **named: Any) -> Tensor:
    """A single row may be shared out among threads; two are not."""
    if x.dim() == 2 and len(x) == 1 and (others or named):
        return function(x.expand(2, -1).contiguous(), *others, **named)[:1]
    return function(x, *others, **named)
