"""Mixture of experts: MLPs of which a router chooses a few for each token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ml_models.architecture.rules import (
    at_least_one,
    flag,
    needs,
    not_negative,
    one_of,
    per_layer,
    positive,
)

_WITH_EXPERTS = needs("num_experts")


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The part of an architecture that says which layers have experts, and how they are chosen."""

    num_layers: int
    """Number of transformer layers."""
    num_experts: int | None = None
    """Number of experts in a layer; default none: every layer has one MLP."""
    moe_router_topk: int = field(default=2, metadata=_WITH_EXPERTS)
    """Experts that a token goes to."""
    moe_ffn_hidden_size: int | None = field(
        default=None, metadata={"aliases": ("--moe-intermediate-size",), **_WITH_EXPERTS}
    )
    """Width of one expert; default that of an MLP."""
    moe_layer_freq: tuple[int, ...] = field(default=(1,), metadata=_WITH_EXPERTS)
    """Layers with experts: n for every n-th one from layer 0, or for each layer 0 (none) or 1."""
    first_k_dense_replace: int = field(default=0, metadata=_WITH_EXPERTS)
    """The first layers have no experts, this many."""
    n_shared_experts: int | None = field(default=None, metadata=_WITH_EXPERTS)
    """Experts that every token goes to; together they are one MLP."""
    moe_shared_expert_intermediate_size: int | None = field(default=None, metadata=_WITH_EXPERTS)
    """Width of the shared experts together; default their number times that of an expert."""
    moe_shared_expert_gate: bool = field(
        default=False, metadata=needs("n_shared_experts", "moe_shared_expert_intermediate_size")
    )
    """Weigh the shared experts by a gate of their own."""
    moe_router_score_function: Literal["softmax", "sigmoid"] = field(
        default="softmax", metadata=_WITH_EXPERTS
    )
    """What turns the router's logits into scores."""
    moe_router_pre_softmax: bool = field(default=False, metadata=_WITH_EXPERTS)
    """Take the softmax over all experts; without it, over those that were chosen."""
    norm_topk_prob: bool = field(default=False, metadata=_WITH_EXPERTS)
    """Divide the scores of the chosen experts by their sum."""
    routed_scaling_factor: float = field(
        default=1.0, metadata={"aliases": ("--moe-router-topk-scaling-factor",), **_WITH_EXPERTS}
    )
    """Multiplies the scores of the chosen experts."""
    moe_router_num_groups: int | None = field(default=None, metadata=_WITH_EXPERTS)
    """Choose among groups of experts first, this many."""
    moe_router_group_topk: int | None = field(
        default=None, metadata={"aliases": ("--topk-group",), **_WITH_EXPERTS}
    )
    """Groups that stay in the choice."""
    moe_router_group_score: Literal["max", "top2_sum"] = field(
        default="max", metadata=_WITH_EXPERTS
    )
    """A group counts as much as its best expert (DeepSeek-V2), or its best two (DeepSeek-V3)."""
    moe_router_enable_expert_bias: bool = field(default=False, metadata=_WITH_EXPERTS)
    """Add a bias to the scores for the choice only, to balance without a loss (DeepSeek-V3)."""
    moe_router_bias_update_rate: float = field(
        default=1e-3, compare=False, metadata=needs("moe_router_enable_expert_bias")
    )
    """How much a bias changes in a step, up if its expert had less than its share of the tokens."""
    moe_router_load_balancing_type: Literal["aux_loss", "seq_aux_loss", "none"] = field(
        default="aux_loss", compare=False, metadata=_WITH_EXPERTS
    )
    """How the router learns to use all experts alike."""
    moe_aux_loss_coeff: float = field(default=0.0, compare=False, metadata=_WITH_EXPERTS)
    """Weight of the loss that balances experts."""
    moe_z_loss_coeff: float = field(default=0.0, compare=False, metadata=_WITH_EXPERTS)
    """Weight of the loss that keeps the router's logits small."""

    def _check_experts(self) -> None:
        one_of(self, "moe_router_score_function", ("softmax", "sigmoid"))
        one_of(self, "moe_router_load_balancing_type", ("aux_loss", "seq_aux_loss", "none"))
        one_of(self, "moe_router_group_score", ("max", "top2_sum"))
        at_least_one(self, ("num_experts", "moe_router_topk", "moe_ffn_hidden_size"))
        at_least_one(self, ("n_shared_experts", "moe_router_num_groups"))
        at_least_one(self, ("moe_shared_expert_intermediate_size",))
        positive(self, ("routed_scaling_factor",))
        not_negative(self, ("first_k_dense_replace", "moe_aux_loss_coeff", "moe_z_loss_coeff"))
        not_negative(self, ("moe_router_bias_update_rate",))
        marked = per_layer("moe_layer_freq", self.moe_layer_freq, self.num_layers, first=0)
        if len(self.moe_layer_freq) > 1:
            for name, value in _shortest(marked, self.first_k_dense_replace).items():
                object.__setattr__(self, name, value)
        if self.num_experts is not None:
            self._check_choice(self.num_experts)

    def _check_choice(self, num_experts: int) -> None:
        if self.moe_router_topk > num_experts:
            raise ValueError(
                f"{flag('moe_router_topk', self.moe_router_topk)}: must be at most "
                f"{flag('num_experts', num_experts)}"
            )
        if self.moe_router_enable_expert_bias and self.moe_router_score_function != "sigmoid":
            raise ValueError(
                "--moe-router-enable-expert-bias: needs --moe-router-score-function sigmoid"
            )
        groups, kept = self.moe_router_num_groups, self.moe_router_group_topk
        if (groups is None) != (kept is None):
            raise ValueError("--moe-router-num-groups: needs --moe-router-group-topk, and it this")
        if groups is not None and kept is not None:
            self._check_groups(num_experts, groups, kept)

    def _check_groups(self, num_experts: int, groups: int, kept: int) -> None:
        if num_experts % groups:
            raise ValueError(
                f"{flag('moe_router_num_groups', groups)}: must divide "
                f"{flag('num_experts', num_experts)}"
            )
        if not 1 <= kept <= groups:
            given = flag("moe_router_group_topk", kept)
            raise ValueError(f"{given}: must be from 1 to {flag('moe_router_num_groups', groups)}")
        size = num_experts // groups
        if self.moe_router_topk > kept * size:
            raise ValueError(
                f"{flag('moe_router_topk', self.moe_router_topk)}: must be at most {kept * size}, "
                f"the experts of {flag('moe_router_group_topk', kept)} groups"
            )
        if self.moe_router_group_score == "top2_sum" and size < 2:
            given = flag("moe_router_num_groups", groups)
            raise ValueError(f"{given}: --moe-router-group-score top2_sum needs groups of 2")

    def has_experts(self, layer: int) -> bool:
        """Tell whether a layer (numbered from 0) has experts in place of an MLP."""
        if self.num_experts is None or layer < self.first_k_dense_replace:
            return False
        return per_layer("moe_layer_freq", self.moe_layer_freq, self.num_layers, first=0)[layer]

    @property
    def shared_expert_size(self) -> int:
        """Width of the shared experts together; 0 if there are none."""
        if self.moe_shared_expert_intermediate_size is not None:
            return self.moe_shared_expert_intermediate_size
        return (self.n_shared_experts or 0) * (self.moe_ffn_hidden_size or 0)


def _shortest(marked: tuple[bool, ...], dense: int) -> dict[str, object]:
    """Say with fewer numbers which layers have experts, so that equal models are equal."""
    chosen = tuple(mark and layer >= dense for layer, mark in enumerate(marked))
    first = chosen.index(True) if any(chosen) else len(chosen)
    if all(chosen[first:]):
        return {"first_k_dense_replace": first, "moe_layer_freq": (1,)}
    for n in range(2, len(chosen) + 1):
        if chosen == tuple(layer % n == 0 for layer in range(len(chosen))):
            return {"first_k_dense_replace": 0, "moe_layer_freq": (n,)}
    return {"first_k_dense_replace": 0, "moe_layer_freq": tuple(map(int, chosen))}
