"""Gated activations of the feed-forward block."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ml_kernels.dispatch import Backend, implementation


def swiglu(x: torch.Tensor, *, backend: Backend | None = None) -> torch.Tensor:
    """Return `silu(gate) * up` for `x = [gate, up]` (Shazeer 2020, arXiv:2002.05202).

    Args:
        x: `(..., 2 * F)`: gate first, then up.
        backend: Force an implementation by name.

    Returns:
        `(..., F)` in the dtype of `x`.
    """
    return implementation("swiglu", x, backend)(x)


def swiglu_reference(x: torch.Tensor) -> torch.Tensor:
    """The formula."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up
