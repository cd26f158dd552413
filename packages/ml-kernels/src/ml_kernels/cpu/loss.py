"""Cross entropy a few rows at a time.

The reference makes three float32 tensors as large as the logits: with a vocabulary of tens of
thousands these are the largest tensors of a training step, and the time goes into memory traffic.
Here the float32 values of a few rows stay in the cache and only the gradient leaves it; the softmax
is computed again for it. 1.1 times as fast in quiet memory, several times on a busy machine, and
the peak of a step is lower by 12 bytes for each bfloat16 logit.

Shapes: `R` rows (tokens), `V` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

_CHUNK_ELEMENTS = 1 << 19
"""Elements computed at a time: 2 MiB in float32."""


def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """See `ml_kernels.cross_entropy`."""
    rows = logits.reshape(-1, logits.shape[-1])
    loss: torch.Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        rows, target.reshape(-1, 1)
    )
    return loss.view(target.shape)


def _chunks(*tensors: torch.Tensor, columns: int) -> Any:
    rows = max(1, _CHUNK_ELEMENTS // columns)
    return zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return `(R,)` float32 from logits `(R, V)` and target `(R, 1)`."""
        ctx.save_for_backward(logits, target)
        loss = logits.new_empty(target.shape, dtype=torch.float32)
        for some, wanted, out in _chunks(logits, target, loss, columns=logits.shape[1]):
            likelihood = torch.log_softmax(some, dim=-1, dtype=torch.float32)
            torch.neg(likelihood.gather(1, wanted), out=out)
        return loss[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return `(softmax - onehot) * upstream`, rounded once to the dtype of the logits."""
        logits, target = ctx.saved_tensors
        gradient, factor = torch.empty_like(logits), upstream[:, None]
        for some, wanted, by, out in _chunks(
            logits, target, factor, gradient, columns=logits.shape[1]
        ):
            wide = torch.softmax(some, dim=-1, dtype=torch.float32).mul_(by)
            out.copy_(wide.scatter_add_(1, wanted, -by))
        return gradient, None
