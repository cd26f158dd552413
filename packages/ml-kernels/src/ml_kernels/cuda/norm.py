"""Norms on a GPU: a kernel forward, and one backward for the rows and the weight together.

What a compiler makes of the formula reads the gradient and the input twice: for the gradient of the
rows, and for that of the weight, which is a sum over all rows. Here a program takes every P-th tile
of rows and keeps its part of that sum in registers; the P parts are added at the end, in an order
that is always the same.

Shapes: `R` rows (tokens), `H` their width, `P` programs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ml_kernels.cuda import graphs, launch
from ml_kernels.cuda.kernels import norm as kernels
from ml_kernels.derivatives import once_differentiable
from ml_kernels.norm import add_rms_norm_reference, layer_norm_reference, rms_norm_reference

_WIDEST = 1 << 14
_WIDEST_CENTRED = 1 << 13
"""Wider rows do not fit into the registers of a program: torch compiles the formula for them."""


class _Kind(NamedTuple):
    centred: bool
    unit_offset: bool
    eps: float


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool) -> torch.Tensor:
    """See `ml_kernels.rms_norm`."""
    if run := _instead(x, rms_norm_reference):
        return run(x, weight, eps, unit_offset)
    kind = _Kind(False, unit_offset, eps)
    out: torch.Tensor = _Norm.apply(x, None, weight, None, kind)  # type: ignore[no-untyped-call]
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ml_kernels.add_rms_norm`."""
    if run := _instead(x, add_rms_norm_reference):
        return run(x, residual, weight, eps, unit_offset)
    kind = _Kind(False, unit_offset, eps)
    out, total = _Norm.apply(x, residual, weight, None, kind)  # type: ignore[no-untyped-call]
    return out, total


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """See `ml_kernels.layer_norm`."""
    if run := _instead(x, layer_norm_reference, _WIDEST_CENTRED):
        return run(x, weight, bias, eps)
    kind = _Kind(True, False, eps)
    out: torch.Tensor = _Norm.apply(x, None, weight, bias, kind)  # type: ignore[no-untyped-call]
    return out


def _instead(
    x: torch.Tensor, reference: Callable[..., Any], widest: int | None = None
) -> Callable[..., Any] | None:
    """Return what runs instead of the kernels, None if they do."""
    if launch.is_left_to_torch(x):
        return reference
    wide = x.shape[-1] > (widest or _WIDEST)
    return graphs.compiled(reference, dynamic=True) if wide else None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return `(R, H)` without gaps. Copies are made again for backward, rather than kept."""
    return x.reshape(-1, x.shape[-1]).contiguous()


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        kind: _Kind,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        rows, other = _rows(x), None if residual is None else _rows(residual)
        out = x.new_empty(x.shape)  # a view of something else could not be changed in place
        total = x if residual is None else x.new_empty(x.shape)
        inverse = x.new_empty(rows.shape[0], dtype=dtype)
        mean = torch.empty_like(inverse) if kind.centred else None
        tile = launch.tile_of(x.shape[-1], 4096, 16)
        with launch.on(x):
            kernels.forward[(launch.parts(rows.shape[0], tile.rows),)](
                *(rows, other, weight.contiguous(), None if bias is None else bias.contiguous()),
                *(out, total, mean, inverse, *rows.shape),
                EPS=kind.eps,
                CENTRED=kind.centred,
                OFFSET=kind.unit_offset,
                ROWS=tile.rows,
                COLUMNS=tile.columns,
                WIDE=launch.wide(dtype),
                num_warps=tile.warps,
            )
        ctx.save_for_backward(total, weight, bias, mean, inverse)
        ctx.kind, ctx.added = kind, residual is not None
        ctx.set_materialize_grads(False)
        if ctx.added and not any(ctx.needs_input_grad[:2]):  # the weight is no part of the sum
            ctx.mark_non_differentiable(total)
        return (out, total) if ctx.added else out

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: torch.Tensor | None, of_total: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, ...]:
        if gradient is None:
            return of_total, of_total if ctx.added else None, None, None, None
        x, weight, bias, mean, inverse = ctx.saved_tensors
        rows, of_x = _rows(x), x.new_empty(x.shape)
        tile = launch.tile_of(rows.shape[1], 2048, 16)
        size = launch.programs(x.device, launch.parts(rows.shape[0], tile.rows), tile.warps)
        sums = x.new_empty(size, rows.shape[1], dtype=inverse.dtype)
        sums_of_bias = None if bias is None else torch.empty_like(sums)
        more = None if of_total is None else of_total.contiguous()
        with launch.on(x):
            kernels.backward[(size,)](
                *(gradient.contiguous(), more, rows, weight.contiguous()),
                *(mean, inverse, of_x, sums, sums_of_bias, *rows.shape),
                CENTRED=ctx.kind.centred,
                OFFSET=ctx.kind.unit_offset,
                ROWS=tile.rows,
                COLUMNS=tile.columns,
                WIDE=launch.wide(inverse.dtype),
                num_warps=tile.warps,
            )
        of_weight = launch.sum_of_parts(sums, weight)
        of_bias = None if sums_of_bias is None else launch.sum_of_parts(sums_of_bias, bias)
        return of_x, of_x if ctx.added else None, of_weight, of_bias, None
