"""RMSNorm with a backward pass written by hand, a few rows at a time.

Torch has no fused RMSNorm on a CPU: its own and the reference are the same dozen passes over the
activations. Its kernels for other norms have the parts, though. To divide a row by its root mean
square is to give it the length sqrt(H), so the gradient of the input is that of weight
normalisation (Salimans and Kingma 2016, arXiv:1602.07868) with the upstream gradient times the
weight; and the gradient of the weight is that of a layer norm whose means are zero. About twice as
fast.

Shapes: `R` rows (tokens), `H` the last dimension of `x`.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ml_kernels.cpu.rows import CHUNK, FEW, chunks
from ml_kernels.derivatives import once_differentiable
from ml_kernels.norm import add_rms_norm_reference, rms_norm_reference


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool) -> torch.Tensor:
    """See `ml_kernels.rms_norm`."""
    if x.numel() < FEW:
        return rms_norm_reference(x, weight, eps, unit_offset)
    result: torch.Tensor = _RMSNorm.apply(  # type: ignore[no-untyped-call]
        x, weight, eps, unit_offset
    )
    return result


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ml_kernels.add_rms_norm`."""
    if x.numel() < FEW:
        return add_rms_norm_reference(x, residual, weight, eps, unit_offset)
    result: tuple[torch.Tensor, torch.Tensor] = _AddRMSNorm.apply(  # type: ignore[no-untyped-call]
        x, residual, weight, eps, unit_offset
    )
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool
    ) -> torch.Tensor:
        rows, inverse, out = _rows(x), _inverse(x), x.new_empty(x.shape)
        for some, by, result in chunks(CHUNK, rows, inverse, _rows(out)):
            _normalise(some, by, result, weight, eps, unit_offset)
        ctx.save_for_backward(rows, weight, inverse)
        ctx.unit_offset = unit_offset
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        of_x, of_weight = _gradients(ctx, gradient, None)
        return of_x, of_weight, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        unit_offset: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inverse, out, total = _inverse(x), x.new_empty(x.shape), x.new_empty(x.shape)
        for some, other, both, by, result in chunks(
            CHUNK, _rows(x), _rows(residual), _rows(total), inverse, _rows(out)
        ):
            torch.add(some, other, out=both)
            _normalise(both, by, result, weight, eps, unit_offset)
        ctx.save_for_backward(total, weight, inverse)
        ctx.unit_offset = unit_offset
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[:2]):  # the weight is no part of the sum
            ctx.mark_non_differentiable(total)
        return out, total

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: torch.Tensor | None, of_total: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None, None]:
        if gradient is None:
            return of_total, of_total, None, None, None
        of_x, of_weight = _gradients(ctx, gradient, of_total)
        return of_x, of_x, of_weight, None, None


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _inverse(x: torch.Tensor) -> torch.Tensor:
    """Return room for the inverse norms `(R, 1)` of the rows of `x`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.numel() // x.shape[-1], 1, dtype=wide)


def _normalise(
    x: torch.Tensor,
    inverse: torch.Tensor,
    out: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    unit_offset: bool,
) -> None:
    """Write the inverse norms and the scaled rows, rounding as the reference does."""
    wide = inverse.dtype
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    torch.addcmul(inverse.new_full((), eps), norm, norm, value=1 / x.shape[1], out=inverse).rsqrt_()
    if x.dtype == wide:
        torch.mul(x, inverse, out=out).mul_(_factors(weight, unit_offset, wide))
    elif unit_offset:
        out.copy_(x.to(wide).mul_(inverse).mul_(_factors(weight, True, wide)))
    else:
        out.copy_(x.to(wide).mul_(inverse)).mul_(weight)


def _factors(weight: torch.Tensor, unit_offset: bool, dtype: torch.dtype) -> torch.Tensor:
    return weight.to(dtype) + 1 if unit_offset else weight.to(dtype)


def _gradients(
    ctx: Any, gradient: torch.Tensor, more: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of the input, plus `more`, and that of the weight."""
    x, weight, inverse = ctx.saved_tensors
    factors = _factors(weight, ctx.unit_offset, inverse.dtype)
    of_x, of_weight = x.new_empty(gradient.shape), torch.zeros_like(factors)
    length, mean = torch.full_like(inverse, math.sqrt(x.shape[-1])), torch.zeros_like(inverse)
    upstream = _rows(gradient)
    extra = upstream if more is None else _rows(more)
    for some, by, add, *statistics, out in chunks(
        CHUNK, _rows(x), upstream, extra, inverse, mean, length, length / inverse, _rows(of_x)
    ):
        found, of_factors = _gradients_of_rows(some, by, factors, *statistics)
        of_weight += of_factors
        out.copy_(found) if more is None else torch.add(found, add, out=out)
    return of_x, of_weight.to(weight.dtype)


def _gradients_of_rows(
    x: torch.Tensor,
    upstream: torch.Tensor,
    factors: torch.Tensor,
    inverse: torch.Tensor,
    mean: torch.Tensor,
    length: torch.Tensor,
    norm: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of the rows and of the factors, not yet rounded."""
    # The kernel of the weight norm reads its gradient as if it were contiguous, and says nothing.
    x, upstream = (t.to(factors.dtype).contiguous() for t in (x, upstream))
    _, of_factors, _ = torch.ops.aten.native_layer_norm_backward.default(
        upstream, x, factors.shape, mean, inverse, factors, None, [False, True, False]
    )
    of_x, _ = torch.ops.aten._weight_norm_interface_backward.default(
        upstream * factors, x, length, norm, 0
    )
    return of_x, of_factors
