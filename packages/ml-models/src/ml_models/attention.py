"""Self attention at megatron-core's seam: which modules a layer of an `Architecture` is built from.

There is one description for all layers: a module knows by its number whether it has a window or
positions. The parts: `positions` turns queries and keys, `core_attention` attends,
`latent_attention` is DeepSeek's way to queries, keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer import attention as megatron
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec

from ml_models.architecture import Architecture
from ml_models.core_attention import CoreAttention
from ml_models.latent_attention import LatentAttention, LatentSubmodules
from ml_models.positions import Rotary
from ml_models.turning import TurnsQueriesAndKeys

__all__ = ["CoreAttention", "SelfAttention", "self_attention_spec"]


class SelfAttention(TurnsQueriesAndKeys, megatron.SelfAttention):  # type: ignore[misc]
    """megatron-core's self attention, with our positions."""

    def __init__(self, *arguments: Any, rotary: Rotary, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.rotary = rotary


def self_attention_spec(arch: Architecture, provider: BackendSpecProvider) -> ModuleSpec:
    """Describe the self attention of every layer of a model; layers ask for their number.

    Args:
        arch: The model.
        provider: Gives the classes of linear layers and norms.
    """
    core = ModuleSpec(module=CoreAttention, params={"arch": arch})
    output = provider.row_parallel_linear()
    output = _with_bias(output) if arch.add_dense_bias else output
    norm = provider.layer_norm(arch.normalization == "RMSNorm", for_qk=True)
    shared = {"attn_mask_type": AttnMaskType.causal, "rotary": Rotary(arch)}
    if arch.multi_latent_attention:
        return ModuleSpec(
            module=LatentAttention,
            params={**shared, "arch": arch},
            submodules=LatentSubmodules(
                core_attention=core,
                linear_proj=output,
                column_linear=provider.column_parallel_linear(),
                norm=norm,
            ),
        )
    return ModuleSpec(
        module=SelfAttention,
        params=shared,
        submodules=megatron.SelfAttentionSubmodules(
            linear_qkv=provider.column_parallel_linear(),
            core_attention=core,
            linear_proj=output,
            q_layernorm=norm if arch.qk_layernorm else IdentityOp,
            k_layernorm=norm if arch.qk_layernorm else IdentityOp,
        ),
    )


def _with_bias(linear: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """Return the class with a bias, which megatron-core asks for in all linear layers or none."""

    class OutputLinear(linear):  # type: ignore[misc,valid-type]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "bias": True})

    return OutputLinear
