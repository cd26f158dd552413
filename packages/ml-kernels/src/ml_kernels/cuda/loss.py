"""Losses on a GPU: a row of logits is read once forward, and once more for its gradient.

The formulas are those of `ml_kernels.chunked_loss`. A program takes a row, a block of columns at a
time, and keeps the maximum `m` and `t = sum(exp(x - m))` of what it has seen (Milakov and
Gimelshein 2018, arXiv:1805.02867). The linear loss writes the gradient over the logits at once,
while the row is in the cache.

Shapes: `R` rows (tokens), `V` vocabulary; statistics are `(R, 1)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ml_kernels import chunked_loss
from ml_kernels.cuda import launch
from ml_kernels.cuda.kernels import loss as kernels
from ml_kernels.derivatives import once_differentiable
from ml_kernels.loss import cross_entropy_reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_COLUMNS = 8192
"""Of a block, at most."""
_WARPS = 8


def cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int, group: ProcessGroup | None
) -> torch.Tensor:
    """See `ml_kernels.cross_entropy`."""
    if group is not None:  # the ranks meet between the statistics and the loss
        return chunked_loss.cross_entropy(logits, target, ignore_index, group)
    if launch.is_left_to_torch(logits):
        return cross_entropy_reference(logits, target, ignore_index, None)
    loss: torch.Tensor = _CrossEntropy.apply(logits, target, ignore_index)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, target: torch.Tensor, ignore_index: int
    ) -> torch.Tensor:
        """Return the losses, in the shape of the target."""
        rows, target = _rows(logits), target.contiguous()
        where = target.masked_fill(target == ignore_index, 0)
        likelihood = rows.gather(1, where.view(-1, 1))  # a target out of range stops here
        dtype = torch.promote_types(logits.dtype, torch.float32)
        highest, total, loss = (logits.new_empty(target.shape, dtype=dtype) for _ in range(3))
        with launch.on(logits):
            kernels.forward[(rows.shape[0],)](
                *(rows, target, likelihood, highest, total, loss, rows.shape[1]),
                *(ignore_index, _columns(rows), launch.wide(dtype)),
                num_warps=_WARPS,
            )
        ctx.save_for_backward(logits, target, highest, total)
        ctx.ignore_index = ignore_index
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Return `(softmax - onehot) * upstream`, rounded once to the dtype of the logits."""
        logits, target, highest, total = ctx.saved_tensors
        rows, gradient = _rows(logits), logits.new_empty(logits.shape)
        blocks = launch.parts(rows.shape[1], _columns(rows))
        with launch.on(logits):
            kernels.backward[(rows.shape[0] * blocks,)](
                *(rows, target, highest, total, upstream.contiguous(), gradient),
                *(rows.shape[1], blocks, ctx.ignore_index),
                *(_columns(rows), launch.wide(highest.dtype)),
                num_warps=_WARPS,
            )
        return gradient, None, None


def losses_of(
    logits: torch.Tensor,
    here: torch.Tensor,
    where: torch.Tensor,
    factor: torch.Tensor,
    loss: torch.Tensor,
    group: ProcessGroup | None,
    differentiated: bool,
) -> None:
    """See `ml_kernels.chunked_loss.losses_of`."""
    if group is not None or launch.is_left_to_torch(logits):
        chunked_loss.losses_of(logits, here, where, factor, loss, group, differentiated)
        return
    likelihood = logits.gather(1, where)  # a target out of range stops here
    with launch.on(logits):
        kernels.lose[(logits.shape[0],)](
            *(logits, where, likelihood, factor, loss, logits.shape[1]),
            *(differentiated, _columns(logits), launch.wide(factor.dtype)),
            num_warps=_WARPS,
        )


def _rows(logits: torch.Tensor) -> torch.Tensor:
    """Return `(R, V)` without gaps. A copy is made again for backward, rather than kept."""
    return logits.reshape(-1, logits.shape[-1]).contiguous()


def _columns(logits: torch.Tensor) -> int:
    return min(_COLUMNS, launch.power_of_2(logits.shape[1]))
