"""Cross entropy a few rows at a time, through torch's fused softmax.

The reference makes three float32 tensors as large as the logits: with a vocabulary of tens of
thousands these are the largest tensors of a training step, and the time goes into memory traffic.
Here the float32 values of a few rows stay in the cache and only the gradient leaves it; the softmax
is computed again for it. About twice as fast in float32, five times in bfloat16, and the peak of a
step is lower by 12 bytes for each bfloat16 logit.

Shapes: `R` rows (tokens), `V` vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ml_kernels import chunked_loss
from ml_kernels.derivatives import once_differentiable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed import ProcessGroup

_CHUNK_ELEMENTS = 1 << 19
"""Elements computed at a time: 2 MiB in float32."""


def cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int, group: ProcessGroup | None
) -> torch.Tensor:
    """See `ml_kernels.cross_entropy`. With a group, the statistics are needed one by one."""
    if group is not None:
        return chunked_loss.cross_entropy(logits, target, ignore_index, group)
    rows = logits.reshape(-1, logits.shape[-1])
    loss: torch.Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        rows, target.reshape(-1, 1), ignore_index
    )
    return loss.view(target.shape)


def _chunks(*tensors: torch.Tensor, columns: int) -> Iterator[tuple[torch.Tensor, ...]]:
    rows = max(1, _CHUNK_ELEMENTS // columns)
    return zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, target: torch.Tensor, ignore_index: int
    ) -> torch.Tensor:
        """Return `(R,)` from logits `(R, V)` and target `(R, 1)`."""
        ignored = target == ignore_index
        target = target.masked_fill(ignored, 0)
        ctx.save_for_backward(logits, target, ignored)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        loss = torch.empty_like(target, dtype=dtype)
        for some, wanted, out in _chunks(logits, target, loss, columns=logits.shape[1]):
            likelihood = torch.log_softmax(some, dim=-1, dtype=dtype)
            torch.neg(likelihood.gather(1, wanted), out=out)
        return loss[:, 0].masked_fill(ignored[:, 0], 0)  # no view: it may be changed in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Return `(softmax - onehot) * upstream`, rounded once to the dtype of the logits."""
        logits, target, ignored = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        factor = upstream[:, None].masked_fill(ignored, 0)
        for some, wanted, by, out in _chunks(
            logits, target, factor, gradient, columns=logits.shape[1]
        ):
            wide = torch.softmax(some, dim=-1, dtype=factor.dtype).mul_(by)
            out.copy_(wide.scatter_add_(1, wanted, -by))
        return gradient, None, None
