"""The router: which experts a token goes to, and what keeps it using all of them alike.

Shapes: `S` sequence and `B` batch of this rank, `T = S * B` tokens, `E` experts, `H` hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    compute_routing_scores_for_aux_loss,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

import ml_kernels
from ml_models.architecture import Architecture


class Router(TopKRouter):  # type: ignore[misc]
    """megatron-core's router, choosing with `ml_kernels.topk_gating`.

    Its losses weigh the same in every layout: megatron-core 0.16 multiplies them by the tokens of a
    rank, so that with sequence parallelism they shrink with the number of ranks.
    """

    counted: torch.Tensor | float = 1.0
    """Part of the tokens of a micro-batch that the model's loss counts."""

    def __init__(
        self,
        arch: Architecture,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.gating_options: dict[str, Any] = {
            "score": arch.moe_router_score_function,
            "order": "score_first" if _scores_first(arch) else "topk_first",
            "num_groups": arch.moe_router_num_groups,
            "group_topk": arch.moe_router_group_topk,
            "group_score": arch.moe_router_group_score,
            "renormalize": arch.norm_topk_prob,
            "scaling_factor": arch.routed_scaling_factor,
        }

    def gating(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # megatron-core's name
        """Return the logits `(S, B, E)` in float32, whatever the dtype of the model."""
        logits: torch.Tensor = _Logits.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.bias
        )
        return logits

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose experts.

        Args:
            logits: `(S, B, E)`.
            padding_mask: Must be None.

        Returns:
            The weight of each expert for each token, 0 if it is not chosen, `(T, E)` float32; and
            whether it is chosen, `(T, E)`.
        """
        if padding_mask is not None:
            raise ValueError("the router counts every token: no padding_mask")
        length, batch = logits.shape[:2]
        learns = self.training and torch.is_grad_enabled()
        logits = logits.flatten(0, 1)
        if learns:
            logits = self.apply_z_loss(logits)
        weights, chosen = ml_kernels.topk_gating(
            logits, self.topk, selection_bias=self.expert_bias, **self.gating_options
        )
        probs = torch.zeros_like(logits).scatter(1, chosen, weights)
        routing_map = torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)
        if learns and self.is_aux_loss_enabled():
            counted, scores = compute_routing_scores_for_aux_loss(
                logits, self.topk, self.score_function
            )
            probs = self._apply_aux_loss(probs, scores, counted)
            probs = self._apply_seq_aux_loss(probs, scores, counted, length, batch)
        if learns and self.expert_bias is not None:
            self.local_tokens_per_expert += routing_map.sum(dim=0)
        return probs, routing_map

    def apply_z_loss(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attach the loss that keeps logits `(T, E)` small (ST-MoE, arXiv:2202.08906)."""
        del padding_mask
        if not self.config.moe_z_loss_coeff:
            return logits
        # The mean over the tokens of a micro-batch, times those that count: see below.
        loss = self.config.moe_z_loss_coeff * logits.logsumexp(dim=-1).square().sum()
        attached: torch.Tensor = MoEAuxLossAutoScaler.apply(logits, loss * self.counted)
        return attached

    def attach_and_log_load_balancing_loss(
        self,
        activation: torch.Tensor,
        aux_loss_coeff: float,
        aux_loss: torch.Tensor,
        aux_loss_name: str,
        reduce_group: torch.distributed.ProcessGroup,
        **_options: Any,
    ) -> torch.Tensor:
        """Attach this rank's part of a loss to `(T, E)`.

        All gradients are divided by the number of tokens that count in the end, so the loss, which
        is a mean, is multiplied by that of the micro-batch: on all ranks that share it.
        """
        del aux_loss_coeff, aux_loss_name
        tokens = activation.shape[0] * reduce_group.size() * self.counted
        attached: torch.Tensor = MoEAuxLossAutoScaler.apply(activation, aux_loss * tokens)
        return attached


class _Logits(torch.autograd.Function):
    """A product in float32 that keeps its factors as they are for the backward pass.

    megatron-core has the same, but calls Transformer Engine in it without asking if it is there.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        wide = None if bias is None else bias.float()
        return torch.nn.functional.linear(hidden.float(), weight.float(), wide)

    @staticmethod
    def backward(
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        (grad,) = grads
        hidden, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_weight = rows.T @ hidden.flatten(0, -2).float()
        grad_bias = None if ctx.bias_dtype is None else rows.sum(dim=0).to(ctx.bias_dtype)
        grad_hidden = grad @ weight.float()
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), grad_bias


def _scores_first(arch: Architecture) -> bool:
    return arch.moe_router_pre_softmax or arch.moe_router_score_function == "sigmoid"
