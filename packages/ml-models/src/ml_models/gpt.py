"""Build the model on megatron-core's GPTModel, for one rank of any parallel layout.

There is one model stack. What a family needs beyond it is described by `Architecture` and supplied
at megatron-core's seams (`layer`, `attention`, `experts`, `embedding`, `output`); nothing is copied
or rewritten.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

import ml_kernels
from ml_models.architecture import Architecture
from ml_models.dropout import Dropout
from ml_models.embedding import refine_embedding
from ml_models.layer import block_spec
from ml_models.output import refine_output
from ml_models.router import Router
from ml_models.weights import (
    Parameter,
    expert_range,
    global_name,
    local_name,
    stage_parameters,
)
from ml_parallel.stages import pipeline_layout, stage_layers
from ml_parallel.topology import Topology


class GPT(GPTModel):  # type: ignore[misc]
    """megatron-core's GPTModel with what a family adds around its layers.

    Its loss ignores the padding of the vocabulary: the number of padding rows depends on the
    tensor-parallel size. Left in, they would take probability from the true tokens, and the loss
    would depend on the layout.
    """

    def __init__(self, arch: Architecture, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.true_vocab_size = arch.vocab_size
        if self.pre_process:
            refine_embedding(self, arch)
        if self.post_process:
            refine_output(self, arch)
        self._routers = tuple(module for module in self.modules() if isinstance(module, Router))
        # megatron-core leaves a few small tensors where torch makes them by default.
        self.cuda(torch.cuda.current_device())

    def forward(
        self, *given: Any, loss_mask: torch.Tensor | None = None, **options: Any
    ) -> torch.Tensor:
        """Return losses or logits; megatron-core's arguments.

        Args:
            given: As megatron-core has it.
            loss_mask: `(B, S)`, what each token's loss is multiplied by before they are summed and
                divided by its sum; the losses of routers then weigh the same. None = 1.
            options: As megatron-core has it.
        """
        for router in self._routers:
            router.counted = 1.0 if loss_mask is None else loss_mask.mean()
        found: torch.Tensor = super().forward(*given, loss_mask=loss_mask, **options)
        return found

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
    """One model chunk of this rank: a module and the tensors it holds."""

    module: GPT
    layers: range
    """Global numbers of its layers."""
    experts: range
    """Global numbers of the experts of this rank; empty if the model has none."""
    parameters: dict[str, Parameter]
    """By the module's own (local) names."""

    def global_name(self, name: str) -> str:
        """Turn a name of the module into the name in the whole model."""
        return global_name(name, first_layer=_start(self.layers), first_expert=_start(self.experts))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what belongs into a checkpoint, by local name: parameters, then buffers.

        The only buffer is the bias by which a router chooses: it is learned without a gradient.
        """
        yield from self.module.named_parameters()
        for name, buffer in self.module.named_buffers():
            if name in self.parameters:
                yield name, buffer


def _start(numbers: range) -> int:
    return numbers.start if numbers else 0


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
        # Each rank sums the gradients of its own heads; those of latent vectors are whole.
        qk_layernorm=arch.qk_layernorm and not arch.multi_latent_attention,
        layernorm_zero_centered_gamma=arch.add_rmsnorm_offset,
        gated_linear_unit=arch.is_gated,
        use_te_activation_func=True,  # the activation is a module of ours
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        attention_dropout=dropout.attention_dropout,
        hidden_dropout=dropout.hidden_dropout,
        tensor_model_parallel_size=topology.tensor_model_parallel_size,
        pipeline_model_parallel_size=topology.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        pipeline_model_parallel_layout=pipeline_layout(arch.num_layers, topology),
        expert_model_parallel_size=topology.expert_model_parallel_size,
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
        **_experts_config(arch),
    )


def _experts_config(arch: Architecture) -> dict[str, Any]:
    """Translate what megatron-core has to know of experts; the choice is `ml_models.router`'s."""
    if arch.num_experts is None:
        return {}
    return {
        "num_moe_experts": arch.num_experts,
        "moe_ffn_hidden_size": arch.expert_size,
        "moe_shared_expert_intermediate_size": arch.shared_expert_size or None,
        "moe_shared_expert_gate": arch.moe_shared_expert_gate,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_topk": arch.moe_router_topk,
        "moe_router_score_function": arch.moe_router_score_function,
        "moe_router_pre_softmax": True,  # else it refuses to choose a single expert
        "moe_router_enable_expert_bias": arch.moe_router_enable_expert_bias,
        "moe_router_bias_update_rate": arch.moe_router_bias_update_rate,
        "moe_router_load_balancing_type": arch.moe_router_load_balancing_type,
        "moe_aux_loss_coeff": arch.moe_aux_loss_coeff,
        "moe_z_loss_coeff": arch.moe_z_loss_coeff or None,
        "moe_router_dtype": "fp32",
        # Experts are cut like other layers, which the process groups decide. Here it would only
        # refuse biases, whose sum over ranks `ml_models.experts` makes right.
        "expert_tensor_parallel_size": 1,
    }


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
    experts = expert_range(
        arch,
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=topology.expert_model_parallel_size,
    )
    learned = arch.position_embedding_type == "learned_absolute"
    chunks = []
    for number, layers in enumerate(stages[pp_rank]):
        first = pp_rank == 0 and number == 0
        last = pp_rank == len(stages) - 1 and number == len(stages[0]) - 1
        module = GPT(
            arch,
            config=config,
            transformer_layer_spec=block_spec(arch, layers, use_mc2=topology.use_mc2),
            vocab_size=padded_vocab_size,
            max_sequence_length=arch.max_position_embeddings if learned else seq_length,
            pre_process=first,
            post_process=last,
            parallel_output=parallel_output,
            share_embeddings_and_output_weights=not arch.untie_embeddings_and_output_weights,
            position_embedding_type="learned_absolute" if learned else "none",
            vp_stage=number if len(stages[0]) > 1 else None,
        )
        held = stage_parameters(arch, layers, first=first, last=last, experts=experts)
        start = {"first_layer": _start(layers), "first_expert": _start(experts)}
        table = {local_name(p.name, **start): p for p in held}
        _mark_shards(module, table)
        chunks.append(Chunk(module, layers, experts, table))
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
