"""Softmax on a GPU: the reference, compiled by torch into one kernel forward and one backward.

It is compiled when first called, for sizes that may vary, and again for another dtype.
"""

from __future__ import annotations

import torch

from ml_kernels.cuda import graphs
from ml_kernels.softmax import scaled_masked_softmax_reference


def scaled_masked_softmax(x: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """See `ml_kernels.scaled_masked_softmax`."""
    return graphs.compiled(scaled_masked_softmax_reference, dynamic=True)(x, mask, scale)
