"""Versions of operators through torch's own fused ones, for every device that has them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from ml_kernels.activation import Approximation, biased
from ml_kernels.optimizer import adamw_reference


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """See `ml_kernels.layer_norm`.

    With a float32 weight beside a half-precision `x` it runs in float32: not all have that mixture.
    """
    if weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype):
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.to(wide)
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias, eps).to(x.dtype)


def gelu(x: torch.Tensor, bias: torch.Tensor | None, approximate: Approximation) -> torch.Tensor:
    """See `ml_kernels.gelu`: torch's kernel is one pass over `x`, forward and backward."""
    return F.gelu(biased(x, bias), approximate=approximate)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """See `ml_kernels.linear`."""
    return F.linear(x, weight, bias)


@torch.no_grad()
def adamw(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """See `ml_kernels.adamw`.

    torch's kernel reads and writes every number once, where the reference does ten times. It takes
    tensors of one dtype, and walks through their memory without looking at strides: whatever does
    not fit goes through the reference.
    """
    if torch.compiler.is_compiling():  # into one kernel, of the formula
        adamw_reference(
            params, grads, exp_avgs, exp_avg_sqs, step, lr, beta1, beta2, eps, weight_decay
        )
        return
    by_dtype: dict[torch.dtype | None, list[tuple[torch.Tensor, ...]]] = defaultdict(list)
    for tensors in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        by_dtype[_common_dtype(tensors)].append(tensors)
    for dtype, updates in by_dtype.items():
        p, g, m, v = (list(column) for column in zip(*updates, strict=True))
        if dtype is None:
            adamw_reference(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay)
            continue
        steps = torch.full((), float(step), dtype=torch.float32, device=p[0].device)
        torch._fused_adamw_(
            p,
            g,
            m,
            v,
            [],
            [steps] * len(updates),
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )
        # torch's kernel does not say that it writes: graphs made before must not go on silently.
        for written in (*p, *m, *v):
            if not written.is_inference():
                torch.autograd.graph.increment_version(written)


def _common_dtype(tensors: tuple[torch.Tensor, ...]) -> torch.dtype | None:
    """Return the dtype of tensors that torch's kernel can update, None for others."""
    dtype = tensors[0].dtype
    return dtype if all(t.dtype == dtype and t.is_contiguous() for t in tensors) else None
