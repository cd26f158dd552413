"""Mixture of experts on an NPU: torch_npu's kernels, with the derivatives it does not have.

torch_npu derives permute and unpermute itself. `npu_grouped_matmul` has no derivative, nor have the
gating kernels (one has a backward kernel for the sigmoid form only): here they get ours, the gating
kernels by computing the weights of the chosen experts once more in torch. Combinations that no
gating kernel computes are refused, and the public function, unless this backend was named, then
goes through torch: a handful of operations on a few numbers per token.

Shapes as in `ml_kernels.moe`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch_npu

from ml_kernels.derivatives import once_differentiable
from ml_kernels.dispatch import BackendUnavailableError
from ml_kernels.grouped import Kernels, grouped_product
from ml_kernels.moe import (
    RENORMALIZE_EPS,
    Gating,
    gating_scores,
    gating_weights,
    moe_permute_reference,
    moe_unpermute_reference,
    topk_gating_reference,
)
from ml_kernels.npu.limits import DTYPES, refuse

# Limits from the operators' documentation (torch_npu 2.13).
_MAX_PERMUTED = 16_777_215  # choices of all tokens, exclusive
_MAX_CHOICES = 512  # of one token, in permute and unpermute
_MAX_GATED_CHOICES = 1024  # of one token, in npu_moe_gating_top_k_softmax
_MAX_GATED_EXPERTS = 2048  # in npu_moe_gating_top_k, each group rounded up to 32
_MAX_GROUPS = 1024  # of npu_grouped_matmul
_MAX_WIDTH = 65_536  # of npu_grouped_matmul, exclusive

Chosen = tuple[torch.Tensor, torch.Tensor]
Choose = Callable[[torch.Tensor, "torch.Tensor | None", Gating], Chosen]


def topk_gating(
    logits: torch.Tensor, selection_bias: torch.Tensor | None, gating: Gating
) -> Chosen:
    """See `ml_kernels.topk_gating`.

    | what is asked for                                        | computed by                       |
    |----------------------------------------------------------|-----------------------------------|
    | softmax first, no groups, no bias                        | `npu_moe_gating_top_k_softmax`    |
    | top-k first, no groups, no bias                          | `npu_moe_gating_top_k_softmax_v2` |
    | softmax first, groups or bias                            | `npu_moe_gating_top_k`            |
    | sigmoid, renormalised (the kernel always does)           | `npu_moe_gating_top_k`            |
    | sigmoid as it is; top-k first with groups or bias        | refused                           |
    | sizes outside the kernels' limits; float64               | refused                           |
    | no tokens                                                | torch                             |

    Raises:
        BackendUnavailableError: No kernel computes this.
    """
    if not logits.shape[0]:
        return topk_gating_reference(logits, selection_bias, gating)
    choose = _chooser(logits, selection_bias, gating)
    weights, indices = _Gating.apply(  # type: ignore[no-untyped-call]
        logits, selection_bias, gating, choose
    )
    return weights, indices


def moe_permute(tokens: torch.Tensor, indices: torch.Tensor) -> Chosen:
    """See `ml_kernels.moe_permute`: float32, bfloat16, float16; at most 512 choices of a token.

    Raises:
        BackendUnavailableError: Another dtype, or more choices than the kernel takes.
    """
    if not indices.numel():
        permuted, order = moe_permute_reference(tokens, indices)
        return permuted, order.to(torch.int32)
    _check_dtype("moe_permute", "tokens", tokens)
    if indices.numel() >= _MAX_PERMUTED or indices.shape[1] > _MAX_CHOICES:
        raise BackendUnavailableError(
            f"moe_permute: indices {tuple(indices.shape)}: an NPU takes at most {_MAX_CHOICES} "
            f"choices of a token and fewer than {_MAX_PERMUTED} of all; use backend='reference'"
        )
    permuted, order = torch_npu.npu_moe_token_permute(tokens, indices)
    return permuted, order


def moe_unpermute(
    permuted: torch.Tensor, order: torch.Tensor, probs: torch.Tensor | None
) -> torch.Tensor:
    """See `ml_kernels.moe_unpermute`: float32, bfloat16, float16, weights in any of these.

    Raises:
        BackendUnavailableError: Another dtype, more choices than the kernel takes, or an order
            that is not the kernel's.
    """
    if not permuted.numel():
        return moe_unpermute_reference(permuted, order, probs)
    _check_dtype("moe_unpermute", "permuted", permuted)
    if order.dtype != torch.int32:
        raise BackendUnavailableError(
            f"moe_unpermute: order is {order.dtype}: an NPU takes the int32 order of its own "
            "moe_permute; use backend='reference' for both"
        )
    if probs is not None:
        _check_dtype("moe_unpermute", "probs", probs)
        if probs.shape[1] > _MAX_CHOICES:
            raise BackendUnavailableError(
                f"moe_unpermute: probs {tuple(probs.shape)}: an NPU takes at most {_MAX_CHOICES} "
                "choices of a token; use backend='reference'"
            )
    return torch_npu.npu_moe_token_unpermute(permuted, order, probs=probs)


def grouped_matmul(
    x: torch.Tensor, weight: torch.Tensor, group_sizes: torch.Tensor
) -> torch.Tensor:
    """See `ml_kernels.grouped_matmul`: float32, bfloat16, float16.

    Raises:
        BackendUnavailableError: Another dtype, more than 1024 groups, or a width of 65536 or more.
    """
    _check_dtype("grouped_matmul", "x", x)
    groups, inner, outer = weight.shape
    if groups > _MAX_GROUPS or max(inner, outer) >= _MAX_WIDTH:
        raise BackendUnavailableError(
            f"grouped_matmul: weight {tuple(weight.shape)}: an NPU takes at most {_MAX_GROUPS} "
            f"groups and widths below {_MAX_WIDTH}; use backend='reference'"
        )
    if groups == 1:  # which some versions of the kernel refuse
        return torch.mm(x, weight[0])
    if not weight.transpose(1, 2).is_contiguous():  # a transposed view is as good
        weight = weight.contiguous()
    sizes = group_sizes.to(x.device, non_blocking=True)
    return grouped_product(x.contiguous(), weight, sizes, _KERNELS)


def _check_dtype(operator: str, argument: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise BackendUnavailableError(
            f"{operator}: {argument} is {tensor.dtype}: an NPU takes float32, bfloat16 and "
            "float16; use backend='reference'"
        )


def _chooser(logits: torch.Tensor, selection_bias: torch.Tensor | None, gating: Gating) -> Choose:
    """Pick the kernel for a combination: the table of `topk_gating`."""
    _check_dtype("topk_gating", "logits", logits)
    plain = gating.num_groups is None and selection_bias is None
    if gating.score == "softmax" and plain and gating.k <= _MAX_GATED_CHOICES:
        return _softmax_of_all if gating.order == "score_first" else _softmax_of_chosen
    if gating.order == "topk_first":
        rule = f"takes no groups, no selection_bias and at most {_MAX_GATED_CHOICES} choices"
        refuse("topk_gating", "order", gating.order, rule)
    if gating.score == "sigmoid" and not gating.renormalize:
        refuse("topk_gating", "score", gating.score, "needs renormalize=True")
    groups = gating.num_groups or 1
    size = logits.shape[1] // groups
    if size <= 2 or -(-size // 32) * 32 * groups > _MAX_GATED_EXPERTS:
        rule = (
            f"a group must have 3 experts at least, and all groups {_MAX_GATED_EXPERTS} at most, "
            "each rounded up to 32"
        )
        refuse("topk_gating", "logits", tuple(logits.shape), rule)
    return _grouped


def _softmax_of_all(logits: torch.Tensor, _bias: torch.Tensor | None, gating: Gating) -> Chosen:
    scores, indices, _ = torch_npu.npu_moe_gating_top_k_softmax(logits, None, gating.k)
    return _weigh(scores, gating), indices


def _softmax_of_chosen(logits: torch.Tensor, _bias: torch.Tensor | None, gating: Gating) -> Chosen:
    weights, indices, _ = torch_npu.npu_moe_gating_top_k_softmax_v2(logits, k=gating.k, renorm=1)
    return weights * gating.scaling_factor, indices


def _grouped(logits: torch.Tensor, selection_bias: torch.Tensor | None, gating: Gating) -> Chosen:
    """Choose with groups or a bias.

    `renorm` must be 0, which means that scores come before the choice. Sigmoid scores are divided
    by their sum all the same, softmax scores never.
    """
    sigmoid = gating.score == "sigmoid"
    scores, indices, _ = torch_npu.npu_moe_gating_top_k(
        logits,
        gating.k,
        bias=None if selection_bias is None else selection_bias.to(logits.dtype),
        k_group=gating.group_topk or 1,
        group_count=gating.num_groups or 1,
        group_select_mode=0 if gating.group_score == "max" else 1,
        renorm=0,
        norm_type=1 if sigmoid else 0,
        out_flag=False,
        routed_scaling_factor=gating.scaling_factor if sigmoid else 1.0,
        eps=RENORMALIZE_EPS,
    )
    return scores if sigmoid else _weigh(scores, gating), indices


def _weigh(scores: torch.Tensor, gating: Gating) -> torch.Tensor:
    if gating.renormalize:
        scores = scores / (scores.sum(dim=-1, keepdim=True) + RENORMALIZE_EPS)
    return scores * gating.scaling_factor


class _Gating(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        selection_bias: torch.Tensor | None,
        gating: Gating,
        choose: Choose,
    ) -> Chosen:
        weights, indices = choose(logits.float(), selection_bias, gating)
        indices = indices.long()
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(logits, indices)
        ctx.gating = gating
        return weights, indices

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None]:
        logits, indices = ctx.saved_tensors
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            weights = gating_weights(gating_scores(leaf, ctx.gating), indices, ctx.gating)
        (of_logits,) = torch.autograd.grad(weights, leaf, gradient)
        return of_logits, None, None, None


def _rows(x: torch.Tensor, weight: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    if not x.shape[0]:
        return x.new_empty(0, weight.shape[2])
    return torch_npu.npu_grouped_matmul(
        [x], [weight], group_list=sizes, split_item=2, group_type=0, group_list_type=1
    )[0]


def _summed(x: torch.Tensor, y: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Group along the summed dimension: `x` has to be a transposed view, not a transposed copy."""
    # The text in torch_npu 2.13 lists -1 and 0 for Atlas A2, and a 1 that op-plugin's check refuses
    # ("The group type must be -1, 0 or 2", GroupedMatmulKernelNpuOpApi.cpp). Its newer edition,
    # torch_npu-npu_grouped_matmul.md of August 2026: 2 groups along k, A2 and A3 take -1, 0 and 2.
    if not x.shape[0]:
        return x.new_zeros(sizes.shape[0], x.shape[1], y.shape[1])
    return torch_npu.npu_grouped_matmul(
        [x.t()], [y], group_list=sizes, split_item=3, group_type=2, group_list_type=1
    )[0]


_KERNELS = Kernels(_rows, _summed)
"""`group_list_type=1`: the groups' sizes, not their ends; empty groups give zero gradients."""
