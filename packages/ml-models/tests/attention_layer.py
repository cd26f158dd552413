"""One attention layer for tests: built as in a model, with weights that every layout shares."""

from __future__ import annotations

import zlib

import torch

from ml_models.architecture import Architecture
from ml_models.layer_weights import layer_parameters
from ml_models.weights import local_name, shard_runs
from ml_parallel.topology import Topology

LENGTH, BATCH = 40, 2
SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 64,
    "max_position_embeddings": 64,
    "vocab_size": 10,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
}

GROUPED = {"num_query_groups": 2}
CASES = {
    "plain": ({}, 0),
    "grouped": (GROUPED | {"add_qkv_bias": True}, 0),
    "all biases": ({"add_bias_linear": True}, 0),
    "bias of the output only": ({"add_dense_bias": True}, 0),
    "wide heads": (GROUPED | {"kv_channels": 12}, 0),
    "scale": ({"softmax_scale": 0.7}, 0),
    "query and key norms": (GROUPED | {"qk_layernorm": True}, 0),
    "norms by 1 + weight": ({"qk_layernorm": True, "add_rmsnorm_offset": True}, 0),
    "layer norms": ({"qk_layernorm": True, "normalization": "LayerNorm"}, 0),
    "neighbours, half of them": ({"rotary_interleaved": True, "rotary_percent": 0.5}, 0),
    "no positions": ({"position_embedding_type": "none"}, 0),
    "layer without positions": ({"num_layers": 2, "no_rope_freq": (2,)}, 1),
    "layer with positions": ({"num_layers": 2, "no_rope_freq": (2,)}, 0),
    "alibi": ({"position_embedding_type": "alibi"}, 0),
    "window": (GROUPED | {"sliding_window": 7}, 0),
    "layer without a window": (
        {"num_layers": 2, "sliding_window": 7, "window_attn_skip_freq": (1, 0)},
        1,
    ),
    "base of windows": (
        {"num_layers": 2, "sliding_window": 7, "rotary_base_local": 50.0}
        | {"window_attn_skip_freq": (2,)},
        0,
    ),
    "sinks": (GROUPED | {"softmax_type": "learnable", "sliding_window": 7}, 0),
    "soft-capped": (GROUPED | {"attn_logit_softcapping": 0.8, "sliding_window": 7}, 0),
    "soft-capped without a window": ({"attn_logit_softcapping": 0.8, "softmax_scale": 0.4}, 0),
}
"""Fields of an architecture, and the layer to look at."""
LATENT = {
    "multi_latent_attention": True,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_head_dim": 6,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 5,
    "qk_layernorm": True,
    "norm_epsilon": 1e-6,
}
YARN = {
    "rope_scaling_type": "yarn",
    "rope_scaling_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_scaling_mscale": 0.7,
    "rope_scaling_mscale_all_dim": 1.3,
}


def architecture(**fields) -> Architecture:
    return Architecture(**{"num_layers": 1, **SIZES, **fields})


def weights(arch: Architecture, layer: int) -> dict[str, torch.Tensor]:
    """Random values of the whole layer's parameters by their local name, float32."""
    found = {}
    for parameter in layer_parameters(arch, layer):
        name = local_name(parameter.name, first_layer=layer).partition("self_attention.")[2]
        if name:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            values = torch.randn(parameter.shape, generator=generator)
            found[name] = values * 0.5 + 1 if "layernorm" in name else values * 0.3
    return found


def shard(arch: Architecture, layer: int, name: str, whole: torch.Tensor, rank: int, size: int):
    """Cut a parameter as the table of weights says."""
    full = f"decoder.layers.{layer}.self_attention.{name}"
    (parameter,) = (p for p in layer_parameters(arch, layer) if p.name == full)
    if parameter.split is None:
        return whole
    _, runs = shard_runs(parameter, tp_size=size, tp_rank=rank, padded_vocab_size=0)
    parts = [whole.narrow(parameter.split.dim, run.global_start, run.length) for run in runs]
    return torch.cat(parts, parameter.split.dim)


