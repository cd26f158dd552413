"""Activations on a GPU: a kernel forward, and one backward for the input and the bias together.

Gate and up are halves of one tensor, and so are their gradients. The gradient of the bias is a sum
over all rows: a program takes every P-th row of its columns and keeps its part of the sum in
registers, so that no second kernel reads the gradients again.

Shapes: `R` rows (tokens), `F` the width of the result, `P` programs that share the rows.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from ml_kernels.activation import (
    Approximation,
    geglu_reference,
    gelu_reference,
    swiglu_reference,
)
from ml_kernels.cuda import launch
from ml_kernels.cuda.kernels import activation as kernels
from ml_kernels.derivatives import once_differentiable

_COLUMNS = 4096
"""Of a tile, at most."""

Kind = Literal["silu", "tanh", "none"]
"""The function: SiLU, or GELU by its approximation."""


def swiglu(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """See `ml_kernels.swiglu`."""
    if launch.is_left_to_torch(x):
        return swiglu_reference(x, bias)
    return _activate(x, bias, "silu", gated=True)


def geglu(x: torch.Tensor, bias: torch.Tensor | None, approximate: Approximation) -> torch.Tensor:
    """See `ml_kernels.geglu`."""
    if launch.is_left_to_torch(x):
        return geglu_reference(x, bias, approximate)
    return _activate(x, bias, approximate, gated=True)


def gelu(x: torch.Tensor, bias: torch.Tensor | None, approximate: Approximation) -> torch.Tensor:
    """See `ml_kernels.gelu`; without a bias torch's own kernel is one already."""
    if bias is None or not x.dim() or launch.is_left_to_torch(x):
        return gelu_reference(x, bias, approximate)
    return _activate(x, bias, approximate, gated=False)


def _activate(
    x: torch.Tensor, bias: torch.Tensor | None, kind: Kind, *, gated: bool
) -> torch.Tensor:
    out: torch.Tensor = _Activation.apply(x, bias, kind, gated)  # type: ignore[no-untyped-call]
    return out


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, kind: Kind, gated: bool
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        width = x.shape[-1] // 2 if gated else x.shape[-1]
        out = x.new_empty(*x.shape[:-1], width)
        tile, blocks = _tile(width)
        with launch.on(x):
            kernels.forward[(launch.parts(rows.shape[0], tile.rows) * blocks,)](
                *(rows, None if bias is None else bias.contiguous(), out),
                *(rows.shape[0], width, blocks, kind, gated),
                *(tile.rows, tile.columns, launch.wide(x.dtype)),
                num_warps=tile.warps,
            )
        ctx.save_for_backward(x, bias)
        ctx.kind, ctx.gated = kind, gated
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        rows, width = x.reshape(-1, x.shape[-1]).contiguous(), gradient.shape[-1]
        tile, blocks = _tile(width)
        size = launch.parts(rows.shape[0], tile.rows)
        of_x, parts = x.new_empty(x.shape), None
        if bias is not None:
            size = launch.parts(launch.programs(x.device, size * blocks, tile.warps), blocks)
            wide = torch.promote_types(x.dtype, torch.float32)
            parts = x.new_empty(size, rows.shape[1], dtype=wide)
        with launch.on(x):
            kernels.backward[(size * blocks,)](
                *(gradient.contiguous(), rows, None if bias is None else bias.contiguous()),
                *(of_x, parts, rows.shape[0], width, size, blocks, ctx.kind, ctx.gated),
                *(tile.rows, tile.columns, launch.wide(x.dtype)),
                num_warps=tile.warps,
            )
        of_bias = None if parts is None else launch.sum_of_parts(parts, bias)
        return of_x, of_bias, None, None


def _tile(width: int) -> tuple[launch.Tile, int]:
    """Return the tiles for rows of this width, and how many lie side by side."""
    tile = launch.tile_of(min(width, _COLUMNS), _COLUMNS, 8)
    return tile, launch.parts(width, tile.columns)
