"""Matrix products joined with a collective: the linear layers of tensor and sequence parallelism.

A column-parallel layer gathers the sequence and multiplies; a row-parallel layer multiplies and
adds up over the ranks, scattering the sequence again (Korthikanti et al. 2022, arXiv:2205.05198) or
not. Fused or overlapped, the communication hides behind the product: what Ascend calls MC2. The
backward of a gather is a scatter that adds, and the other way round.

Shapes: `S` the whole sequence (dimension 0), `tp` ranks, `I` and `O` inner and outer width of the
whole layer; weights are `(outer, inner)` as in `torch.nn.Linear`. Ranks hold consecutive parts of
the sequence in their order. Implementations see rows, `(S, ...)` flattened.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from ml_kernels.autocast import as_autocast_has
from ml_kernels.checks import (
    check_floating,
    check_group,
    check_same_device,
    check_same_dtype,
    require,
)
from ml_kernels.derivatives import once_differentiable
from ml_kernels.dispatch import Backend, implementation


def all_gather_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    group: dist.ProcessGroup,
    *,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Gather the sequence and multiply: a column-parallel layer without its bias.

    Every rank must call with the same shapes. For the gradient of the weight the sequence is
    gathered again, so that a rank keeps only its own part of it, as in Megatron.

    Under `torch.autocast` both factors are cast to its dtype (float64 is not), as by `linear`.

    Args:
        x: `(S / tp, ..., I)`, any floating dtype.
        weight: `(O / tp, I)` in the dtype of `x`.
        group: The ranks of tensor parallelism.
        backend: Force an implementation by name.

    Returns:
        `(S, ..., O / tp)` in the dtype of `x`.

    Raises:
        ValueError: Shapes or devices do not fit.
        TypeError: Dtypes do not fit, or this process is not in the group.
    """
    x, weight = as_autocast_has(x), as_autocast_has(weight)
    _check("all_gather_matmul", x, weight, group)
    return _apply("all_gather_matmul", x, weight, group, x.shape[0] * group.size(), backend)


def matmul_reduce_scatter(
    x: torch.Tensor,
    weight: torch.Tensor,
    group: dist.ProcessGroup,
    *,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Multiply, add up over the ranks, keep a part: a row-parallel layer without its bias.

    Under `torch.autocast` both factors are cast to its dtype (float64 is not), as by `linear`.

    Args:
        x: `(S, ..., I / tp)`, any floating dtype; the ranks must divide `S`.
        weight: `(O, I / tp)` in the dtype of `x`.
        group: The ranks of tensor parallelism.
        backend: Force an implementation by name.

    Returns:
        `(S / tp, ..., O)` in the dtype of `x`, in which partial sums travel too.

    Raises:
        ValueError: Shapes or devices do not fit, or the ranks do not divide the sequence.
        TypeError: Dtypes do not fit, or this process is not in the group.
    """
    x, weight = as_autocast_has(x), as_autocast_has(weight)
    _check("matmul_reduce_scatter", x, weight, group)
    ranks = group.size()
    require(
        x.shape[0] % ranks == 0,
        "matmul_reduce_scatter",
        "x",
        tuple(x.shape),
        f"the sequence, {x.shape[0]}, must be divisible by the ranks of the group, {ranks}",
    )
    return _apply("matmul_reduce_scatter", x, weight, group, x.shape[0] // ranks, backend)


def matmul_all_reduce(
    x: torch.Tensor,
    weight: torch.Tensor,
    group: dist.ProcessGroup,
    *,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Multiply and add up over the ranks: a row-parallel layer without sequence parallelism.

    The result is the same on all ranks, and its gradient must be, too: each rank takes its own and
    nothing is communicated, as in Megatron.

    Under `torch.autocast` both factors are cast to its dtype (float64 is not), as by `linear`.

    Args:
        x: `(S, ..., I / tp)`, any floating dtype.
        weight: `(O, I / tp)` in the dtype of `x`.
        group: The ranks of tensor parallelism.
        backend: Force an implementation by name.

    Returns:
        `(S, ..., O)` in the dtype of `x`.

    Raises:
        ValueError: Shapes or devices do not fit.
        TypeError: Dtypes do not fit, or this process is not in the group.
    """
    x, weight = as_autocast_has(x), as_autocast_has(weight)
    _check("matmul_all_reduce", x, weight, group)
    return _apply("matmul_all_reduce", x, weight, group, x.shape[0], backend)


def all_gather_matmul_reference(
    x: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    """Gather, then multiply: `(R / tp, I)` to `(R, O / tp)`."""
    gathered: torch.Tensor = _AllGather.apply(x, group)  # type: ignore[no-untyped-call]
    return F.linear(gathered, weight)


def matmul_reduce_scatter_reference(
    x: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    """Multiply, then reduce and scatter: `(R, I / tp)` to `(R / tp, O)`."""
    partial = F.linear(x, weight)
    result: torch.Tensor = _ReduceScatter.apply(partial, group)  # type: ignore[no-untyped-call]
    return result


def matmul_all_reduce_reference(
    x: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    """Multiply, then reduce: `(R, I / tp)` to `(R, O)`."""
    partial = F.linear(x, weight)
    result: torch.Tensor = _AllReduce.apply(partial, group)  # type: ignore[no-untyped-call]
    return result


def start_all_gather(x: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, dist.Work]:
    """Begin to gather `(R / tp, C)` to `(R, C)`; the result is there when the work has waited."""
    gathered = x.new_empty(group.size() * x.shape[0], x.shape[1])
    renamed = getattr(dist, "all_gather_single", None)  # in torch 2.13
    gather = renamed or dist.all_gather_into_tensor
    return gathered, gather(gathered, x.contiguous(), group=group, async_op=True)


def start_reduce_scatter(
    x: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, dist.Work]:
    """Begin to add up `(R, C)` over the ranks, scattered to `(R / tp, C)`."""
    part = x.new_empty(x.shape[0] // group.size(), x.shape[1])
    renamed = getattr(dist, "reduce_scatter_single", None)  # in torch 2.13
    scatter = renamed or dist.reduce_scatter_tensor
    return part, scatter(part, x.contiguous(), group=group, async_op=True)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        gathered, work = start_all_gather(x, group)
        work.wait()
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        part, work = start_reduce_scatter(gradient, ctx.group)
        work.wait()
        return part, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        part, work = start_reduce_scatter(x, group)
        work.wait()
        return part

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        gathered, work = start_all_gather(gradient, ctx.group)
        work.wait()
        return gathered, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(_ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def _apply(
    operator: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    group: dist.ProcessGroup,
    sequence: int,
    backend: Backend | None,
) -> torch.Tensor:
    """Run an implementation on rows and give the result its sequence length."""
    run, rows = implementation(operator, x, backend), x.flatten(0, -2)
    # Without rows on this rank there are none on any: nothing to communicate.
    out: torch.Tensor = run(rows, weight, group) if rows.shape[0] else rows.mm(weight.t())
    return out.view(sequence, *x.shape[1:-1], weight.shape[0])


def _check(operator: str, x: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup) -> None:
    check_floating(operator, "x", x)
    check_same_dtype(operator, "weight", weight, x)
    check_same_device(operator, "weight", weight, x)
    require(x.dim() >= 2, operator, "x", tuple(x.shape), "must be (sequence, ..., inner width)")
    require(
        weight.dim() == 2 and weight.shape[1] == x.shape[-1],
        operator,
        "weight",
        tuple(weight.shape),
        f"must be (outer width, {x.shape[-1]}) for x {tuple(x.shape)}",
    )
    check_group(operator, group)
