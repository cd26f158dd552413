"""Gated activations with a backward pass written by hand, a few rows at a time.

The halves of the gradient are written where they belong, so that nothing is padded or joined, and
what lies between stays in the cache. In half precision, where the activation function and not the
memory is what takes the time, its value is kept for the backward pass, as the reference does too;
in float32 it is computed again and a third of the kept memory saved.
1.3 times as fast in float32, 1.15 in bfloat16.

Shapes: `R` rows (tokens), `F` the width of the result.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from ml_kernels.activation import Approximation, biased, geglu_reference, swiglu_reference
from ml_kernels.cpu.rows import CHUNK, chunks

Function = Literal["silu", "tanh", "none"]
"""The activation of the gate: silu, or gelu with that approximation."""

_FEW = 1 << 18
"""Elements of `x` below which starting a Python function costs more than it saves: torch's own two
kernels are that fast."""


def swiglu(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """See `ml_kernels.swiglu`."""
    return swiglu_reference(x, bias) if x.numel() < _FEW else _gated(x, bias, "silu")


def geglu(x: torch.Tensor, bias: torch.Tensor | None, approximate: Approximation) -> torch.Tensor:
    """See `ml_kernels.geglu`."""
    if x.numel() < _FEW:
        return geglu_reference(x, bias, approximate)
    return _gated(x, bias, approximate)


def _gated(x: torch.Tensor, bias: torch.Tensor | None, function: Function) -> torch.Tensor:
    out: torch.Tensor = _Gated.apply(  # type: ignore[no-untyped-call]
        x, bias, function
    )
    return out


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, function: Function
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = x.new_empty(rows.shape[0], rows.shape[1] // 2)
        kept = torch.empty_like(out) if _is_kept(x.dtype, function) else None
        for some, result, value in chunks(2 * CHUNK, rows, out, out if kept is None else kept):
            gate, up = biased(some, bias).chunk(2, dim=-1)
            torch.mul(_activate(gate, function, value), up, out=result)
        ctx.save_for_backward(rows, bias, kept)
        ctx.function = function
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        rows, bias, kept = ctx.saved_tensors
        of_rows = rows.new_empty(rows.shape)
        wide = torch.promote_types(rows.dtype, torch.float32)
        of_bias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        upstream = gradient.reshape(rows.shape[0], -1)  # (R, F)
        for some, by, value, out in chunks(
            2 * CHUNK, rows, upstream, upstream if kept is None else kept, of_rows
        ):
            gate, up = biased(some, bias).chunk(2, dim=-1)
            of_gate, of_up = out.chunk(2, dim=-1)
            value = _activate(gate, ctx.function, of_up) if kept is None else value
            torch.mul(value, by, out=of_up)
            _activate_backward(torch.mul(by, up, out=of_gate), gate, ctx.function, of_gate)
            if of_bias is not None:
                of_bias += out.sum(0)
        of_bias = None if of_bias is None else of_bias.to(bias.dtype)
        return of_rows.view(*gradient.shape[:-1], -1), of_bias, None


def _is_kept(dtype: torch.dtype, function: Function) -> bool:
    return function != "silu" or dtype in (torch.float16, torch.bfloat16)


def _activate(gate: torch.Tensor, function: Function, out: torch.Tensor) -> torch.Tensor:
    if function == "silu":
        return torch.ops.aten.silu.out(gate, out=out)
    return torch.ops.aten.gelu.out(gate, approximate=function, out=out)


def _activate_backward(
    gradient: torch.Tensor, gate: torch.Tensor, function: Function, out: torch.Tensor
) -> None:
    if function == "silu":
        torch.ops.aten.silu_backward.grad_input(gradient, gate, grad_input=out)
    else:
        torch.ops.aten.gelu_backward.grad_input(
            gradient, gate, approximate=function, grad_input=out
        )