def build(arch: Architecture, layer: int = 0, topology: Topology | None = None):
    """Build the layer with the weights of this tensor-parallel rank; process groups must exist."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import build_module

    from ml_kernels.modules import SwiGLU
    from ml_models.attention import self_attention_spec
    from ml_models.modules import KernelsSpecProvider

    topology = topology or Topology()
    groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp", "pp"])
    module = build_module(
        self_attention_spec(arch, KernelsSpecProvider(SwiGLU, use_mc2=topology.use_mc2)),
        config=transformer_config(arch, topology),
        layer_number=layer + 1,
        pg_collection=groups,
    )
    whole = weights(arch, layer)
    assert {name for name, _ in module.named_parameters()} == set(whole)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            part = shard(arch, layer, name, whole[name], groups.tp.rank(), groups.tp.size())
            tensor.copy_(part)
    return module


def transformer_config(arch: Architecture, topology: Topology):
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.query_groups,
        kv_channels=arch.head_dim,
        normalization=arch.normalization,
        layernorm_epsilon=arch.norm_epsilon,
        layernorm_zero_centered_gamma=arch.add_rmsnorm_offset,
        add_bias_linear=arch.add_bias_linear,
        add_qkv_bias=arch.add_qkv_bias,
        qk_layernorm=arch.qk_layernorm and not arch.multi_latent_attention,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=topology.tensor_model_parallel_size,
        sequence_parallel=topology.sequence_parallel,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        cuda_graph_scope=[],
    )


def hidden_states(arch: Architecture) -> torch.Tensor:
    """`(S, B, H)`."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(LENGTH, BATCH, arch.hidden_size, generator=generator)


def upstream(hidden: torch.Tensor) -> torch.Tensor:
    """The gradient of the output, `(S, B, H)`."""
    generator = torch.Generator().manual_seed(8)
    return torch.randn(hidden.shape, generator=generator).to(hidden.dtype)


def run(module: torch.nn.Module, hidden: torch.Tensor, cache=None) -> torch.Tensor:
    """Return `(S, B, H)`, the bias added."""
    output, bias = module(hidden, None, inference_context=cache)
    return output if bias is None else output + bias


def outputs_and_gradients(arch: Architecture, layer: int, topology: Topology):
    """Return this rank's output, and its gradients of the input and of the parameters by name."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import (
        _allreduce_non_tensor_model_parallel_grads,
    )

    group = parallel_state.get_tensor_model_parallel_group()
    module = build(arch, layer, topology)
    hidden = hidden_states(arch)
    gradient = upstream(hidden)
    if topology.sequence_parallel:
        hidden, gradient = (x.chunk(group.size())[group.rank()].clone() for x in (hidden, gradient))
    hidden.requires_grad_()
    output = run(module, hidden)
    (output * gradient).sum().backward()
    module.ddp_config = DistributedDataParallelConfig()
    _allreduce_non_tensor_model_parallel_grads([module], module.config, group)
    gradients = {name: p.grad.numpy() for name, p in module.named_parameters()}
    return output.detach().numpy(), hidden.grad.numpy(), gradients


def in_pieces_and_at_once(arch: Architecture, layer: int):
    """Return `(S, B, H)` computed with a cache, piece by piece, and without, at once."""
    from megatron.core.inference.contexts import StaticInferenceContext

    module, hidden = build(arch, layer).eval(), hidden_states(arch)
    cache, pieces = StaticInferenceContext(BATCH, LENGTH), []
    with torch.inference_mode():
        for piece in hidden.split((9, 5, *[1] * 20, LENGTH - 34)):
            pieces.append(run(module, piece, cache))
            cache.increment_sequence_len_offset(len(piece))
        whole = run(module, hidden)
    _check_that_it_can_be_trained(module)
    return torch.cat(pieces).numpy(), whole.numpy()


def _check_that_it_can_be_trained(module: torch.nn.Module) -> None:
    """What is kept from one call to the next must be good for the next one's gradients."""
    kept = [table.angles for table in module.rotary._tables.values()]
    slopes = module.core_attention._slopes
    kept += [] if slopes is None else [slopes]
    assert kept
    assert not any(tensor.is_inference() for tensor in kept)


def assert_close(found, wanted: torch.Tensor, what: str, tolerance: float) -> None:
    """Compare to a share of the largest number."""
    found = torch.as_tensor(found).to(wanted.dtype)
    assert found.shape == wanted.shape, what
    worst = (found - wanted).abs().max() / wanted.abs().max()
    assert worst < tolerance, f"{what}: {worst:.1e} of the largest"


def assert_ranks_are_one(ranks, whole, arch, layer, *, is_cut: bool, tolerance: float) -> None:
    """Compare what ranks return with the outputs and gradients of the whole.

    Args:
        ranks: What `outputs_and_gradients` returns on each rank.
        whole: The same of one process, as tensors.
        arch: The model.
        layer: Number of the layer.
        is_cut: Each rank has a part of the sequence.
        tolerance: Share of the largest number.
    """
    for number, wanted in enumerate(whole[:2]):
        parts = [torch.from_numpy(rank[number]) for rank in ranks]
        for found in [torch.cat(parts)] if is_cut else parts:
            assert_close(found, wanted, ("output", "gradient of the input")[number], tolerance)
    for rank, (*_, gradients) in enumerate(ranks):
        assert set(gradients) == set(whole[2])
        for name, gradient in gradients.items():
            part = shard(arch, layer, name, whole[2][name], rank, len(ranks))
            assert_close(gradient, part, name, tolerance)
