"""Losses over the vocabulary a few tokens at a time, on every device.

The formula over all tokens makes several float32 tensors as large as the logits, which are the
largest tensors of a training step. Here the float32 values of a few tokens exist at a time; only
gradients leave. A row of logits `x` is kept as its maximum `m` and `t = sum(exp(x - m))`:
the loss is `m + log(t) - x[target]` and its gradient `exp(x - m) / t - onehot`. Over the ranks of a
group `m` is a maximum, and `t * exp(m - maximum)` and `x[target]` are sums: two small reductions.

Shapes: `R` rows (tokens), `V` vocabulary of this rank, `H` hidden; statistics are `(R, 1)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import distributed

from ml_kernels.derivatives import once_differentiable
from ml_kernels.loss import factor_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Step = Callable[..., None]
"""A function like `losses_of`."""

_CACHED_ELEMENTS = 1 << 19
"""Elements of a chunk that stays in a CPU's cache: 2 MiB in float32."""
_CHUNK_ELEMENTS = 1 << 23
"""Logits made at a time by the linear loss on a CPU: 32 MiB in float32, hundreds of tokens."""
_DEVICE_ELEMENTS = 1 << 27
"""At most on an accelerator, which needs more work at a time to be busy: 512 MiB."""
_CHUNKS = 8
"""On an accelerator, the linear loss divides the tokens by this, within the two bounds above."""
_BLOCK_ELEMENTS = 1 << 22
"""Elements of a half-precision weight gradient that are added to the float32 sum at a time."""


def cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int, group: ProcessGroup | None
) -> torch.Tensor:
    """See `ml_kernels.cross_entropy`."""
    rows = logits.reshape(-1, logits.shape[-1])
    loss: torch.Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        rows, target.reshape(-1, 1), ignore_index, group
    )
    return loss.view(target.shape)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    token_weights: torch.Tensor | None,
    reduction: str,
    ignore_index: int,
    group: ProcessGroup | None,
    step: Step | None = None,
) -> torch.Tensor:
    """See `ml_kernels.linear_cross_entropy`; `step` is a device's own version of `losses_of`.

    A half-precision weight gradient is summed in float32 over the chunks, and takes four bytes a
    weight until backward: sums of bfloat16 over many chunks lose the small terms. It is divided by
    the number of tokens, and multiplied by the upstream gradient, before it is rounded: the range
    of float16 needs the loss scale. The sum over one chunk must be in that range. In float16
    the token weights count in units of the largest: gradients that hold them are rounded here.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    factor = factor_of(target, token_weights, ignore_index, dtype)
    weighted = token_weights is not None and hidden.dtype == torch.float16
    unit = _largest(factor) if weighted else None
    if unit is not None:
        factor = factor / unit
    differentiated = torch.is_grad_enabled()
    loss: torch.Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden.reshape(target.numel(), hidden.shape[-1]),
        weight,
        _find(target.reshape(-1, 1), ignore_index, weight.shape[0], group),
        factor.reshape(-1, 1),
        group,
        differentiated and hidden.requires_grad,
        differentiated and weight.requires_grad,
        step or losses_of,
    )
    if reduction == "sum":
        return loss if unit is None else loss * unit
    total = factor.sum()  # in the same unit
    return loss / total.masked_fill(total == 0, 1)


def _largest(factor: torch.Tensor) -> torch.Tensor | None:
    """Return the largest magnitude, 1 where all are 0; the same on all ranks, as `factor` is."""
    if not factor.numel():
        return None
    largest = factor.abs().amax()
    return largest.masked_fill(largest == 0, 1)


class _Targets(NamedTuple):
    kept: torch.Tensor  # (R, 1) bool: not ignored
    here: torch.Tensor  # (R, 1) bool: kept, and in this rank's part of the vocabulary
    where: torch.Tensor  # (R, 1) int64 in that part, 0 where it is not here


def _find(
    target: torch.Tensor, ignore_index: int, columns: int, group: ProcessGroup | None
) -> _Targets:
    kept = target != ignore_index
    if group is None:
        # Nothing is clamped: a target out of range must stop in the gather.
        return _Targets(kept, kept, target.masked_fill(~kept, 0))
    index = target - group.rank() * columns
    here = kept & (index >= 0) & (index < columns)
    return _Targets(kept, here, index.masked_fill(~here, 0))


def _rows(elements: int, columns: int) -> int:
    return max(1, elements // max(1, columns))


def _chunks(size: int, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    return zip(*(torch.split(tensor, size) for tensor in tensors), strict=True)


def _maximum(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the maximum of each row; finite where a row is -inf, so that exp(x - m) is 0."""
    return logits.amax(dim=1, keepdim=True).to(dtype).clamp(min=torch.finfo(dtype).min)


