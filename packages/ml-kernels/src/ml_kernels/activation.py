"""Activations between the two linear layers of a feed-forward block.

A gated activation takes both halves of one projection: the gate first, then what it multiplies.
Shapes: `F` is the width of the result.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch.nn import functional as F

from ml_kernels.checks import check_floating, check_weight
from ml_kernels.dispatch import Backend, implementation

Approximation = Literal["tanh", "none"]


def swiglu(
    x: torch.Tensor, bias: torch.Tensor | None = None, *, backend: Backend | None = None
) -> torch.Tensor:
    """Return `silu(gate) * up` for `x + bias = [gate, up]` (Shazeer 2020, arXiv:2002.05202).

    Args:
        x: `(..., 2 * F)`: gate first, then up.
        bias: `(2 * F,)` in the dtype of `x` or float32, added first; or None.
        backend: Force an implementation by name.

    Returns:
        `(..., F)` in the dtype of `x`.

    Raises:
        ValueError: The last dimension of `x` is odd, or the bias does not fit it.
        TypeError: A tensor is not floating point, or the bias has another dtype.
    """
    _check_gated("swiglu", x, bias)
    return implementation("swiglu", x, backend)(x, bias)


def geglu(
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    approximate: Approximation = "tanh",
    backend: Backend | None = None,
) -> torch.Tensor:
    """Return `gelu(gate) * up` for `x + bias = [gate, up]` (Shazeer 2020, arXiv:2002.05202).

    Args:
        x: `(..., 2 * F)`: gate first, then up.
        bias: `(2 * F,)` in the dtype of `x` or float32, added first; or None.
        approximate: "tanh" as in Gemma and Grok, or "none" for the error function.
        backend: Force an implementation by name.

    Returns:
        `(..., F)` in the dtype of `x`.

    Raises:
        ValueError: The last dimension of `x` is odd, the bias does not fit it, or `approximate` is
            unknown.
        TypeError: A tensor is not floating point, or the bias has another dtype.
    """
    _check_gated("geglu", x, bias)
    check_approximation("geglu", approximate)
    return implementation("geglu", x, backend)(x, bias, approximate)


def gelu(
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    approximate: Approximation = "none",
    backend: Backend | None = None,
) -> torch.Tensor:
    """Return the Gaussian error linear unit of `x + bias` (Hendrycks, Gimpel, arXiv:1606.08415).

    Args:
        x: `(..., F)`.
        bias: `(F,)` in the dtype of `x` or float32, added first; or None.
        approximate: "none" for the error function, or "tanh" as in GPT-2 and Bloom.
        backend: Force an implementation by name.

    Returns:
        `(..., F)` in the dtype of `x`.

    Raises:
        ValueError: The bias does not fit the last dimension, or `approximate` is unknown.
        TypeError: A tensor is not floating point, or the bias has another dtype.
    """
    check_floating("gelu", "x", x)
    if bias is not None:
        check_weight("gelu", "bias", bias, x)
    check_approximation("gelu", approximate)
    return implementation("gelu", x, backend)(x, bias, approximate)


def _check_gated(operator: str, x: torch.Tensor, bias: torch.Tensor | None) -> None:
    check_floating(operator, "x", x)
    if x.dim() == 0 or x.shape[-1] % 2:
        raise ValueError(
            f"{operator}: x {tuple(x.shape)}: the last dimension must be even, [gate, up]"
        )
    if bias is not None:
        check_weight(operator, "bias", bias, x)


def check_approximation(operator: str, approximate: str) -> None:
    """Refuse what is no form of the Gaussian error linear unit.

    Raises:
        ValueError: It is not.
    """
    if approximate not in get_args(Approximation):
        raise ValueError(f"{operator}: approximate {approximate!r}: must be 'tanh' or 'none'")


def biased(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Add a bias, if there is one, in the dtype of `x`."""
    return x if bias is None else (x + bias).to(x.dtype)


def swiglu_reference(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The formula."""
    gate, up = biased(x, bias).chunk(2, dim=-1)
    return F.silu(gate) * up


def geglu_reference(
    x: torch.Tensor, bias: torch.Tensor | None, approximate: Approximation
) -> torch.Tensor:
    """The formula."""
    gate, up = biased(x, bias).chunk(2, dim=-1)
    return F.gelu(gate, approximate=approximate) * up


def gelu_reference(
    x: torch.Tensor, bias: torch.Tensor | None, approximate: Approximation
) -> torch.Tensor:
    """The formula, which torch computes in one pass."""
    return F.gelu(biased(x, bias), approximate=approximate)
