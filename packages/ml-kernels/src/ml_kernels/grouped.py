"""The derivative of a grouped matrix product, written once for all devices.

With `y[g] = x[g] @ w[g]` for every group `g` of rows, the gradients are grouped products too:
`dx[g] = dy[g] @ w[g].T`, the same kernel with transposed matrices, and `dw[g] = x[g].T @ dy[g]`,
grouped along the summed dimension. A device brings the two kernels; `LOOP` is the one that torch
can do everywhere.

Shapes: `M` rows of all groups, `E` groups, `I` and `O` inner and outer width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from ml_kernels.derivatives import once_differentiable


class Kernels(NamedTuple):
    """The two grouped products of a device; `groups` is what it names the groups' sizes with."""

    rows: Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]
    """`(M, I)`, `(E, I, O)` to `(M, O)`; the matrices may be transposed views."""

    summed: Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]
    """`(M, I)`, `(M, O)` to `(E, I, O)`: zeros for an empty group."""


def grouped_product(
    x: torch.Tensor, weight: torch.Tensor, groups: Any, kernels: Kernels
) -> torch.Tensor:
    """Multiply each group of rows by its matrix, with the gradients of both."""
    result: torch.Tensor = _GroupedProduct.apply(  # type: ignore[no-untyped-call]
        x, weight, groups, kernels
    )
    return result


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, groups: Any, kernels: Kernels
    ) -> torch.Tensor:
        # Each for the gradient of the other: no activations for a frozen weight.
        of_x, of_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        ctx.groups, ctx.kernels = groups, kernels
        return kernels.rows(x, weight, groups)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = ctx.kernels.rows(gradient, weight.transpose(1, 2), ctx.groups)
        if ctx.needs_input_grad[1]:
            of_weight = ctx.kernels.summed(x, gradient, ctx.groups)
        return of_x, of_weight, None, None


def _loop_rows(x: torch.Tensor, weight: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    out = x.new_empty(x.shape[0], weight.shape[2])
    for group, rows in _slices(sizes):
        torch.mm(x[rows], weight[group], out=out[rows])
    return out


def _loop_summed(x: torch.Tensor, y: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    out = x.new_empty(len(sizes), x.shape[1], y.shape[1])
    for group, rows in _slices(sizes):
        torch.mm(x[rows].t(), y[rows], out=out[group])
    return out


def _slices(sizes: list[int]) -> Iterator[tuple[int, slice]]:
    start = 0
    for group, size in enumerate(sizes):
        yield group, slice(start, start + size)
        start += size


LOOP = Kernels(_loop_rows, _loop_summed)
"""A matrix product for each group, written into one result. Its `groups` are sizes on the host."""
