"""Mixture of experts: choose experts, bring tokens to them, multiply, bring the results back.

A layer of experts is four calls. `topk_gating` chooses K of E experts for each token and weighs
them; `moe_permute` copies each token once per choice, in the order of the experts; `grouped_matmul`
multiplies the rows of each expert by its weight; `moe_unpermute` adds a token's K results up.

Shapes: `T` tokens, `E` experts, `K` choices of a token, `H` hidden, `M` rows of all experts
together, `I` and `O` the inner and outer widths of an expert's weight.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch

from ml_kernels.autocast import as_autocast_has
from ml_kernels.checks import (
    check_finite,
    check_floating,
    check_integer,
    check_same_device,
    check_same_dtype,
    check_tensor,
    may_look_at,
    require,
)
from ml_kernels.dispatch import Backend, BackendUnavailableError, implementation

Score = Literal["softmax", "sigmoid"]
Order = Literal["score_first", "topk_first"]
GroupScore = Literal["max", "top2_sum"]

RENORMALIZE_EPS = 1e-20
"""Added to the sum that chosen scores are divided by, as in DeepSeek-V3."""


class Gating(NamedTuple):
    """How experts are chosen and weighed: the arguments of `topk_gating`, checked."""

    k: int
    score: Score
    order: Order
    num_groups: int | None
    group_topk: int | None
    group_score: GroupScore
    renormalize: bool
    scaling_factor: float


def topk_gating(
    logits: torch.Tensor,
    k: int,
    *,
    score: Score = "softmax",
    order: Order = "score_first",
    num_groups: int | None = None,
    group_topk: int | None = None,
    group_score: GroupScore = "max",
    selection_bias: torch.Tensor | None = None,
    renormalize: bool = False,
    scaling_factor: float = 1.0,
    backend: Backend | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose `k` experts for each token and weigh them.

    Mixtral (arXiv:2401.04088) takes `order="topk_first"`, which equals a renormalised
    `"score_first"`; DeepSeek-V2 (arXiv:2405.04434) groups with `group_score="max"`; DeepSeek-V3
    (arXiv:2412.19437) sigmoids, groups with `"top2_sum"` and a selection bias.

    Args:
        logits: `(T, E)`, any floating dtype.
        k: Experts of a token, at most `E`.
        score: What turns logits into scores.
        order: `"score_first"` scores all experts, then chooses the best. `"topk_first"` chooses by
            logits, then takes the softmax over the chosen, whose sum is 1.
        num_groups: Cut the experts, in their order, into so many groups of equal size, and choose
            only from a token's best `group_topk` groups. ModelLink's groups are the ranks of expert
            parallelism.
        group_topk: Groups of a token, at most `num_groups`.
        group_score: A group is worth its best expert, or its best two together.
        selection_bias: `(E,)` added to the scores (with `"topk_first"` to the logits) when choosing
            and not when weighing, without a gradient: balancing without a loss (arXiv:2408.15664).
        renormalize: Divide the chosen scores by their sum.
        scaling_factor: Multiplies the weights, last.
        backend: Force an implementation by name. What no kernel of an NPU computes, such as sigmoid
            scores that are not renormalised, goes through torch's formula there, or is refused if
            "npu" is named.

    Returns:
        Weights `(T, K)` float32 (float64 for float64 logits), differentiable in the logits, and the
        chosen experts `(T, K)` int64, the best first.

    Raises:
        ValueError: Sizes do not fit or options contradict each other.
        TypeError: A tensor is not floating point, or a number of experts or groups is no int.
        BackendUnavailableError: The named backend cannot compute this.
    """
    gating = Gating(
        k, score, order, num_groups, group_topk, group_score, renormalize, scaling_factor
    )
    _check_gating(logits, selection_bias, gating)
    run = implementation("topk_gating", logits, backend)
    try:
        probs, indices = run(logits, selection_bias, gating)
    except BackendUnavailableError:
        if backend is not None:
            raise
        return topk_gating_reference(logits, selection_bias, gating)
    return probs, indices


