"""A decoder layer of rotary attention and a gated MLP as one call of native code.

It computes what the calls of its parts would, in their order and bit for bit; what it saves is Python between them.
"""
# pyright: basic

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.kernels import attention, packed, rowwise
from pipeline.kernels.native import native

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

SOURCE = Path(__file__).with_name("decoder_layer.c")


class Norm(NamedTuple):
    """An RMS norm: what it multiplies with, float32 [size], and its epsilon."""

    weight: Tensor
    epsilon: float


class AttentionParts(NamedTuple):
    """Attention of heads of `size` numbers; `projections` are one layer, or those of queries, keys and values."""

    projections: Sequence[packed.Layer]
    output: packed.Layer
    norms: tuple[Tensor | None, Tensor | None]  # of queries and keys, float32 [size]
    epsilon: float
    heads: int
    key_heads: int
    size: int
    scale: float
    window: int | None


class MlpParts(NamedTuple):
    """down(silu(gate(x)) * up(x))."""

    gate: packed.Layer
    up: packed.Layer
    down: packed.Layer


class Rows:
    """Which rows of a step are of what, for all its layers: first single tokens of sequences, then parts of prompts.

    `places` int64 [rows] in the pools; `starts`, `lengths` and `alike` as `attention.attend_one` takes them, `spans` as
    `attention.attend_prompts` does. It may be used as long as these tensors are not written to, by one layer at a time:
    what a layer computes in between lies where it lay for the one before.
    """

    def __init__(
        self, places: Tensor, starts: Tensor, lengths: Tensor, alike: Tensor | None, spans: Tensor | None
    ) -> None:
        self._tensors = places, starts, lengths, alike, spans  # that they stay
        self.num_rows = len(places)
        self._room: Tensor | None = None
        addresses = (None if tensor is None else tensor.data_ptr() for tensor in self._tensors)
        self.described = ctypes.byref(
            _Rows(*addresses, self.num_rows, len(starts), 0 if spans is None else len(spans)),
        )

    def room(self, num_bytes: int) -> Tensor:
        """At least so many bytes, uint8, whatever is in them."""
        import torch

        if self._room is None or len(self._room) < num_bytes:
            self._room = torch.empty(num_bytes, dtype=torch.uint8)
        return self._room


class DecoderLayer:
    """x + attention(norm(x)), then that plus mlp(norm of it), for rows of one type."""

    @staticmethod
    def is_served(attends: AttentionParts, mlp: MlpParts, dtype: torch.dtype) -> bool:
        """Whether native code takes such parts and rows."""
        products = (*attends.projections, attends.output, *mlp)
        return (
            all(library is not None for library in (_library(), *_libraries()))
            and all(one.row_type(dtype) == dtype for one in products)
            and attends.size <= attention.MOST_SIZE
            and attends.heads <= attention.MOST_GROUP * attends.key_heads
        )

    def __init__(self, first: Norm, attends: AttentionParts, second: Norm, mlp: MlpParts, dtype: torch.dtype) -> None:
        import torch

        self._parts = first, attends, second, mlp  # that they stay
        projections = (_Product * 3)(*(_product(one, dtype) for one in attends.projections))
        self._described = _DecoderLayer(
            *(None if one is None else one.data_ptr() for one in (first.weight, second.weight, *attends.norms)),
            *(projections, *(_product(one, dtype) for one in (attends.output, *mlp))),
            *(len(attends.projections), attends.heads, attends.key_heads, attends.size, attends.window or 0),
            *(first.epsilon, second.epsilon, attends.epsilon, attends.scale, dtype == torch.bfloat16),
        )

    def __call__(self, x: Tensor, rows: Rows, angles: tuple[Tensor, Tensor], pools: tuple[Tensor, Tensor]) -> Tensor:
        """x [rows, hidden] of the layer's type; `angles` and `pools` as `rowwise.rotate` takes them.

        Keys and values are put into the pools. Raises MemoryError where there is no room.
        """
        import torch

        x = x.contiguous()
        cosine, sine = (angle.contiguous() for angle in angles)
        keys, values = pools
        out = torch.empty_like(x)
        context = _Context(
            *(cosine.data_ptr(), sine.data_ptr(), cosine.shape[-1], keys.data_ptr(), values.data_ptr()),
        )
        library = _library()
        assert library is not None  # `is_served` has said so
        failed = library.decoder_layer(
            ctypes.byref(_functions()),
            ctypes.byref(self._described),
            rows.described,
            ctypes.byref(context),
            x.data_ptr(),
            rows.room(library.decoder_layer_bytes(ctypes.byref(self._described), rows.num_rows)).data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError("no memory for the activations of a layer")
        return out


def _product(layer: packed.Layer, dtype: torch.dtype) -> _Product:
    return _Product(layer.description, layer.kind(layer.row_type(dtype)))


def _libraries() -> tuple[ctypes.CDLL | None, ...]:
    return rowwise.native_library(), packed.native_library(), attention.native_library()


@cache
def _functions() -> _Functions:
    rows, products, attending = _libraries()
    assert rows
    assert products
    assert attending
    functions = (
        *(rows.norm, products.packed_linear, products.packed_gated, rows.rotate),
        *(attending.attend_one, attending.attend_prompts),
    )
    return _Functions(*(ctypes.cast(function, ctypes.c_void_p) for function in functions))


class _Functions(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_void_p) for name in ("norm", "linear", "gated", "rotate", "attend_one", "attend_prompts")
    )


class _Product(ctypes.Structure):
    _fields_ = (("layer", packed.Description), ("kind", ctypes.c_int))


class _DecoderLayer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("first_norm", "second_norm", "query_norm", "key_norm")),
        ("projections", _Product * 3),
        *((name, _Product) for name in ("output", "gate", "up", "down")),
        *((name, ctypes.c_int64) for name in ("num_projections", "heads", "key_heads", "size", "window")),
        *((name, ctypes.c_float) for name in ("first_epsilon", "second_epsilon", "head_epsilon", "scale")),
        ("is_bf16", ctypes.c_int),
    )


class _Rows(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("places", "starts", "lengths", "alike", "spans")),
        *((name, ctypes.c_int64) for name in ("num_rows", "num_single", "num_spans")),
    )


class _Context(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("cosine", "sine")),
        ("rotated", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
    )


@cache
def _library() -> ctypes.CDLL | None:
    library = native(SOURCE).library
    if library is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        library.decoder_layer.argtypes = (*[pointer] * 7, number)
        library.decoder_layer_bytes.argtypes, library.decoder_layer_bytes.restype = (pointer, number), number
    return library
