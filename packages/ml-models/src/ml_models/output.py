"""The output layer with what some families do to its weight and to the logits, and the loss.

Shapes: `S` sequence, `B` batch, `H` hidden, `V` vocabulary with its padding.
"""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel

from ml_models.architecture import Architecture
from ml_models.modules import ColumnLinear


class OutputLayer(ColumnLinear):
    """The layer that turns hidden states into logits.

    megatron-core builds this layer itself and asks no one for its class, so this one is put on a
    layer that exists: see `refine_output`.
    """

    norm_head: bool
    multiplier: float
    softcap: float | None

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the logits `(S, B, V/tp)`, gathered to `(S, B, V)` where asked for, and None."""
        if self.norm_head:
            # Each row is whole on its rank, so its length needs no communication. Rows of padding
            # are zeros and stay zeros, as long as what they are divided by at least is none.
            weight = self.weight if weight is None else weight
            least = max(1e-12, torch.finfo(weight.dtype).tiny)
            weight = torch.nn.functional.normalize(weight, eps=least)
        logits, bias = super().forward(input_, weight, runtime_gather_output)
        if self.multiplier != 1.0:
            logits = logits * self.multiplier
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits, bias


def refine_output(module: GPTModel, arch: Architecture) -> None:
    """Let the output layer of a model do what `arch` says, beside the product."""
    layer = module.output_layer
    layer.__class__ = OutputLayer
    layer.norm_head = arch.norm_head
    layer.multiplier = arch.output_multiplier_scale
    layer.softcap = arch.final_logit_softcapping
