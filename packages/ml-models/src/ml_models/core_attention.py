"""What queries do with keys and values in one layer: scores, softmax, weighted sum.

Shapes: `S` sequence, `B` batch, `N` heads and `G` groups of this rank, `D` head size; `T` tokens of
sequences that share a row.
"""

from __future__ import annotations

import contextlib
import math
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    get_cuda_rng_tracker,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)

import ml_kernels
from ml_kernels.frequencies import yarn_mscale
from ml_models.architecture import Architecture
from ml_models.packing import PackedSequences
from ml_models.softcap import soft_capped_attention


class CoreAttention(MegatronModule):  # type: ignore[misc]
    """Causal attention of the query, key and value heads of this rank in one layer."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        arch: Architecture,
        pg_collection: ProcessGroupCollection,
        **_unused: Any,
    ) -> None:
        """Create it.

        Args:
            config: Gives the dropout, and dtype and place of parameters.
            layer_number: Number of the layer in the whole model, from 1, as megatron-core counts.
            arch: The model.
            pg_collection: Process groups.
        """
        super().__init__(config=config)
        self.dropout = config.attention_dropout
        self.scale = softmax_scale(arch)
        self.window = arch.windows[layer_number - 1]
        self.cap = arch.attn_logit_softcapping
        self.tp_group = pg_collection.tp
        rank, size = pg_collection.tp.rank(), pg_collection.tp.size()
        share = arch.num_attention_heads // size
        self._all_heads = arch.num_attention_heads
        self._heads = slice(rank * share, (rank + 1) * share)
        self._has_alibi = arch.position_embedding_type == "alibi"
        self._slopes: torch.Tensor | None = None
        self.softmax_offset: torch.nn.Parameter | None = None
        if arch.softmax_type == "learnable":
            self.softmax_offset = _one_per_head(share, config)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        _attention_mask: torch.Tensor | None = None,
        *,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
        **_unused: Any,
    ) -> torch.Tensor:
        """Return `(S, B, N * D)` from query `(S, B, N, D)`, key and value `(S, B, G, D)`.

        With `packed_seq_params`, `(T, N * D)` from `(T, N, D)` and `(T, G, D)`.

        Raises:
            ValueError: megatron-core asks for what is not computed here.
        """
        if attention_bias is not None:
            raise ValueError("attention here is causal: no attention_bias")
        dropout = self.dropout if self.training else 0.0
        ends = None if packed_seq_params is None else packed_seq_params.ends
        if self.cap is not None:
            attend = partial(soft_capped_attention, cap=self.cap, ends=ends)
        else:
            attend = partial(
                ml_kernels.flash_attention,
                layout="SBND" if ends is None else "TND",
                cu_seqlens_q=ends,
                cu_seqlens_k=ends,
                causal=True,
                alibi_slopes=self._slopes_on(query.device),
                sinks=None if self.softmax_offset is None else self.softmax_offset.float(),
            )
        # Heads differ between tensor-parallel ranks, so their dropout must too.
        fork = get_cuda_rng_tracker().fork() if dropout else contextlib.nullcontext()
        with fork:
            context = attend(
                query, key, value, scale=self.scale, window=self.window, dropout_p=dropout
            )
        return context.flatten(-2)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Tell megatron-core's distributed checkpoints that the sinks are cut by heads."""
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
        return sharded

    def _slopes_on(self, device: torch.device) -> torch.Tensor | None:
        """Return the slopes of ALiBi of this rank's heads, None without it.

        They are no buffer: one would become bfloat16 with the model.
        """
        if self._has_alibi and (self._slopes is None or self._slopes.device != device):
            # Slopes made for inference could not be used for training afterwards.
            with torch.inference_mode(False):
                slopes = ml_kernels.alibi_slopes(self._all_heads)[self._heads]
                self._slopes = slopes.to(device)
        return self._slopes


def softmax_scale(arch: Architecture) -> float | None:
    """Return what multiplies the scores; None means 1 / sqrt(channels of a query's head).

    With latent attention yarn's scale belongs here (DeepSeek-V2, arXiv:2405.04434).
    """
    stretched = arch.multi_latent_attention and arch.rope_scaling_type == "yarn"
    if arch.softmax_scale is not None or not stretched:
        return arch.softmax_scale
    mscale = yarn_mscale(arch.rope_scaling_factor, arch.rope_scaling_mscale_all_dim)
    return mscale * mscale / math.sqrt(arch.query_head_dim)


def _one_per_head(heads: int, config: TransformerConfig) -> torch.nn.Parameter:
    device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
    zeros = torch.zeros(heads, dtype=config.params_dtype, device=device)
    parameter = torch.nn.Parameter(zeros)
    set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
    return parameter
