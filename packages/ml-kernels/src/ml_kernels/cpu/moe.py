"""Grouped matrix products on a CPU: one product per expert, all into one result.

The reference concatenates the products afterwards, and its gradient of the weights stacks one
tensor for each expert.
"""

from __future__ import annotations

import torch

from ml_kernels.grouped import LOOP, grouped_product


def grouped_matmul(
    x: torch.Tensor, weight: torch.Tensor, group_sizes: torch.Tensor
) -> torch.Tensor:
    """See `ml_kernels.grouped_matmul`."""
    return grouped_product(x, weight, group_sizes.tolist(), LOOP)
