"""Build the model on megatron-core's GPTModel, for one pipeline stage and tensor-parallel rank.

There is one model stack. What a family needs beyond it is described by `Architecture` and supplied
at megatron-core's seams (`ml_models.modules`); nothing is copied or rewritten.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

import ml_kernels
from ml_models.architecture import Architecture
from ml_models.dropout import Dropout
from ml_models.modules import ColumnLinear, block_spec
from ml_models.weights import Parameter, global_name, local_name, stage_parameters
from ml_parallel.stages import pipeline_layout, stage_layers
from ml_parallel.topology import Topology


class GPT(GPTModel):  # type: ignore[misc]
    """megatron-core's GPTModel, whose loss ignores the padding of the vocabulary.

    The number of padding rows depends on the tensor-parallel size. Left in, they would take
    probability from the true tokens, and the loss would depend on the layout.
    """

    def __init__(self, true_vocab_size: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.true_vocab_size = true_vocab_size
        if self.post_process:
            # megatron-core builds this layer itself and asks no one for its class.
            self.output_layer.__class__ = ColumnLinear

    def compute_language_model_loss(
        self, labels: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        """Return the cross entropy of each token in nats.

        Args:
            labels: `(B, S)` int64.
            logits: `(S, B, V/tp)`; the padding columns are overwritten.

        Returns:
            `(B, S)` float32.
        """
        group = self.pg_collection.tp
        true_columns = self.true_vocab_size - group.rank() * logits.shape[-1]
        if true_columns < logits.shape[-1]:
            logits[..., max(0, true_columns) :] = float("-inf")
        target = labels.transpose(0, 1).contiguous()  # (S, B)
        loss = ml_kernels.cross_entropy(logits, target, group=group)
        return loss.transpose(0, 1).contiguous()


@dataclass(frozen=True)
class Chunk:
    """One model chunk of this rank: a module and the parameters it holds."""

    module: GPT
    layers: range
    """Global numbers of its layers."""
    parameters: dict[str, Parameter]
    """By the module's own (local) parameter names."""

    def global_name(self, name: str) -> str:
        """Turn a parameter name of the module into its name in the whole model."""
        return global_name(name, first_layer=self.layers.start if self.layers else 0)


def transformer_config(
    arch: Architecture,
    topology: Topology,
    *,
    params_dtype: torch.dtype = torch.float32,
    dropout: Dropout | None = None,
) -> TransformerConfig:
    """Translate our description into megatron-core's."""
    dropout = dropout or Dropout()
    chunks = len(stage_layers(arch.num_layers, topology)[0])
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.query_groups,
        ffn_hidden_size=arch.ffn_size,
        kv_channels=arch.head_dim,
        normalization=arch.normalization,
        layernorm_epsilon=arch.norm_epsilon,
        add_bias_linear=arch.add_bias_linear,
        add_qkv_bias=arch.add_qkv_bias,
        gated_linear_unit=arch.swiglu,
        activation_func=torch.nn.functional.silu if arch.swiglu else torch.nn.functional.gelu,
        use_te_activation_func=True,  # the activation is a module of ours
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=True,
        attention_dropout=dropout.attention_dropout,
        hidden_dropout=dropout.hidden_dropout,
        tensor_model_parallel_size=topology.tensor_model_parallel_size,
        pipeline_model_parallel_size=topology.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        pipeline_model_parallel_layout=pipeline_layout(arch.num_layers, topology),
        pipeline_dtype=params_dtype,
        sequence_parallel=topology.sequence_parallel,
        overlap_p2p_comm=topology.overlap_p2p_comm,
        batch_p2p_comm=not topology.overlap_p2p_comm,
        params_dtype=params_dtype,
        bf16=params_dtype == torch.bfloat16,
        fp16=params_dtype == torch.float16,
        perform_initialization=False,  # ml_models.initialize does it, for every layout alike
        gradient_accumulation_fusion=False,
        cuda_graph_scope=[],
        # Losses are summed over the tokens of the global batch and divided once, so that a
        # micro-batch with few unmasked tokens does not count more. DDP reads this when built.
        calculate_per_token_loss=True,
    )


def build_model(
    arch: Architecture,
    topology: Topology,
    config: TransformerConfig,
    *,
    padded_vocab_size: int,
    seq_length: int,
    parallel_output: bool = True,
) -> list[Chunk]:
    """Build the model chunks of this rank, with weights that are still undefined.

    megatron-core's process groups must exist. Call `initialize` or load a checkpoint afterwards.

    Args:
        arch: What to build.
        topology: How it is cut; the ranks must be in these groups.
        config: From `transformer_config`.
        padded_vocab_size: Rows of the embedding over all tensor-parallel ranks.
        seq_length: Longest sequence the model will see.
        parallel_output: Leave logits split over the tensor-parallel ranks (training).
    """
    stages = stage_layers(arch.num_layers, topology)
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    chunks = []
    for number, layers in enumerate(stages[pp_rank]):
        first = pp_rank == 0 and number == 0
        last = pp_rank == len(stages) - 1 and number == len(stages[0]) - 1
        module = GPT(
            true_vocab_size=arch.vocab_size,
            config=config,
            transformer_layer_spec=block_spec(
                len(layers),
                rms_norm=arch.normalization == "RMSNorm",
                swiglu=arch.swiglu,
                use_mc2=topology.use_mc2,
            ),
            vocab_size=padded_vocab_size,
            max_sequence_length=seq_length,
            pre_process=first,
            post_process=last,
            parallel_output=parallel_output,
            share_embeddings_and_output_weights=not arch.untie_embeddings_and_output_weights,
            position_embedding_type=arch.position_embedding_type,
            rotary_base=arch.rotary_base,
            vp_stage=number if len(stages[0]) > 1 else None,
        )
        table = _table(arch, layers, first, last)
        _mark_shards(module, table)
        chunks.append(Chunk(module, layers, table))
    return chunks


def _mark_shards(module: GPT, table: dict[str, Parameter]) -> None:
    """Tell megatron-core which parameters are cut: its own initialisation, which we skip, does.

    It counts the gradients of the others on one tensor-parallel rank only.
    """
    for name, tensor in module.named_parameters():
        split = table[name].split
        if split is not None and not hasattr(tensor, "partition_dim"):
            tensor_parallel.set_tensor_model_parallel_attributes(
                tensor, is_parallel=True, dim=split.dim, stride=split.blocks
            )


def _table(arch: Architecture, layers: range, first: bool, last: bool) -> dict[str, Parameter]:
    start = layers.start if layers else 0
    held = stage_parameters(arch, layers, first=first, last=last)
    return {local_name(p.name, first_layer=start): p for p in held}
