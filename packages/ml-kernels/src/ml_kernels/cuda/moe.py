"""Mixture of experts on a GPU: torch's grouped matrix product, and permutations by gathers only.

The grouped kernel takes all experts at once and the groups' sizes stay on the device; elsewhere a
loop waits for them and launches a product for each expert. The kernel is for bfloat16 on Hopper and
newer (from torch 2.10 on Ampere too), and wants rows of a multiple of 16 bytes.

Autograd derives a gather as a scatter that adds: atomic additions, whose order and so whose
rounding changes from run to run, and in bfloat16 a rounding for each addition. A permutation knows
its inverse, so that here the gradients are gathers as well: deterministic, summed in float32.

Shapes as in `ml_kernels.moe`.
"""

from __future__ import annotations

from typing import Any

import torch

from ml_kernels.derivatives import once_differentiable
from ml_kernels.grouped import LOOP, Kernels, grouped_product
from ml_kernels.moe import inverse_permutation

_ALIGNMENT = 16
"""Bytes that rows and tensors must be aligned to."""


def grouped_matmul(
    x: torch.Tensor, weight: torch.Tensor, group_sizes: torch.Tensor
) -> torch.Tensor:
    """See `ml_kernels.grouped_matmul`."""
    if not fused(x, weight, torch.cuda.get_device_capability(x.device)):
        return grouped_product(x, weight, group_sizes.tolist(), LOOP)
    ends = group_sizes.to(x.device, non_blocking=True).cumsum(0)
    torch._assert_async(ends[-1] == x.shape[0], "grouped_matmul: group_sizes: must sum to the rows")
    return grouped_product(_aligned(x), _aligned_matrices(weight), ends.to(torch.int32), FUSED)


def fused(x: torch.Tensor, weight: torch.Tensor, capability: tuple[int, int]) -> bool:
    """Say whether torch's grouped kernel takes these tensors, on a GPU of this capability."""
    if x.dtype != torch.bfloat16 or not x.shape[0] or not hasattr(torch, "_grouped_mm"):
        return False
    several = hasattr(torch.nn.functional, "grouped_mm")  # torch 2.10; before, Hopper only
    if not (capability[0] >= 8 if several else capability[0] == 9):
        return False
    return all(size > 0 and size * x.element_size() % _ALIGNMENT == 0 for size in weight.shape[1:])


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def _aligned_matrices(weight: torch.Tensor) -> torch.Tensor:
    """Return `(E, I, O)` contiguous, or the transposed view of such a tensor."""
    if weight.transpose(1, 2).is_contiguous() and weight.data_ptr() % _ALIGNMENT == 0:
        return weight
    return _aligned(weight)


def _rows(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return torch._grouped_mm(x, weight, offs=ends)


def _summed(x: torch.Tensor, y: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return torch._grouped_mm(x.t(), _aligned(y), offs=ends)


FUSED = Kernels(_rows, _summed)
"""Torch's grouped kernel. Its `groups` are the int32 ends of the groups, on the device."""


def moe_permute(tokens: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ml_kernels.moe_permute`; the order is that of the reference."""
    rows = indices.flatten().argsort(stable=True)
    order = inverse_permutation(rows)
    permuted: torch.Tensor = _Permute.apply(  # type: ignore[no-untyped-call]
        tokens, rows, order, indices.shape[1]
    )
    return permuted, order


def moe_unpermute(
    permuted: torch.Tensor, order: torch.Tensor, probs: torch.Tensor | None
) -> torch.Tensor:
    """See `ml_kernels.moe_unpermute`."""
    result: torch.Tensor = _Unpermute.apply(  # type: ignore[no-untyped-call]
        permuted, order, probs
    )
    return result


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, rows: torch.Tensor, order: torch.Tensor, choices: int
    ) -> torch.Tensor:
        ctx.save_for_backward(order)
        ctx.shape = (tokens.shape[0], choices)
        return tokens.index_select(0, rows // max(1, choices))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (order,) = ctx.saved_tensors
        of_copies = torch.unflatten(gradient.index_select(0, order), 0, ctx.shape)  # (T, K, H)
        return of_copies.sum(dim=1), None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, permuted: torch.Tensor, order: torch.Tensor, probs: torch.Tensor | None
    ) -> torch.Tensor:
        rows = permuted.index_select(0, order)
        if probs is None:
            ctx.save_for_backward(order)
            return rows
        ctx.save_for_backward(order, permuted, probs)
        wide = torch.promote_types(permuted.dtype, torch.float32)
        weighed = (
            torch.unflatten(rows, 0, probs.shape).to(wide) * probs.to(wide)[:, :, None]
        )  # (T, K, H)
        return weighed.sum(dim=1).to(permuted.dtype)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, None, torch.Tensor | None]:
        """Return `gradient * probs` by expert, and the products of the gradient with the rows."""
        order, *saved = ctx.saved_tensors
        of_permuted = of_probs = None
        if not saved:
            return gradient.index_select(0, inverse_permutation(order)), None, None
        permuted, probs = saved
        choices = probs.shape[1]
        wide = torch.promote_types(permuted.dtype, torch.float32)
        if ctx.needs_input_grad[0]:
            slots = inverse_permutation(order)
            by_expert = gradient.index_select(0, slots // choices)
            weights = probs.flatten().index_select(0, slots).to(wide)
            of_permuted = (by_expert * weights[:, None]).to(permuted.dtype)
        if ctx.needs_input_grad[2]:
            rows = torch.unflatten(permuted.index_select(0, order), 0, probs.shape)
            of_probs = (rows.to(wide) @ gradient.to(wide)[:, :, None]).squeeze(-1).to(probs.dtype)
        return of_permuted, None, of_probs
