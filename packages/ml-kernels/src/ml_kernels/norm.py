"""Normalisations over the last dimension.

Statistics are taken in float32 (float64 for float64 inputs) and the result is rounded to the dtype
of `x` where Hugging Face's modules round it, so that converted models give the same numbers.

Shapes: `x` `(..., H)`, weight and bias `(H,)` in the dtype of `x` or in float32.
"""

from __future__ import annotations

import math

import torch

from ml_kernels.checks import (
    check_floating,
    check_same_device,
    check_same_dtype,
    check_weight,
    require,
)
from ml_kernels.dispatch import Backend, implementation


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    unit_offset: bool = False,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Scale `x` by its root mean square (Zhang and Sennrich 2019, arXiv:1910.07467).

    Args:
        x: `(..., H)`, any floating dtype.
        weight: `(H,)` in the dtype of `x` or float32.
        eps: Added to the mean square; at least 0.
        unit_offset: Multiply by `1 + weight`, in float32 and before rounding, as Gemma does.
            Without it the normalised `x` is rounded first, as Llama does.
        backend: Force an implementation by name.

    Returns:
        `(..., H)` in the dtype of `x`.

    Raises:
        ValueError: The weight does not fit the last dimension of `x`, or `eps` is negative.
        TypeError: A tensor is not floating point, or the weight has another dtype.
    """
    _check("rms_norm", x, weight, eps)
    return implementation("rms_norm", x, backend)(x, weight, eps, unit_offset)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    unit_offset: bool = False,
    backend: Backend | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the residual stream and normalise the sum: one step of a pre-norm transformer.

    Args:
        x: `(..., H)`, what a block adds to the stream.
        residual: `(..., H)`, the stream, like `x` in shape, dtype and device.
        weight: `(H,)` in the dtype of `x` or float32.
        eps: Added to the mean square; at least 0.
        unit_offset: See `rms_norm`.
        backend: Force an implementation by name.

    Returns:
        The norm of the sum, and the sum, which is the new stream; both like `x`.

    Raises:
        ValueError: Shapes or devices do not fit, or `eps` is negative.
        TypeError: Dtypes do not fit.
    """
    _check("add_rms_norm", x, weight, eps)
    if residual.shape != x.shape:
        raise ValueError(
            f"add_rms_norm: residual {tuple(residual.shape)}: must have the shape of x "
            f"{tuple(x.shape)}"
        )
    check_same_device("add_rms_norm", "residual", residual, x)
    check_same_dtype("add_rms_norm", "residual", residual, x)
    return implementation("add_rms_norm", x, backend)(x, residual, weight, eps, unit_offset)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Normalise `x` to mean 0 and variance 1, then scale and shift (Ba et al., arXiv:1607.06450).

    Args:
        x: `(..., H)`, any floating dtype.
        weight: `(H,)` in the dtype of `x` or float32.
        bias: `(H,)` like the weight, or None.
        eps: Added to the variance; at least 0.
        backend: Force an implementation by name.

    Returns:
        `(..., H)` in the dtype of `x`.

    Raises:
        ValueError: The weight or bias does not fit the last dimension, or `eps` is negative.
        TypeError: A tensor is not floating point, or the weight or bias has another dtype.
    """
    _check("layer_norm", x, weight, eps)
    if bias is not None:
        check_weight("layer_norm", "bias", bias, x)
    return implementation("layer_norm", x, backend)(x, weight, bias, eps)


def _check(operator: str, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    check_floating(operator, "x", x)
    require(x.dim() > 0, operator, "x", (), "must have at least one dimension")
    check_floating(operator, "weight", weight)
    check_weight(operator, "weight", weight, x)
    check_eps(operator, eps)


def check_eps(operator: str, eps: float) -> None:
    """Refuse what may make a mean square negative.

    Raises:
        ValueError: It may.
    """
    require(0 <= eps < math.inf, operator, "eps", eps, "must be at least 0, and finite")


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool
) -> torch.Tensor:
    """The formula, as Hugging Face's LlamaRMSNorm computes it, with the offset GemmaRMSNorm."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if unit_offset:
        return (normalised * (1.0 + weight.to(wide.dtype))).to(x.dtype)
    return (weight * normalised.to(x.dtype)).to(x.dtype)


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum, rounded to the dtype of `x`, and its norm."""
    total = x + residual
    return rms_norm_reference(total, weight, eps, unit_offset), total


def layer_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """The formula, rounded once at its end."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    normalised = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    scaled = normalised * weight
    return (scaled if bias is None else scaled + bias).to(x.dtype)
