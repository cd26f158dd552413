"""The linear loss on a GPU: products by torch, the rest by a kernel where there is Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ml_kernels import chunked_loss
from ml_kernels.dispatch import has_triton

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    token_weights: torch.Tensor | None,
    reduction: str,
    ignore_index: int,
    group: ProcessGroup | None,
) -> torch.Tensor:
    """See `ml_kernels.linear_cross_entropy`."""
    step = _step() if has_triton() and not torch.compiler.is_compiling() else None
    given = (hidden, weight, target, token_weights, reduction, ignore_index, group)
    return chunked_loss.linear_cross_entropy(*given, step)


def _step() -> chunked_loss.Step:
    from ml_kernels.cuda.loss import losses_of  # which imports Triton

    return losses_of
