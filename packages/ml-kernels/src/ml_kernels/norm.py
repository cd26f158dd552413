"""Layer normalisations over the last dimension. Shapes: `(..., H)`, weight and bias `(H,)`."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ml_kernels.dispatch import Backend, implementation


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, *, eps: float, backend: Backend | None = None
) -> torch.Tensor:
    """Scale `x` by its root mean square (Zhang and Sennrich 2019, arXiv:1910.07467).

    Args:
        x: `(..., H)`, any floating dtype; the statistics are taken in float32.
        weight: `(H,)`.
        eps: Added to the mean square.
        backend: Force an implementation by name.

    Returns:
        `(..., H)` in the dtype of `x`.
    """
    return implementation("rms_norm", x, backend)(x, weight, eps)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Normalise `x` to mean 0 and variance 1, then scale and shift (Ba et al., arXiv:1607.06450).

    Args:
        x: `(..., H)`.
        weight: `(H,)`.
        bias: `(H,)`.
        eps: Added to the variance.
        backend: Force an implementation by name.
    """
    return implementation("layer_norm", x, backend)(x, weight, bias, eps)


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The formula, as Hugging Face's LlamaRMSNorm computes it."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normalised.to(x.dtype)


def layer_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """Torch's own fused version; there is nothing simpler to compare with."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)
