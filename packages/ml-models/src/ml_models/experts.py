"""A mixture of experts out of megatron-core's parts, with our router and our products.

Tokens travel to the ranks of their experts and back by megatron-core's all-to-all dispatcher; each
expert is a small MLP. What is ours: how experts are chosen (`ml_models.router`), and that the bias
of an expert's second layer counts once, however many tensor-parallel ranks add their parts up.
"""

from __future__ import annotations

from functools import partial

import torch
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec

from ml_models.architecture import Architecture
from ml_models.modules import ColumnLinear, KernelsSpecProvider, RowLinear
from ml_models.router import Router


class ExpertRowLinear(RowLinear):
    """The second layer of an expert: no collective, which is the dispatcher's.

    The dispatcher adds up what the tensor-parallel ranks have only after megatron-core has added
    the bias on each of them, so each gives its part of the bias. The gradients of the parts are
    added up as well: megatron-core marks the bias as seen by a part of the sequence.
    """

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return `(T, H)` from `(T, F/tp)`, and this rank's part of the bias."""
        output = self._forward_impl(input=input_, weight=self.weight, bias=None)
        return output, None if self.bias is None else self.bias / self.tp_group.size()


def experts_spec(arch: Architecture, provider: KernelsSpecProvider) -> ModuleSpec:
    """Describe what replaces the MLP in a layer with experts."""
    experts = MLPSubmodules(
        linear_fc1=ColumnLinear,  # experts have collectives of their own: there is no MC2 here
        linear_fc2=ExpertRowLinear,
        activation_func=provider.activation_func(),
    )
    shared = MLPSubmodules(
        linear_fc1=provider.column_parallel_linear(),
        linear_fc2=provider.row_parallel_linear(),
        activation_func=provider.activation_func(),
    )
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(
            experts=ModuleSpec(module=SequentialMLP, submodules=experts),
            shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=shared),
            router=partial(Router, arch),
        ),
    )
