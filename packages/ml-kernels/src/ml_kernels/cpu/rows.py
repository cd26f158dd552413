"""Rows a few at a time: what is computed between inputs and outputs then stays in the cache."""

from __future__ import annotations

from collections.abc import Iterable

import torch

CHUNK = 1 << 19
"""Elements computed at a time: 2 MiB in float32."""

FEW = 1 << 14
"""Elements below which starting a Python function for the gradient costs more than it saves. Empty
tensors must be below: torch's kernels divide by the number of rows, and so does `chunks`."""


def chunks(elements: int, *tensors: torch.Tensor) -> Iterable[tuple[torch.Tensor, ...]]:
    """Split tensors of as many rows into pieces with so many elements of the first one."""
    first = tensors[0]
    rows = max(1, elements * first.shape[0] // first.numel())
    if first.shape[0] <= rows:
        return (tensors,)  # where the whole takes microseconds, splitting would be half of them
    return zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)
