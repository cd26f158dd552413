"""Losses over the vocabulary, which may be cut over the ranks of a process group.

With a group every rank holds the same tokens and `V` of the `V * group.size()` entries, in rank
order, as Megatron's tensor parallelism cuts them. Every rank gets the loss of the whole vocabulary.

Shapes: `...` tokens, `V` vocabulary of this rank, `H` hidden.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import distributed
from torch.nn import functional as F

from ml_kernels.autocast import as_autocast_has
from ml_kernels.checks import (
    check_floating,
    check_group,
    check_integer,
    check_same_device,
    check_same_dtype,
    check_tensor,
    may_look_at,
    require,
)
from ml_kernels.derivatives import once_differentiable
from ml_kernels.dispatch import Backend, implementation


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    ignore_index: int = -100,
    group: distributed.ProcessGroup | None = None,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Return the negative log-likelihood of each target token, in nats.

    Args:
        logits: `(..., V)`, any floating dtype; the log-sum-exp is taken in float32.
        target: `(...)` int64 in `[0, V)`, or in `[0, V * group.size())` with a group; or
            `ignore_index`. A target out of this range is refused on a CPU. On an accelerator that
            check would wait for the device: CUDA stops in a kernel, with a group and on an NPU
            the result is undefined.
        ignore_index: A target with this value has loss 0 and no gradient (but NaN, as from torch,
            where its logits are).
        group: The ranks over which the vocabulary is cut, in rank order and equal sizes. Every rank
            gets the same losses, and the gradient of its own logits: the upstream gradients of the
            ranks must be equal.
        backend: Force an implementation by name.

    Returns:
        `(...)` float32, or float64 for float64 logits.

    Raises:
        ValueError: Shapes or devices do not fit, or a target is out of range.
        TypeError: `logits` are not floating point, `target` is not int64, or this process is not
            in the group.
    """
    check_floating("cross_entropy", "logits", logits)
    require(logits.dim() > 0, "cross_entropy", "logits", tuple(logits.shape), "must be (..., V)")
    group = _of_several("cross_entropy", group)
    _check_target("cross_entropy", target, logits, logits.shape[-1], ignore_index, group)
    return implementation("cross_entropy", logits, backend)(logits, target, ignore_index, group)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    token_weights: torch.Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    ignore_index: int = -100,
    group: distributed.ProcessGroup | None = None,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Return the cross entropy of `hidden @ weight.T`, without ever holding all the logits.

    The logits of a few tokens at a time are made, turned into their gradient and multiplied into
    the gradients of `hidden` and `weight` at once, in the forward pass (Hsu et al. 2024,
    Liger Kernel, arXiv:2410.10989). So the forward pass does the work of both, and backward only
    scales; without gradients (`torch.no_grad`, frozen inputs) only the loss is computed.

    Under `torch.autocast` the product is one of its dtype, as that of `torch.nn.Linear`.

    Args:
        hidden: `(..., H)`.
        weight: `(V, H)` in the dtype of `hidden`, as of `torch.nn.Linear`.
        target: `(...)` int64, as in `cross_entropy`.
        token_weights: `(...)` factors of the losses, such as a loss mask; of any real dtype, not
            differentiated.
        reduction: `sum` of `token_weights * loss`, or that divided by the sum of `token_weights`
            (`mean`). Ignored tokens take part in neither; the mean of no token is 0.
        ignore_index: A target with this value is left out.
        group: The ranks over which the rows of the whole weight are cut, in rank order and equal
            sizes. `hidden` is the same on all; its gradient is summed over them.
        backend: Force an implementation by name.

    Returns:
        A scalar, float32, or float64 for float64 inputs.

    Raises:
        ValueError: Shapes, devices or `reduction` do not fit, or a target is out of range.
        TypeError: The dtypes do not fit, or this process is not in the group.
    """
    operator = "linear_cross_entropy"
    hidden, weight = as_autocast_has(hidden), as_autocast_has(weight)
    _check_linear(operator, hidden, weight)
    group = _of_several(operator, group)
    _check_target(operator, target, hidden, weight.shape[0], ignore_index, group)
    _check_token_weights(operator, token_weights, target)
    require(reduction in ("mean", "sum"), operator, "reduction", reduction, "must be mean or sum")
    return implementation(operator, hidden, backend)(
        hidden, weight, target, token_weights, reduction, ignore_index, group
    )


def cross_entropy_reference(
    logits: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int,
    group: distributed.ProcessGroup | None,
) -> torch.Tensor:
    """Torch's fused log-softmax and gather; with a group the formula, summed over its ranks."""
    rows = logits.reshape(-1, logits.shape[-1])
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    flat = target.reshape(-1)
    if group is None:
        loss = F.cross_entropy(rows, flat, ignore_index=ignore_index, reduction="none")
    else:
        loss = _cut_cross_entropy(rows, flat, group).masked_fill(flat == ignore_index, 0)
    return loss.view(target.shape)


