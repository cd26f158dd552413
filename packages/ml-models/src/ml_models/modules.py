"""The linear layers of a model, and which classes it is made of, supplied to megatron-core.

`KernelsSpecProvider` answers megatron-core's question "which class is the norm, the linear layer,
the activation?" with modules that call `ml_kernels`, so the same layer runs fused on every device.

Shapes: `S` sequence, `B` batch, `H` hidden, `F` width of an MLP.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec

import ml_kernels
from ml_kernels.modules import LayerNorm, RMSNorm


class ColumnLinear(ColumnParallelLinear):  # type: ignore[misc]
    """megatron-core's layer whose output is cut, with our product where nothing is communicated."""

    def _forward_impl(
        self,
        input: torch.Tensor,  # noqa: A002  # megatron-core passes it by this name
        weight: torch.Tensor,
        *,
        bias: torch.Tensor | None,
        **options: Any,
    ) -> torch.Tensor:
        if options["sequence_parallel"] or options["allreduce_dgrad"]:
            return super()._forward_impl(input, weight, bias=bias, **options)
        return ml_kernels.linear(input, weight, bias)


class RowLinear(RowParallelLinear):  # type: ignore[misc]
    """megatron-core's layer whose input is cut, with our product: it communicates afterwards."""

    def _forward_impl(
        self,
        input: torch.Tensor,  # noqa: A002  # megatron-core passes it by this name
        weight: torch.Tensor,
        *,
        bias: torch.Tensor | None,
        **_options: Any,
    ) -> torch.Tensor:
        return ml_kernels.linear(input, weight, bias)


class GatheringLinear(ColumnLinear):
    """A layer whose output is cut, and that gathers its sequence while it multiplies (MC2)."""

    def _forward_impl(
        self,
        input: torch.Tensor,  # noqa: A002  # megatron-core passes it by this name
        weight: torch.Tensor,
        *,
        bias: torch.Tensor | None,
        **options: Any,
    ) -> torch.Tensor:
        if not options["sequence_parallel"]:
            return super()._forward_impl(input, weight, bias=bias, **options)
        output = ml_kernels.all_gather_matmul(input, weight, options["tp_group"])
        return output if bias is None else output + bias


class ScatteringLinear(RowLinear):
    """A layer whose input is cut, and that adds up and scatters its sequence meanwhile (MC2)."""

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return `(S/tp, B, H)` from `(S, B, F/tp)`, and the bias if it is not added here."""
        if not self.sequence_parallel or self.explicit_expert_comm:
            return super().forward(input_)
        output = ml_kernels.matmul_reduce_scatter(input_, self.weight, self.tp_group)
        if self.skip_bias_add:
            return output, self.bias
        return (output if self.bias is None else output + self.bias), None


class KernelsSpecProvider(LocalSpecProvider):  # type: ignore[misc]
    """megatron-core's own parallel linear layers, and `ml_kernels` for everything between them."""

    def __init__(self, activation: type | ModuleSpec, *, use_mc2: bool = False) -> None:
        self.activation = activation
        self.use_mc2 = use_mc2

    def column_parallel_linear(self) -> type:
        """Return the layer whose output is cut over the tensor-parallel ranks."""
        return GatheringLinear if self.use_mc2 else ColumnLinear

    def row_parallel_linear(self) -> type:
        """Return the layer whose input is cut over the tensor-parallel ranks."""
        return ScatteringLinear if self.use_mc2 else RowLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        """Return the norm module; the configuration tells it whether its weight is offset by 1."""
        del for_qk
        return RMSNorm if rms_norm else LayerNorm

    def activation_func(self) -> type | ModuleSpec:
        """Return the module between the two linear layers of the MLP."""
        return self.activation
