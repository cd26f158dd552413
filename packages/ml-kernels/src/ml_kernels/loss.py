"""Losses over the vocabulary."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ml_kernels.dispatch import Backend, implementation


def cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, *, backend: Backend | None = None
) -> torch.Tensor:
    """Return the negative log-likelihood of each target token, in nats.

    Args:
        logits: `(..., V)`, any floating dtype; the log-sum-exp is taken in float32.
        target: `(...)` int64 in `[0, V)`.
        backend: Force an implementation by name.

    Returns:
        `(...)` float32.
    """
    return implementation("cross_entropy", logits, backend)(logits, target)


def cross_entropy_reference(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Torch's fused log-softmax and gather."""
    rows = logits.reshape(-1, logits.shape[-1]).float()
    return F.cross_entropy(rows, target.reshape(-1), reduction="none").view(target.shape)
