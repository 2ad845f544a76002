"""The same kernels for GPUs, in Triton, which comes with torch where torch is built for GPUs.

Nothing here is imported before a tensor on a GPU asks. Without Triton, or on a GPU older than Ampere, torch's own
operations compute what these would.
"""
# pyright: basic

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_LEAST_CAPABILITY = (8, 0)  # products of bfloat16


def is_served(device: torch.device) -> bool:
    """Whether kernels of ours run on this device."""
    return device.type == "cuda" and _is_served(device.index)


@cache
def _is_served(index: int | None) -> bool:
    import torch

    return find_spec("triton") is not None and torch.cuda.get_device_capability(index) >= _LEAST_CAPABILITY


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Kernels are started on the current GPU, whatever their arguments lie on; in Triton's interpreter that is none."""
    import torch

    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def power_of_two(least: int) -> int:
    """The smallest that is no less: what a block of a kernel measures."""
    return 1 << (least - 1).bit_length()
