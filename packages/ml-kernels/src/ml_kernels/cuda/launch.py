"""What the Triton kernels of this folder share: sizes of tiles, and the device they start on.

A kernel works on tiles of rows: a few whole rows of a narrow tensor, a single one of a wide one. A
power of two of numbers makes a tile, as Triton needs it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from triton import language as tl


class Tile(NamedTuple):
    """The shape of a tile, and the warps that work on it."""

    rows: int
    columns: int
    warps: int


@cache
def tile_of(width: int, numbers: int, each: int) -> Tile:
    """Return tiles of whole rows of a width.

    Args:
        width: Of a row.
        numbers: Of a tile, if a row has fewer.
        each: Numbers that a thread holds, more in tiles of many.
    """
    columns = power_of_2(width)
    rows = max(1, numbers // columns)
    return Tile(rows, columns, min(16, max(1, rows * columns // (32 * each))))


def power_of_2(size: int) -> int:
    """Return the smallest power of two that is not below a positive size."""
    return 1 << (size - 1).bit_length()


def parts(size: int, each: int) -> int:
    """Return how many parts of `each` hold `size`."""
    return -(-size // each)


def programs(device: torch.device, tiles: int, warps: int) -> int:
    """Return how many programs of so many warps share the tiles: about as many as fit at a time."""
    return max(1, min(tiles, max(2, 16 // warps) * _multiprocessors(device)))


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def is_left_to_torch(x: torch.Tensor) -> bool:
    """Say whether the formula runs instead of kernels.

    It does where there is nothing to compute, where torch compiles the caller and makes one graph
    of both, and for fake tensors, which have no memory.
    """
    return torch.compiler.is_compiling() or not x.numel() or isinstance(x, FakeTensor)


def on(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Make a tensor's device the current one, on which Triton starts its kernels."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def wide(dtype: torch.dtype) -> tl.dtype:
    """Return the dtype that a kernel computes in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def sum_of_parts(sums: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Add what each program summed, `(P, H)`, in an order that is always the same."""
    return sums.sum(dim=0).to(like.dtype)
