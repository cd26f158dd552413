"""The layers of a pipeline chunk as megatron-core's specs: what each of them is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)

from ml_models.activation import activation_spec
from ml_models.architecture import Architecture
from ml_models.attention import self_attention_spec
from ml_models.experts import experts_spec
from ml_models.modules import KernelsSpecProvider

_FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""Keys of megatron-core's distributed checkpoints, alike whether norms are fused or not."""


@dataclass
class PostNormSubmodules(TransformerLayerSubmodules):  # type: ignore[misc]
    """The parts of a layer that also normalizes what attention and MLP return."""

    post_norm: type | None = None


class PostNormLayer(TransformerLayer):  # type: ignore[misc]
    """A layer that normalizes what joins the residual stream, too (Grok-1, Gemma 2, GLM-4).

    megatron-core calls `self_attn_bda` and `mlp_bda` for "add the bias, drop out, add the residual
    stream"; here each of them normalizes first.
    """

    def __init__(
        self, config: TransformerConfig, submodules: PostNormSubmodules, *args: Any, **options: Any
    ) -> None:
        super().__init__(config, submodules, *args, **options)
        size = {"hidden_size": config.hidden_size, "eps": config.layernorm_epsilon}
        self.post_attn_norm = build_module(submodules.post_norm, config=config, **size)
        self.post_mlp_layernorm = build_module(submodules.post_norm, config=config, **size)
        for add, norm in (
            ("self_attn_bda", self.post_attn_norm),
            ("mlp_bda", self.post_mlp_layernorm),
        ):
            setattr(self, add, _after(norm, getattr(self, add)))


def _after(norm: torch.nn.Module, add: Callable[..., Any]) -> Callable[..., Any]:
    """Put a norm before a bias-dropout-add of megatron-core."""

    def bind(training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        function = add(training, fused)

        def normalize_and_add(
            output_and_bias: tuple[torch.Tensor, torch.Tensor | None],
            residual: torch.Tensor,
            dropout: float,
        ) -> Any:
            output, bias = output_and_bias
            normalized = norm(output if bias is None else output + bias)
            return function((normalized, None), residual, dropout)

        return normalize_and_add

    return bind


def block_spec(
    arch: Architecture, layers: Iterable[int], *, use_mc2: bool = False
) -> TransformerBlockSubmodules:
    """Describe the layers of one pipeline chunk.

    Args:
        arch: The model.
        layers: Global numbers of the layers.
        use_mc2: Overlap the collectives of sequence parallelism with the products beside them.
    """
    provider = KernelsSpecProvider(activation_spec(arch), use_mc2=use_mc2)
    norm = provider.layer_norm(arch.normalization == "RMSNorm")
    attention = self_attention_spec(arch, provider)  # one for all: layers share its tables
    dense, sparse = (
        _layer_spec(arch, norm, attention, mlp)
        for mlp in (_mlp_spec(provider), experts_spec(arch, provider))
    )
    specs = [sparse if arch.has_experts(layer) else dense for layer in layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm)


def _layer_spec(
    arch: Architecture, norm: type, attention: ModuleSpec, mlp: ModuleSpec
) -> ModuleSpec:
    parts = {
        "input_layernorm": norm,
        "self_attention": attention,
        "self_attn_bda": get_bias_dropout_add,
        "pre_mlp_layernorm": norm,
        "mlp": mlp,
        "mlp_bda": get_bias_dropout_add,
        "sharded_state_dict_keys_map": {} if arch.multi_latent_attention else _FUSED_NORMS,
    }
    if arch.post_norm:
        submodules = PostNormSubmodules(**parts, post_norm=norm)
        return ModuleSpec(module=PostNormLayer, submodules=submodules)
    return ModuleSpec(module=TransformerLayer, submodules=TransformerLayerSubmodules(**parts))


def _mlp_spec(provider: KernelsSpecProvider) -> ModuleSpec:
    return ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(
            linear_fc1=provider.column_parallel_linear(),
            linear_fc2=provider.row_parallel_linear(),
            activation_func=provider.activation_func(),
        ),
    )
