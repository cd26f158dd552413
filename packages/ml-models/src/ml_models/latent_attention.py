"""DeepSeek's latent attention: keys and values are computed from one short vector for each token.

Every tensor-parallel rank computes the latent vectors of its tokens with whole matrices, and the
queries, keys and values of its heads from them. megatron-core's own module has that layout only
with Transformer Engine, and adds up no gradients of the shared key without sequence parallelism.

A head of query and key has two parts: one without positions, one that turns with the position and,
in keys, is the same in all heads. Here the turning part comes first, as in all other attention;
scores do not depend on the order of channels.

Shapes: `S` sequence (`S/tp` with sequence parallelism), `B` batch, `H` hidden, `N` heads of this
rank, `R` turning channels, `K` the others, `V` size of a head of the values.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

import ml_kernels
from ml_models.architecture import Architecture
from ml_models.positions import Rotary
from ml_models.turning import TurnsQueriesAndKeys


class ReplicatedLinear(torch.nn.Module):
    """A linear layer without bias that every tensor-parallel rank holds whole."""

    def __init__(self, inputs: int, outputs: int, config: TransformerConfig) -> None:
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        empty = torch.empty(outputs, inputs, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(empty)
        # With sequence parallelism a rank sees some of the tokens, and megatron-core adds the
        # gradients of such parameters up. It looks for an attribute no Parameter declares.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return `(S, B, outputs)` from `(S, B, inputs)`."""
        return ml_kernels.linear(hidden, self.weight)


@dataclass(frozen=True, kw_only=True)
class LatentSubmodules:
    """The classes a latent attention is built from."""

    core_attention: Any
    linear_proj: Any
    column_linear: type
    """Layer whose output is cut over the tensor-parallel ranks."""
    norm: type
    """Norm of the latent vectors."""


class LatentAttention(TurnsQueriesAndKeys, Attention):  # type: ignore[misc]
    """Self attention of one layer; megatron-core's Attention does what follows q, k and v."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: LatentSubmodules,
        layer_number: int,
        *,
        arch: Architecture,
        rotary: Rotary,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        # megatron-core sizes the output layer by this, for heads of the values.
        sized = copy.copy(config)
        sized.kv_channels = arch.value_head_dim
        super().__init__(
            config=sized,
            submodules=submodules,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type="self",
            cp_comm_type=cp_comm_type,
            pg_collection=pg_collection,
        )
        self.config = config
        self.arch, self.rotary = arch, rotary
        self.k_layernorm = None  # megatron-core's Attention looks for it
        self.key_hidden_size = arch.query_head_dim  # sizes of the cache
        self.val_hidden_size = arch.value_head_dim
        self._build_queries(submodules)
        self._build_keys_and_values(submodules)

    def _build_queries(self, submodules: LatentSubmodules) -> None:
        arch = self.arch
        width = arch.num_attention_heads * arch.query_head_dim
        self.q_layernorm: torch.nn.Module | None = None
        if arch.q_lora_rank is None:
            self.linear_q_proj = self._column(submodules, arch.hidden_size, width, "q_proj")
            return
        self.linear_q_down_proj = ReplicatedLinear(arch.hidden_size, arch.q_lora_rank, self.config)
        self.q_layernorm = self._norm(submodules, arch.q_lora_rank)
        self.linear_q_up_proj = self._column(submodules, arch.q_lora_rank, width, "q_up_proj")

    def _build_keys_and_values(self, submodules: LatentSubmodules) -> None:
        arch = self.arch
        rank, turning = arch.kv_lora_rank or 0, arch.rotary_dim
        width = arch.num_attention_heads * ((arch.qk_head_dim or 0) + arch.value_head_dim)
        self.linear_kv_down_proj = ReplicatedLinear(arch.hidden_size, rank + turning, self.config)
        self.kv_layernorm = self._norm(submodules, rank)
        self.linear_kv_up_proj = self._column(submodules, rank, width, "kv_up_proj")

    def _norm(self, submodules: LatentSubmodules, size: int) -> torch.nn.Module | None:
        if not self.arch.qk_layernorm:
            return None
        norm: torch.nn.Module = submodules.norm(
            hidden_size=size, config=self.config, eps=self.config.layernorm_epsilon
        )
        return norm

    def _column(
        self, submodules: LatentSubmodules, inputs: int, outputs: int, name: str
    ) -> torch.nn.Module:
        layer: torch.nn.Module = submodules.column_linear(
            inputs,
            outputs,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name=name,
            tp_group=self.tp_group,
        )
        return layer

    def get_query_key_value_tensors(
        self, hidden_states: torch.Tensor, *_given: Any, **_options: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return `(S, B, N, R + K)` twice and `(S, B, N, V)` from `(S, B, H)`; nothing is turned.

        `S` of the hidden states is `S/tp` with sequence parallelism.
        """
        arch = self.arch
        turning, rest = arch.rotary_dim, arch.qk_head_dim or 0
        query = _in_heads(self._queries(hidden_states), rest + turning)
        query = torch.cat((query[..., rest:], query[..., :rest]), dim=-1)

        down = self.linear_kv_down_proj(hidden_states)
        latent, shared = torch.split(down, [arch.kv_lora_rank or 0, turning], dim=-1)
        if self.kv_layernorm is not None:
            latent = self.kv_layernorm(latent)
        up, _ = self.linear_kv_up_proj(latent)  # (S, B, N * (K + V))
        of_heads = _in_heads(up, rest + arch.value_head_dim)
        keys, value = torch.split(of_heads, [rest, arch.value_head_dim], dim=-1)
        shared = self._on_every_rank(shared)[:, :, None].expand(-1, -1, keys.shape[2], -1)
        return query, torch.cat((shared, keys), dim=-1), value

    def _queries(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return `(S, B, N * (K + R))`."""
        if self.arch.q_lora_rank is None:
            query, _ = self.linear_q_proj(hidden)
            return query
        latent = self.linear_q_down_proj(hidden)
        if self.q_layernorm is not None:
            latent = self.q_layernorm(latent)
        query, _ = self.linear_q_up_proj(latent)
        return query

    def _on_every_rank(self, shared: torch.Tensor) -> torch.Tensor:
        """Gather the part of keys that all heads share; each rank adds to its gradient."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(shared, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(shared, group=self.tp_group)


def _in_heads(x: torch.Tensor, size: int) -> torch.Tensor:
    """Return `(S, B, N, size)` from `(S, B, N * size)`."""
    return x.view(*x.shape[:-1], -1, size)
