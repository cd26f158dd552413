"""What families with experts share: their routers' keys, and the usual names of experts."""

from __future__ import annotations

from ml_models.families.decoder import HF_LAYER, MLP
from ml_models.families.entries import Value
from ml_models.families.rules import Rule, Same, Stacked

EXPERT = f"{MLP}.experts.local_experts.@"

BALANCE = Value("router_aux_loss_coef", "moe_aux_loss_coeff", float, default=0.001)

ROUTER = Same(f"{MLP}.router", f"{HF_LAYER}.mlp.gate")
EXPERTS: tuple[Rule, ...] = (
    Stacked(
        f"{EXPERT}.linear_fc1",
        (f"{HF_LAYER}.mlp.experts.@.gate_proj", f"{HF_LAYER}.mlp.experts.@.up_proj"),
    ),
    Same(f"{EXPERT}.linear_fc2", f"{HF_LAYER}.mlp.experts.@.down_proj"),
)