def moe_permute(
    tokens: torch.Tensor, indices: torch.Tensor, *, backend: Backend | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy each token once for each of its experts, in the order of the experts.

    Args:
        tokens: `(T, H)`, any floating dtype.
        indices: `(T, K)` integers: the experts of each token, at least 0. That is checked on a CPU
            only: elsewhere looking would wait for the device.
        backend: Force an implementation by name.

    Returns:
        The copies `(T * K, H)`, sorted by expert, those of one expert in the order of the tokens;
        and an integer tensor `(T * K,)` whose meaning belongs to the implementation: hand it to
        `moe_unpermute`, on the same backend, and nothing else.

    Raises:
        ValueError: Shapes or devices do not fit.
        TypeError: The tokens are not floating point, or the indices no integers.
    """
    check_floating("moe_permute", "tokens", tokens)
    require(
        tokens.dim() == 2, "moe_permute", "tokens", tuple(tokens.shape), "must be (tokens, hidden)"
    )
    _check_integers("moe_permute", "indices", indices)
    require(
        indices.dim() == 2 and indices.shape[0] == tokens.shape[0],
        "moe_permute",
        "indices",
        tuple(indices.shape),
        f"must be ({tokens.shape[0]}, choices), a row for each token",
    )
    check_same_device("moe_permute", "indices", indices, tokens)
    _check_range("moe_permute", "indices", indices, None)
    permuted, order = implementation("moe_permute", tokens, backend)(tokens, indices)
    return permuted, order


def moe_unpermute(
    permuted: torch.Tensor,
    order: torch.Tensor,
    probs: torch.Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Add up the K rows of each token, each multiplied by its weight: the way back.

    Args:
        permuted: `(T * K, H)` in the order of `moe_permute`, any floating dtype.
        order: `(T * K,)`, what `moe_permute` returned; on a CPU it is checked to name rows.
        probs: `(T, K)`, any floating dtype; products and sums are taken in float32. None where
            each token has one expert, whose row is returned as it is.
        backend: Force an implementation by name.

    Returns:
        `(T, H)` in the dtype of `permuted`.

    Raises:
        ValueError: Shapes or devices do not fit.
        TypeError: A tensor has no such dtype.
    """
    check_floating("moe_unpermute", "permuted", permuted)
    _check_integers("moe_unpermute", "order", order)
    rows = order.numel()
    require(
        order.dim() == 1 and permuted.dim() == 2 and permuted.shape[0] == rows,
        "moe_unpermute",
        "permuted",
        tuple(permuted.shape),
        f"must be ({rows}, hidden), a row for each entry of order {tuple(order.shape)}",
    )
    check_same_device("moe_unpermute", "order", order, permuted)
    _check_range("moe_unpermute", "order", order, rows)
    if probs is not None:
        check_floating("moe_unpermute", "probs", probs)
        check_same_device("moe_unpermute", "probs", probs, permuted)
        require(
            probs.dim() == 2 and probs.numel() == rows and probs.shape[1] > 0,
            "moe_unpermute",
            "probs",
            tuple(probs.shape),
            f"must be (tokens, choices) with a weight for each of the {rows} rows",
        )
    result: torch.Tensor = implementation("moe_unpermute", permuted, backend)(
        permuted, order, probs
    )
    return result


def grouped_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    group_sizes: torch.Tensor,
    *,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Multiply consecutive groups of rows, each by a matrix of its own.

    Under `torch.autocast` both factors are cast to its dtype (float64 is not), as by `linear`.

    Args:
        x: `(M, I)`, any floating dtype: the rows of the first group, then of the second, ...
        weight: `(E, I, O)` in the dtype of `x`: a matrix for each group.
        group_sizes: `(E,)` int64, rows of each group, whose sum must be `M`; groups may be empty.
            On the CPU or with `x`. Values on a CPU are checked; on a CUDA device a wrong sum stops
            the process (a device-side assertion); on an NPU, which has none, it is not noticed.
        backend: Force an implementation by name.

    Returns:
        `(M, O)` in the dtype of `x`.

    Raises:
        ValueError: Shapes, devices or sizes do not fit.
        TypeError: Dtypes do not fit.
    """
    name = "grouped_matmul"
    x, weight = as_autocast_has(x), as_autocast_has(weight)
    check_floating(name, "x", x)
    check_same_dtype(name, "weight", weight, x)
    check_same_device(name, "weight", weight, x)
    require(x.dim() == 2, name, "x", tuple(x.shape), "must be (rows, inner width)")
    require(
        weight.dim() == 3 and weight.shape[0] > 0 and weight.shape[1] == x.shape[1],
        name,
        "weight",
        tuple(weight.shape),
        f"must be (groups, {x.shape[1]}, outer width) for x {tuple(x.shape)}",
    )
    _check_group_sizes(x, weight, group_sizes)
    result: torch.Tensor = implementation(name, x, backend)(x, weight, group_sizes)
    return result


def topk_gating_reference(
    logits: torch.Tensor, selection_bias: torch.Tensor | None, gating: Gating
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score, choose, weigh."""
    scores = gating_scores(logits, gating)
    indices = _choose(scores.detach(), selection_bias, gating)
    return gating_weights(scores, indices, gating), indices


def gating_scores(logits: torch.Tensor, gating: Gating) -> torch.Tensor:
    """What experts are chosen by, `(T, E)` in at least float32: scores, or logits as they are."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if gating.order == "topk_first":
        return wide
    return wide.softmax(dim=-1) if gating.score == "softmax" else wide.sigmoid()


def gating_weights(scores: torch.Tensor, indices: torch.Tensor, gating: Gating) -> torch.Tensor:
    """Weigh the chosen experts, `(T, K)`."""
    chosen = scores.gather(1, indices)
    if gating.order == "topk_first":
        chosen = chosen.softmax(dim=-1)
    elif gating.renormalize:
        chosen = chosen / (chosen.sum(dim=-1, keepdim=True) + RENORMALIZE_EPS)
    return chosen * gating.scaling_factor


def _choose(
    scores: torch.Tensor, selection_bias: torch.Tensor | None, gating: Gating
) -> torch.Tensor:
    if selection_bias is not None:
        scores = scores + selection_bias.detach()
    if gating.num_groups is not None and gating.group_topk is not None:
        groups = torch.unflatten(scores, 1, (gating.num_groups, -1))  # (T, groups, E / groups)
        best = 1 if gating.group_score == "max" else 2
        worth = groups.topk(best, dim=-1).values.sum(dim=-1)  # (T, groups)
        kept = worth.topk(gating.group_topk, dim=-1).indices.sort(dim=-1).values
        # Only these: a mask of -inf would tie with an expert that has -inf, being switched off.
        width = groups.shape[-1]
        inside = groups.gather(1, kept[:, :, None].expand(-1, -1, width)).flatten(1)
        chosen = inside.topk(gating.k, dim=-1).indices
        return kept.gather(1, chosen // width) * width + chosen % width
    return scores.topk(gating.k, dim=-1).indices


def moe_permute_reference(
    tokens: torch.Tensor, indices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A stable sort and a gather; `order[t * K + j]` is the row of choice `j` of token `t`."""
    rows = indices.flatten().argsort(stable=True)
    order = inverse_permutation(rows)
    return tokens.index_select(0, rows // max(1, indices.shape[1])), order


def moe_unpermute_reference(
    permuted: torch.Tensor, order: torch.Tensor, probs: torch.Tensor | None
) -> torch.Tensor:
    """A gather and a sum."""
    rows = permuted.index_select(0, order)
    if probs is None:
        return rows
    wide = torch.promote_types(permuted.dtype, torch.float32)
    weighed = (
        torch.unflatten(rows, 0, probs.shape).to(wide) * probs.to(wide)[:, :, None]
    )  # (T, K, H)
    return weighed.sum(dim=1).to(permuted.dtype)


def inverse_permutation(permutation: torch.Tensor) -> torch.Tensor:
    """Return the permutation that undoes this one."""
    positions = torch.arange(permutation.numel(), device=permutation.device)
    return torch.empty_like(positions).scatter_(0, permutation.long(), positions)


def grouped_matmul_reference(
    x: torch.Tensor, weight: torch.Tensor, group_sizes: torch.Tensor
) -> torch.Tensor:
    """One product after the other."""
    groups = torch.split(x, group_sizes.tolist())
    return torch.cat([rows @ matrix for rows, matrix in zip(groups, weight, strict=True)])


def _check_gating(
    logits: torch.Tensor, selection_bias: torch.Tensor | None, gating: Gating
) -> None:
    name = "topk_gating"
    check_floating(name, "logits", logits)
    require(logits.dim() == 2, name, "logits", tuple(logits.shape), "must be (tokens, experts)")
    experts = logits.shape[1]
    check_integer(name, "k", gating.k)
    check_finite(name, scaling_factor=gating.scaling_factor)
    require(1 <= gating.k <= experts, name, "k", gating.k, f"must be 1 to {experts}, the experts")
    for argument, choices in (("score", Score), ("order", Order), ("group_score", GroupScore)):
        value = getattr(gating, argument)
        require(value in get_args(choices), name, argument, value, f"must be in {choices}")
    require(
        gating.order == "score_first" or gating.score == "softmax",
        name,
        "order",
        gating.order,
        'the softmax over the chosen needs score="softmax"',
    )
    _check_groups(experts, gating)
    if selection_bias is not None:
        check_floating(name, "selection_bias", selection_bias)
        check_same_device(name, "selection_bias", selection_bias, logits)
        require(
            selection_bias.shape == logits.shape[1:],
            name,
            "selection_bias",
            tuple(selection_bias.shape),
            f"must be ({experts},), a number for each expert",
        )


def _check_groups(experts: int, gating: Gating) -> None:
    name, groups, kept = "topk_gating", gating.num_groups, gating.group_topk
    if groups is None or kept is None:
        require(groups is kept, name, "num_groups", groups, f"needs group_topk, which is {kept}")
        return
    check_integer(name, "num_groups", groups)
    check_integer(name, "group_topk", kept)
    require(
        groups > 0 and experts % groups == 0,
        name,
        "num_groups",
        groups,
        f"must divide {experts}, the experts",
    )
    require(1 <= kept <= groups, name, "group_topk", kept, f"must be 1 to num_groups={groups}")
    size = experts // groups
    require(
        gating.k <= kept * size,
        name,
        "k",
        gating.k,
        f"must be at most {kept * size}, the experts of group_topk={kept} groups",
    )
    require(
        gating.group_score == "max" or size >= 2,
        name,
        "group_score",
        gating.group_score,
        f"needs groups of two experts, has {experts} / {groups}",
    )


def _check_integers(operator: str, argument: str, tensor: torch.Tensor) -> None:
    check_tensor(operator, argument, tensor)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{operator}: {argument} is {tensor.dtype}: must be int32 or int64")


def _check_range(operator: str, argument: str, tensor: torch.Tensor, end: int | None) -> None:
    """Check that integers on a CPU are in `[0, end)`."""
    if not (may_look_at(tensor) and tensor.numel()):
        return
    lowest, highest = (int(value) for value in torch.aminmax(tensor))
    require(lowest >= 0, operator, argument, lowest, "must not be negative")
    rule = f"must be below {end}, the number of rows"
    require(end is None or highest < end, operator, argument, highest, rule)


def _check_group_sizes(x: torch.Tensor, weight: torch.Tensor, group_sizes: torch.Tensor) -> None:
    name = "grouped_matmul"
    check_tensor(name, "group_sizes", group_sizes)
    if group_sizes.dtype != torch.int64:
        raise TypeError(f"{name}: group_sizes is {group_sizes.dtype}: must be int64")
    require(
        group_sizes.shape == weight.shape[:1],
        name,
        "group_sizes",
        tuple(group_sizes.shape),
        f"must be ({weight.shape[0]},), a size for each matrix of weight",
    )
    if group_sizes.device.type != "cpu":
        check_same_device(name, "group_sizes", group_sizes, x)
    if not may_look_at(group_sizes):
        return
    sizes = group_sizes.tolist()
    require(
        min(sizes) >= 0 and sum(sizes) == x.shape[0],
        name,
        "group_sizes",
        sizes,
        f"must not be negative and sum to {x.shape[0]}, the rows of x",
    )
