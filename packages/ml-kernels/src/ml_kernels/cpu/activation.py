"""Gated activations with a backward pass written by hand, a few rows at a time.

The halves of the gradient are written where they belong, so that nothing is joined, and what lies
between stays in the cache. In half precision the activation is what takes the time, not the memory:
its value is kept for the backward pass, as the reference does. In float32 silu is computed again,
and a third of what the reference keeps is not kept.

1.3 times as fast in float32, 1.1 in bfloat16. What remains is mostly the exponential of torch's
own kernels and, in bfloat16, their rounding: only a compiler could take it all into one pass.

Shapes: `R` rows (tokens), `F` the width of the result.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from ml_kernels.activation import Approximation, biased, geglu_reference, swiglu_reference
from ml_kernels.cpu.rows import CHUNK, chunks
from ml_kernels.derivatives import once_differentiable

Function = Literal["silu", "tanh", "none"]
"""The activation of the gate: silu, or gelu with that approximation."""

_FEW = 1 << 21
"""Elements of `x` below which all fit into the cache anyway, and the reference is as fast."""


def swiglu(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """See `ml_kernels.swiglu`."""
    return swiglu_reference(x, bias) if _is_left_to_torch(x) else _gated(x, bias, "silu")


def geglu(x: torch.Tensor, bias: torch.Tensor | None, approximate: Approximation) -> torch.Tensor:
    """See `ml_kernels.geglu`."""
    if _is_left_to_torch(x):
        return geglu_reference(x, bias, approximate)
    return _gated(x, bias, approximate)


def _is_left_to_torch(x: torch.Tensor) -> bool:
    return x.numel() < _FEW or torch.compiler.is_compiling()


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
        products = out.view(-1, width)
        kept = torch.empty_like(products) if _is_kept(x.dtype, function) else None
        values = products if kept is None else kept
        elements = 8 * CHUNK // x.element_size()
        for some, value, product in chunks(elements, rows, values, products):
            gate, up = biased(some, bias).chunk(2, dim=-1)
            torch.mul(_activate(gate, function, value), up, out=product)
        ctx.save_for_backward(rows, bias, kept)
        ctx.function = function
        return out

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        rows, bias, kept = ctx.saved_tensors
        of_x = rows.new_empty(*gradient.shape[:-1], rows.shape[1])
        wide = torch.promote_types(rows.dtype, torch.float32)
        of_bias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        upstream = gradient.reshape(rows.shape[0], -1)  # (R, F)
        values = upstream if kept is None else kept
        elements = 8 * CHUNK // rows.element_size()
        for some, value, by, out in chunks(elements, rows, values, upstream, of_x.view(rows.shape)):
            gate, up = biased(some, bias).chunk(2, dim=-1)
            of_gate, of_up = out.chunk(2, dim=-1)
            value = _activate(gate, ctx.function, of_up) if kept is None else value
            torch.mul(by, value, out=of_up)
            torch.mul(by, up, out=of_gate)
            _activate_backward(of_gate, gate, ctx.function)
            if of_bias is not None:
                of_bias += out.sum(0, dtype=wide)
        return of_x, None if of_bias is None else of_bias.to(bias.dtype), None


def _is_kept(dtype: torch.dtype, function: Function) -> bool:
    return function != "silu" or dtype in (torch.float16, torch.bfloat16)


def _activate(gate: torch.Tensor, function: Function, out: torch.Tensor) -> torch.Tensor:
    if function == "silu":
        return torch.ops.aten.silu.out(gate, out=out)
    return torch.ops.aten.gelu.out(gate, approximate=function, out=out)


def _activate_backward(gradient: torch.Tensor, gate: torch.Tensor, function: Function) -> None:
    """Multiply a gradient, in place, by the derivative of the activation."""
    if function == "silu":
        torch.ops.aten.silu_backward.grad_input(gradient, gate, grad_input=gradient)
    else:
        torch.ops.aten.gelu_backward.grad_input(
            gradient, gate, approximate=function, grad_input=gradient
        )
