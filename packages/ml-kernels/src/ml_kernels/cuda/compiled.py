"""The references, compiled by torch into one kernel each.

They are chains of elementwise operations and row sums, whose time on a GPU goes into memory
traffic: a compiled one reads its inputs once and writes its output once, forward and backward. Each
is compiled when first called, for sizes that may vary, and again for another dtype. torch compiles
to Triton; where that is missing, `ml_kernels.dispatch` does not come here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ml_kernels import chunked_loss
from ml_kernels.activation import (
    Approximation,
    geglu_reference,
    gelu_reference,
    swiglu_reference,
)
from ml_kernels.cuda import graphs
from ml_kernels.loss import cross_entropy_reference
from ml_kernels.norm import add_rms_norm_reference, rms_norm_reference
from ml_kernels.rotary import rotary_embedding_reference
from ml_kernels.softmax import scaled_masked_softmax_reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def compiled(reference: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a reference, once in this process, for sizes that may vary."""
    return graphs.compiled(reference, dynamic=True)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool) -> torch.Tensor:
    """See `ml_kernels.rms_norm`."""
    return compiled(rms_norm_reference)(x, weight, eps, unit_offset)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ml_kernels.add_rms_norm`."""
    return compiled(add_rms_norm_reference)(x, residual, weight, eps, unit_offset)


def swiglu(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """See `ml_kernels.swiglu`."""
    return compiled(swiglu_reference)(x, bias)


def geglu(x: torch.Tensor, bias: torch.Tensor | None, approximate: Approximation) -> torch.Tensor:
    """See `ml_kernels.geglu`."""
    return compiled(geglu_reference)(x, bias, approximate)


def gelu(x: torch.Tensor, bias: torch.Tensor | None, approximate: Approximation) -> torch.Tensor:
    """See `ml_kernels.gelu`; without a bias torch's own kernel is one already."""
    if bias is None:
        return gelu_reference(x, bias, approximate)
    return compiled(gelu_reference)(x, bias, approximate)


def rotary_embedding(
    x: torch.Tensor, angles: torch.Tensor, interleaved: bool, scale: float
) -> torch.Tensor:
    """See `ml_kernels.rotary_embedding`."""
    return compiled(rotary_embedding_reference)(x, angles, interleaved, scale)


def cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int, group: ProcessGroup | None
) -> torch.Tensor:
    """See `ml_kernels.cross_entropy`; the collectives of a group are no part of a graph."""
    if group is not None:
        return chunked_loss.cross_entropy(logits, target, ignore_index, group)
    return compiled(cross_entropy_reference)(logits, target, ignore_index, None)


def scaled_masked_softmax(x: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """See `ml_kernels.scaled_masked_softmax`."""
    return compiled(scaled_masked_softmax_reference)(x, mask, scale)
