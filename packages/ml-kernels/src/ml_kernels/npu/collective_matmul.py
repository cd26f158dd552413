"""Matrix products fused with their collective on an NPU (MC2), called as MindSpeed calls them.

The kernels have no derivative: ours are here. The backward of a gather runs the plain collectives
beside the two products, so that `x` need not be kept whole and no kernel shares its communicator
with a collective in flight; the backward of a scatter is one fused gather.

What the documentation says and nothing here can see: on Atlas A2 all fused operators of a model,
these three together, must use the same communicator: one tensor-parallel group, whose ranks are
linked each with each. Its newer edition (op-plugin, August 2026) allows 16 and 32 ranks for gather
and scatter on Atlas A3; that of torch_npu 2.13 does not, and they are refused.

Shapes: `R` rows of the whole group, `tp` ranks, `I` and `O` inner and outer width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch_npu

from ml_kernels.collective_gradients import (
    Gradients,
    gathered_backward,
    reduced_backward,
    with_gradients,
)
from ml_kernels.dispatch import BackendUnavailableError

# Limits from the operators' documentation (torch_npu 2.13).
_DTYPES = (torch.bfloat16, torch.float16)
_RANKS = (2, 4, 8)
_INNER = range(256, 65_535)


def all_gather_matmul(
    x: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    """See `ml_kernels.all_gather_matmul`: bfloat16 and float16, 2, 4 or 8 ranks (1: no kernel).

    Raises:
        BackendUnavailableError: Another dtype or number of ranks, or `I` outside [256, 65535).
    """
    if group.size() == 1:
        return torch.mm(x, weight.t())
    _check("all_gather_matmul", x, group)
    _check_inner("all_gather_matmul", "x", x, "the inner width", x.shape[1])
    return with_gradients(
        x, _dense(weight), group, product=_gather_and_multiply, backward=gathered_backward
    )


def matmul_reduce_scatter(
    x: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    """See `ml_kernels.matmul_reduce_scatter`: bfloat16 and float16, 2, 4 or 8 ranks (1: no kernel).

    Raises:
        BackendUnavailableError: Another dtype or number of ranks, or `I / tp` or, with gradients,
            `O` outside [256, 65535).
    """
    if group.size() == 1:
        return torch.mm(x, weight.t())
    _check("matmul_reduce_scatter", x, group)
    _check_inner("matmul_reduce_scatter", "x", x, "the inner width", x.shape[1])
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        # The backward pass multiplies by the weight from the other side.
        outer = weight.shape[0]
        _check_inner(
            "matmul_reduce_scatter", "weight", weight, "the outer width (for gradients)", outer
        )
    return with_gradients(
        x, _dense(weight), group, product=_multiply_and_scatter, backward=_scattered_backward
    )


def matmul_all_reduce(
    x: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    """See `ml_kernels.matmul_all_reduce`: bfloat16 and float16, 2, 4 or 8 ranks (1: no kernel).

    Raises:
        BackendUnavailableError: Another dtype or number of ranks.
    """
    if group.size() == 1:
        return torch.mm(x, weight.t())
    _check("matmul_all_reduce", x, group)
    return with_gradients(
        x, _dense(weight), group, product=_multiply_and_reduce, backward=reduced_backward
    )


def _gather_and_multiply(
    x: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    return _gathered(x, weight.t(), group, keep=False)[0]


def _multiply_and_scatter(
    x: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    return torch_npu.npu_mm_reduce_scatter_base(
        x.contiguous(),
        weight.t(),
        _communicator(group),
        group.size(),
        reduce_op="sum",
        bias=None,
        comm_turn=0,
    )


def _scattered_backward(
    gradient: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    group: dist.ProcessGroup,
    x_needed: bool,
) -> Gradients:
    of_x, gathered = _gathered(gradient, weight, group, keep=True)
    return of_x if x_needed else None, None if x is None else gathered.t() @ x


def _multiply_and_reduce(
    x: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    return torch_npu.npu_mm_all_reduce_base(
        x.contiguous(),
        weight.t(),
        _communicator(group),
        reduce_op="sum",
        bias=None,
        comm_turn=0,
    )


def _gathered(
    x: torch.Tensor, matrix: torch.Tensor, group: dist.ProcessGroup, *, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the product of the gathered rows, and the rows when they are kept.

    `x` must not be a transposed view, `matrix` may be one; a bias is not supported.
    """
    product, gathered = torch_npu.npu_all_gather_base_mm(
        x.contiguous(),
        matrix,
        _communicator(group),
        group.size(),
        bias=None,
        gather_index=0,
        gather_output=keep,
        comm_turn=0,
    )
    return product, gathered


def _dense(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix that is contiguous, or the transposed view of one that is."""
    return matrix if matrix.t().is_contiguous() else matrix.contiguous()


def _communicator(group: dist.ProcessGroup) -> str:
    """Name the group as HCCL knows it."""
    rank = dist.get_global_rank(group, group.rank())
    hccl: Any = group._get_backend(torch.device("npu"))
    name: str = hccl.get_hccl_comm_name(rank)
    return name


def _check(operator: str, x: torch.Tensor, group: dist.ProcessGroup) -> None:
    if x.dtype not in _DTYPES:
        raise BackendUnavailableError(
            f"{operator}: x is {x.dtype}: an NPU takes bfloat16 and float16; use "
            "backend='reference'"
        )
    if group.size() not in _RANKS:
        raise BackendUnavailableError(
            f"{operator}: group of {group.size()}: an NPU takes 1, 2, 4 or 8 ranks; use "
            "backend='reference'"
        )


def _check_inner(
    operator: str, argument: str, tensor: torch.Tensor, which: str, width: int
) -> None:
    if width not in _INNER:
        raise BackendUnavailableError(
            f"{operator}: {argument} {tuple(tensor.shape)}: on an NPU {which} must be in "
            f"[{_INNER.start}, {_INNER.stop}), is {width}; use backend='reference'"
        )