def _over(
    group: ProcessGroup | None,
    highest: torch.Tensor,
    total: torch.Tensor,
    likelihood: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `m`, `t` and `x[target]` of the whole vocabulary."""
    if group is None:
        return highest, total, likelihood
    overall = highest.clone()
    distributed.all_reduce(overall, distributed.ReduceOp.MAX, group)
    sums = torch.stack((total * torch.exp(highest - overall), likelihood))
    distributed.all_reduce(sums, group=group)
    return overall, sums[0], sums[1]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        target: torch.Tensor,
        ignore_index: int,
        group: ProcessGroup | None,
    ) -> torch.Tensor:
        """Return `(R,)` from logits `(R, V)` and target `(R, 1)`."""
        dtype = torch.promote_types(logits.dtype, torch.float32)
        targets = _find(target, ignore_index, logits.shape[1], group)
        ctx.size = _rows(
            _CACHED_ELEMENTS if logits.device.type == "cpu" else _DEVICE_ELEMENTS, logits.shape[1]
        )
        highest, total, likelihood = (torch.empty_like(target, dtype=dtype) for _ in range(3))
        for some, where, m, t, found in _chunks(
            ctx.size, logits, targets.where, highest, total, likelihood
        ):
            m.copy_(_maximum(some, dtype))
            torch.sum((some - m).exp_(), dim=1, keepdim=True, out=t)
            found.copy_(some.gather(1, where))
        likelihood.masked_fill_(~targets.here, 0)
        highest, total, likelihood = _over(group, highest, total, likelihood)
        ctx.save_for_backward(logits, *targets, highest, total)
        # m - x[target] first: log(t) would be lost beside large logits.
        loss = (highest - likelihood + total.log())[:, 0]
        return loss.masked_fill(~targets.kept[:, 0], 0)  # no view: it may be changed in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return `(softmax - onehot) * upstream`, rounded once to the dtype of the logits."""
        logits, kept, here, wheres, highest, total = ctx.saved_tensors
        by = upstream[:, None].masked_fill(~kept, 0)
        gradient = torch.empty_like(logits)
        for some, where, m, scale, less, out in _chunks(
            ctx.size, logits, wheres, highest, by / total, by.masked_fill(~here, 0), gradient
        ):
            same = out.dtype == m.dtype
            wide = torch.sub(some, m, out=out if same else None).exp_().mul_(scale)
            wide.scatter_add_(1, where, -less)
            if not same:
                out.copy_(wide)
        return gradient, None, None, None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: _Targets,
        factor: torch.Tensor,
        group: ProcessGroup | None,
        hidden_wanted: bool,
        weight_wanted: bool,
        step: Step,
    ) -> torch.Tensor:
        """Return the sum of `factor` times the losses, and keep the gradients of that sum."""
        of_hidden = hidden.new_empty(hidden.shape if hidden_wanted else (0, 0))
        of_weight = weight.new_zeros(weight.shape if weight_wanted else (0, 0), dtype=factor.dtype)
        losses = torch.empty_like(factor)
        size, part = _linear_sizes(hidden, weight, group)
        logits = hidden.new_empty(min(size, hidden.shape[0]), weight.shape[0])
        for start in range(0, hidden.shape[0], size):
            rows = slice(start, start + size)
            # An ignored token may hold NaN, which a factor of 0 would not keep out of the sums.
            some = hidden[rows].masked_fill(~targets.kept[rows], 0)
            made = torch.mm(some, weight.t(), out=logits[: some.shape[0]])
            given = (t[rows] for t in (targets.here, targets.where, factor, losses))
            for few, here, where, by, loss in _chunks(part, made, *given):
                step(few, here, where, by, loss, group, hidden_wanted or weight_wanted)
            if hidden_wanted:
                torch.mm(made, weight, out=of_hidden[rows])
            if weight_wanted:
                _accumulate(of_weight, made, some)
        if hidden_wanted and group is not None:
            distributed.all_reduce(of_hidden, group=group)
        ctx.save_for_backward(of_hidden, of_weight)
        ctx.wanted, ctx.dtype = (hidden_wanted, weight_wanted), weight.dtype
        return (losses * factor).masked_fill_(~targets.kept, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scale the kept gradients, in place unless they may be asked for again."""
        scale = torch.Tensor.mul if _graph_is_kept() else torch.Tensor.mul_
        # A number without dimensions would be rounded to the dtype of the gradient first on a GPU,
        # and a loss scale of 65536 is inf in float16.
        upstream = upstream.reshape(1)
        gradients = (
            scale(gradient, upstream).to(ctx.dtype) if wanted else None
            for gradient, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True)
        )  # fmt: skip
        return (*gradients, None, None, None, None, None, None)


def _linear_sizes(
    hidden: torch.Tensor, weight: torch.Tensor, group: ProcessGroup | None
) -> tuple[int, int]:
    """Return how many tokens are multiplied at a time, and how many of these are in the cache."""
    columns = weight.shape[0]
    if hidden.device.type == "cpu":
        # With a group, one reduction for each chunk rather than for each part of it.
        size = _rows(_CHUNK_ELEMENTS, columns)
        return size, _rows(_CACHED_ELEMENTS, columns) if group is None else size
    elements = max(_CHUNK_ELEMENTS, hidden.shape[0] * columns // _CHUNKS)
    size = _rows(min(elements, _DEVICE_ELEMENTS), columns)
    return size, size


def losses_of(
    logits: torch.Tensor,
    here: torch.Tensor,
    where: torch.Tensor,
    factor: torch.Tensor,
    loss: torch.Tensor,
    group: ProcessGroup | None,
    differentiated: bool,
) -> None:
    """Write the losses of rows of logits, and their gradient times `factor` over the logits.

    Args:
        logits: `(R, V)`, contiguous; written over if `differentiated`.
        here: `(R, 1)` bool, whether the target is one of these columns.
        where: `(R, 1)` int64, the targets in `[0, V)`, 0 where they are not here.
        factor: `(R, 1)` float32, or float64 for float64 logits.
        loss: `(R, 1)` like `factor`, written.
        group: The ranks over which the vocabulary is cut.
        differentiated: Whether the gradient is wanted.
    """
    wide = logits.to(factor.dtype)
    highest = _maximum(wide, wide.dtype)
    likelihood = wide.gather(1, where).masked_fill_(~here, 0)
    total = wide.sub_(highest).exp_().sum(dim=1, keepdim=True)
    overall, total, likelihood = _over(group, highest, total, likelihood)
    loss.copy_(overall - likelihood + total.log())
    if not differentiated:
        return
    wide.mul_(factor * torch.exp(highest - overall) / total)
    wide.scatter_add_(1, where, -factor.masked_fill(~here, 0))
    if wide is not logits:
        logits.copy_(wide)


def _accumulate(total: torch.Tensor, gradient: torch.Tensor, hidden: torch.Tensor) -> None:
    """Add `gradient.T @ hidden` to the float32 total, in blocks where it is made in half."""
    if total.dtype == gradient.dtype:
        total.addmm_(gradient.t(), hidden)
        return
    if gradient.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):  # torch 2.8
        torch.addmm(total, gradient.t(), hidden, out_dtype=total.dtype, out=total)
        return
    size = _rows(_BLOCK_ELEMENTS, hidden.shape[1])
    blocks = torch.split(gradient, size, dim=1)
    for some, block in zip(torch.split(total, size), blocks, strict=True):
        some.add_(block.t() @ hidden)


def _graph_is_kept() -> bool:
    """Tell whether backward may run again. torch has no public way to ask: else say it may."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None or torch.compiler.is_compiling() else bool(ask())
