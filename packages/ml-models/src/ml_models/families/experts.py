"""What families with experts share: their routers' keys, and the usual names of experts."""

from __future__ import annotations

from ml_models.families.decoder import HF_LAYER, MLP
from ml_models.families.entries import Value
from ml_models.families.rules import Rule, Same, Stacked

EXPERT = f"{MLP}.experts.local_experts.@"

BALANCE = Value("router_aux_loss_coef", "moe_aux_loss_coeff", float, default=0.001)
"""The number is taken as it is, though the two losses differ.

megatron-core adds up one loss for each layer, E * sum(f * p) with the shares of tokens f and of
probability p that each of E experts gets. transformers takes the mean of f and p over all layers
first, so that one layer may make up for another, and counts f for each token, not for each of its
top k experts. Where all layers load their experts alike, as with one layer of experts,
transformers' loss and its gradient are exactly megatron-core's times k / layers; else there is no
factor. Those who train with Megatron, as most of these models were, mean its loss by their number.
To weigh the loss as transformers does, give --moe-aux-loss-coeff the number times k / layers.
"""

ROUTER = Same(f"{MLP}.router", f"{HF_LAYER}.mlp.gate")
EXPERTS: tuple[Rule, ...] = (
    Stacked(
        f"{EXPERT}.linear_fc1",
        (f"{HF_LAYER}.mlp.experts.@.gate_proj", f"{HF_LAYER}.mlp.experts.@.up_proj"),
    ),
    Same(f"{EXPERT}.linear_fc2", f"{HF_LAYER}.mlp.experts.@.down_proj"),
)
