"""Cross entropy through CANN's fused log-softmax and likelihood.

One kernel does what torch does in three, forward and backward. Its results have the dtype of the
logits, and a bfloat16 loss of 10 would be exact to 0.06 only: it is given float32. It keeps the
log-probabilities, so that a step takes 12 bytes for each logit at its peak; where that is too much,
`linear_cross_entropy` never holds all of them.

A negative ignore_index means "none is ignored" to it, and a target of -100 is out of its range:
ignored targets are replaced, and their losses masked, outside.

Shapes: `V` vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch_npu

from ml_kernels import chunked_loss
from ml_kernels.npu.limits import check_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_MOST_ROWS = 200_000
"""The kernel takes no more, by its documentation (torch_npu 2.13)."""


def cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int, group: ProcessGroup | None
) -> torch.Tensor:
    """See `ml_kernels.cross_entropy`; the derivative is torch_npu's.

    The kernel knows no group, and no empty tensor: these are left to torch's operators.

    Raises:
        BackendUnavailableError: The logits are float64.
    """
    check_dtype("cross_entropy", "logits", logits)
    if group is not None or not logits.numel():
        return chunked_loss.cross_entropy(logits, target, ignore_index, group)
    ignored = target == ignore_index
    rows = torch.split(logits.reshape(-1, logits.shape[-1]), _MOST_ROWS)
    wanted = torch.split(target.masked_fill(ignored, 0).reshape(-1), _MOST_ROWS)
    loss = torch.cat([_fused(some, of) for some, of in zip(rows, wanted, strict=True)])
    return loss.view(target.shape).masked_fill(ignored, 0)


def _fused(rows: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = torch_npu.npu_cross_entropy_loss(rows.float(), target, reduction="none")[0]
    return loss