def linear_cross_entropy_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    token_weights: torch.Tensor | None,
    reduction: str,
    ignore_index: int,
    group: distributed.ProcessGroup | None,
) -> torch.Tensor:
    """The logits of all tokens, their losses and the weighted sum."""
    # An ignored token may hold NaN, which a gradient of 0 would not keep out of the sums.
    hidden = hidden.masked_fill((target == ignore_index)[..., None], 0)
    if group is not None:
        hidden = _Copied.apply(hidden, group)  # type: ignore[no-untyped-call]
    losses = cross_entropy_reference(hidden @ weight.t(), target, ignore_index, group)
    weights = factor_of(target, token_weights, ignore_index, losses.dtype)
    total = weights.sum()
    weighted = (losses * weights).sum()
    return weighted if reduction == "sum" else weighted / total.masked_fill(total == 0, 1)


def factor_of(
    target: torch.Tensor, token_weights: torch.Tensor | None, ignore_index: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return the factor of each loss: its token weight or 1, and 0 where the token is ignored."""
    if token_weights is None:
        return (target != ignore_index).to(dtype)
    # No product: what is ignored may be NaN.
    return token_weights.to(dtype).masked_fill(target == ignore_index, 0)


def _cut_cross_entropy(
    rows: torch.Tensor, target: torch.Tensor, group: distributed.ProcessGroup
) -> torch.Tensor:
    highest = rows.detach().amax(dim=-1)
    distributed.all_reduce(highest, distributed.ReduceOp.MAX, group)
    shifted = rows - highest[:, None]
    index = target - group.rank() * rows.shape[1]
    elsewhere = (index < 0) | (index >= rows.shape[1])
    likelihood = shifted.gather(1, index.masked_fill(elsewhere, 0)[:, None])[:, 0]
    parts = torch.stack((shifted.exp().sum(dim=-1), likelihood.masked_fill(elsewhere, 0)))
    total, likelihood = _Summed.apply(parts, group)  # type: ignore[no-untyped-call]
    return total.log() - likelihood


class _Summed(torch.autograd.Function):
    """The sum over the ranks, which all of them use alike: Megatron's g."""

    @staticmethod
    def forward(_: Any, x: torch.Tensor, group: distributed.ProcessGroup) -> torch.Tensor:
        x = x.clone()
        distributed.all_reduce(x, group=group)
        return x

    @staticmethod
    @once_differentiable
    def backward(_: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        return upstream, None


class _Copied(torch.autograd.Function):
    """What all ranks hold alike, and each uses for its own part: Megatron's f."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: distributed.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        upstream = upstream.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(upstream, group=ctx.group)
        return upstream, None


def _of_several(
    operator: str, group: distributed.ProcessGroup | None
) -> distributed.ProcessGroup | None:
    if group is None:
        return None
    check_group(operator, group)
    return None if group.size() == 1 else group


def _check_target(
    operator: str,
    target: torch.Tensor,
    like: torch.Tensor,
    columns: int,
    ignore_index: int,
    group: distributed.ProcessGroup | None,
) -> None:
    check_tensor(operator, "target", target)
    check_integer(operator, "ignore_index", ignore_index)
    require(
        target.shape == like.shape[:-1],
        operator,
        "target",
        tuple(target.shape),
        f"must be {tuple(like.shape[:-1])}, all dimensions of the first but the last",
    )
    if target.dtype != torch.int64:
        raise TypeError(f"{operator}: target is {target.dtype}: must be torch.int64")
    check_same_device(operator, "target", target, like)
    require(columns > 0, operator, "vocabulary", columns, "must have an entry at least")
    if may_look_at(target) and target.numel():
        whole = columns if group is None else columns * group.size()
        _check_range(operator, target, whole, ignore_index)


def _check_range(operator: str, target: torch.Tensor, whole: int, ignore_index: int) -> None:
    lowest, highest = torch.aminmax(target)
    if lowest >= 0 and highest < whole:
        return
    wrong = target[((target < 0) | (target >= whole)) & (target != ignore_index)]
    if wrong.numel():
        raise ValueError(
            f"{operator}: target {int(wrong[0])}: must be in [0, {whole}) or the ignore_index "
            f"{ignore_index}"
        )


def _check_linear(operator: str, hidden: torch.Tensor, weight: torch.Tensor) -> None:
    check_floating(operator, "hidden", hidden)
    check_same_dtype(operator, "weight", weight, hidden)
    check_same_device(operator, "weight", weight, hidden)
    require(hidden.dim() > 0, operator, "hidden", tuple(hidden.shape), "must be (..., H)")
    require(
        weight.dim() == 2 and weight.shape[1] == hidden.shape[-1],
        operator,
        "weight",
        tuple(weight.shape),
        f"must be (V, {hidden.shape[-1]}), H being the last dimension of hidden",
    )


def _check_token_weights(
    operator: str, token_weights: torch.Tensor | None, target: torch.Tensor
) -> None:
    if token_weights is None:
        return
    check_same_device(operator, "token_weights", token_weights, target)
    if token_weights.dtype.is_complex:
        raise TypeError(f"{operator}: token_weights is {token_weights.dtype}: must be real")
    shape = tuple(token_weights.shape)
    require(
        token_weights.shape == target.shape,
        operator,
        "token_weights",
        shape,
        f"must be {tuple(target.shape)} like target",
    )
    if token_weights.requires_grad:
        raise ValueError(f"{operator}: token_weights require a gradient, which they have not")
