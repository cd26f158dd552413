"""The fused modules of a transformer layer, supplied to megatron-core at its seams.

`KernelsSpecProvider` answers megatron-core's question "which class is the norm, the attention, the
activation?" with modules that call `ml_kernels`, so the same layer runs fused on every device.

Shapes: `S` sequence, `B` batch, `H` hidden, `N` heads and `G` groups of this rank, `D` head size.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)

import ml_kernels
from ml_kernels.modules import GELU, LayerNorm, RMSNorm, SwiGLU


class CoreAttention(MegatronModule):  # type: ignore[misc]
    """Causal attention of the query, key and value heads of this rank."""

    def __init__(
        self,
        config: TransformerConfig,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        _attention_mask: torch.Tensor | None = None,
        *,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: object = None,
        **_unused: Any,
    ) -> torch.Tensor:
        """Return `(S, B, N * D)` from query `(S, B, N, D)`, key and value `(S, B, G, D)`.

        Raises:
            ValueError: megatron-core asks for what is not computed here.
        """
        if attention_bias is not None or packed_seq_params is not None:
            raise ValueError("attention here is causal: no attention_bias, no packed_seq_params")
        dropout = self.dropout if self.training else 0.0
        # Heads differ between tensor-parallel ranks, so their dropout must too.
        fork = get_cuda_rng_tracker().fork() if dropout else contextlib.nullcontext()
        with fork:
            context = ml_kernels.flash_attention(
                query,
                key,
                value,
                layout="SBND",
                causal=True,
                scale=self.scale,
                dropout_p=dropout,
            )
        return context.flatten(2)


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

    def __init__(self, *, use_mc2: bool = False, activation: type = SwiGLU) -> None:
        self.use_mc2 = use_mc2
        self.activation = activation

    def column_parallel_linear(self) -> type:
        """Return the layer whose output is cut over the tensor-parallel ranks."""
        return GatheringLinear if self.use_mc2 else ColumnLinear

    def row_parallel_linear(self) -> type:
        """Return the layer whose input is cut over the tensor-parallel ranks."""
        return ScatteringLinear if self.use_mc2 else RowLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        """Return the norm module."""
        del for_qk
        return RMSNorm if rms_norm else LayerNorm

    def core_attention(self) -> type:
        """Return the attention module."""
        return CoreAttention

    def activation_func(self) -> type:
        """Return the module between the two linear layers of the MLP."""
        return self.activation


def block_spec(
    num_layers: int, *, rms_norm: bool, swiglu: bool, use_mc2: bool = False
) -> TransformerBlockSubmodules:
    """Describe the layers of one pipeline chunk."""
    provider = KernelsSpecProvider(use_mc2=use_mc2, activation=SwiGLU if swiglu else GELU)
    layer = TransformerLayerSubmodules(
        input_layernorm=provider.layer_norm(rms_norm),
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=provider.column_parallel_linear(),
                core_attention=provider.core_attention(),
                linear_proj=provider.row_parallel_linear(),
                q_layernorm=IdentityOp,
                k_layernorm=IdentityOp,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=provider.layer_norm(rms_norm),
        mlp=get_mlp_module_spec_for_backend(provider, use_te_activation_func=True),
        mlp_bda=get_bias_dropout_add,
    )
    spec = ModuleSpec(module=TransformerLayer, submodules=layer)
    return TransformerBlockSubmodules(
        layer_specs=[spec] * num_layers, layer_norm=provider.layer_norm(rms_norm)
    )
