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


class Norm(torch.nn.Module):
    """RMSNorm or LayerNorm, as the config says; works with sequence parallelism."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        device = torch.cuda.current_device()
        ones = torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(ones)
        self.bias: torch.nn.Parameter | None = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros_like(ones))
        for parameter in self.parameters():
            # megatron-core sums the gradients of such parameters over the tensor-parallel ranks,
            # each of which sees only its part of the sequence.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise `(S, B, H)` over its last dimension."""
        if self.bias is None:
            return ml_kernels.rms_norm(hidden, self.weight, eps=self.eps)
        return ml_kernels.layer_norm(hidden, self.weight, self.bias, eps=self.eps)


class SwiGLU(torch.nn.Module):
    """The gated activation between the two linear layers of the MLP."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        del config  # nothing to configure; megatron-core builds every module with one

    def forward(self, gate_and_up: torch.Tensor) -> torch.Tensor:
        """Return `silu(gate) * up`, `(S, B, F)` from `(S, B, 2F)`."""
        return ml_kernels.swiglu(gate_and_up)


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
        **_unused: Any,
    ) -> torch.Tensor:
        """Return `(S, B, N * D)` from query `(S, B, N, D)`, key and value `(S, B, G, D)`."""
        dropout = self.dropout if self.training else 0.0
        # Heads differ between tensor-parallel ranks, so their dropout must too.
        fork = get_cuda_rng_tracker().fork() if dropout else contextlib.nullcontext()
        with fork:
            context = ml_kernels.dot_product_attention(
                query, key, value, causal=True, scale=self.scale, dropout_p=dropout
            )
        return context.flatten(2)


class KernelsSpecProvider(LocalSpecProvider):  # type: ignore[misc]
    """megatron-core's own parallel linear layers, and `ml_kernels` for everything between them."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        """Return the norm module; it reads the kind of norm from the config."""
        del rms_norm, for_qk
        return Norm

    def core_attention(self) -> type:
        """Return the attention module."""
        return CoreAttention

    def activation_func(self) -> type:
        """Return the gated activation module."""
        return SwiGLU


def block_spec(num_layers: int, *, swiglu: bool) -> TransformerBlockSubmodules:
    """Describe the layers of one pipeline chunk."""
    provider = KernelsSpecProvider()
    layer = TransformerLayerSubmodules(
        input_layernorm=provider.layer_norm(),
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
        pre_mlp_layernorm=provider.layer_norm(),
        mlp=get_mlp_module_spec_for_backend(provider, use_te_activation_func=swiglu),
        mlp_bda=get_bias_dropout_add,
    )
    spec = ModuleSpec(module=TransformerLayer, submodules=layer)
    return TransformerBlockSubmodules(
        layer_specs=[spec] * num_layers, layer_norm=provider.layer_norm()
    )
