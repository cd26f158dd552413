"""Checkpoints of megatron-core's torch_dist format: what ml-convert writes, megatron-core reads,
and what megatron-core and torch.distributed.checkpoint write, ml-convert reads."""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from pathlib import Path

import pytest
import torch

from ml_convert.cli import main as ml_convert
from ml_models.architecture import Architecture
from ml_models.weights import parameters
from ml_parallel.testing import run_ranks
from ml_parallel.topology import Topology

DENSE = Architecture(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=48,
    vocab_size=99,
    max_position_embeddings=64,
    normalization="RMSNorm",
    swiglu=True,
    add_bias_linear=False,
    add_qkv_bias=True,
    position_embedding_type="rope",
    untie_embeddings_and_output_weights=True,
)
EXPERTS = dataclasses.replace(
    DENSE,
    add_qkv_bias=False,
    untie_embeddings_and_output_weights=False,
    num_experts=4,
    moe_ffn_hidden_size=24,
)
MODELS = {
    "dense": DENSE,
    "experts": EXPERTS,
    "some layers with experts": dataclasses.replace(EXPERTS, first_k_dense_replace=1),
    "latent attention": dataclasses.replace(
        DENSE,
        add_qkv_bias=False,
        num_query_groups=4,
        qk_layernorm=True,
        multi_latent_attention=True,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_head_dim=8,
        qk_pos_emb_head_dim=4,
        v_head_dim=8,
    ),
}
ONE = Topology()
TP2 = Topology(tensor_model_parallel_size=2, sequence_parallel=True)
PP2 = Topology(pipeline_model_parallel_size=2)
EP2 = Topology(expert_model_parallel_size=2)
CASES = [("dense", ONE), ("dense", TP2), ("dense", PP2), ("experts", TP2), ("experts", EP2)]
CASES += [("some layers with experts", PP2), ("latent attention", TP2)]
PADDED = 128  # also what a vocabulary of 99 becomes for one rank


def write_model(arch, root):
    """Write a model of random numbers as a checkpoint of one rank; returns its tensors."""
    numbers, tensors = torch.Generator().manual_seed(0), {}
    for parameter in parameters(arch):
        shape = (PADDED, *parameter.shape[1:]) if parameter.padded else parameter.shape
        tensors[parameter.name] = torch.randn(shape, generator=numbers)
        tensors[parameter.name][parameter.shape[0] :] = 0
    (root / "iter_0000005" / "mp_rank_00").mkdir(parents=True)
    args = argparse.Namespace(**dataclasses.asdict(arch), iteration=5)
    content = {"args": args, "checkpoint_version": 3.0, "iteration": 5, "model": tensors}
    torch.save(content, root / "iter_0000005" / "mp_rank_00" / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("5")
    return tensors


def convert(source, target, save_format, topology=ONE, *extra):
    arguments = ["--load-dir", str(source), "--save-dir", str(target), *extra]
    sizes = {
        "tensor": topology.tensor_model_parallel_size,
        "pipeline": topology.pipeline_model_parallel_size,
        "expert": topology.expert_model_parallel_size,
    }
    for kind, size in sizes.items():
        arguments += [f"--target-{kind}-parallel-size", str(size)]
    assert ml_convert([*arguments, "--save-format", save_format]) == 0
    return target / "release"


@pytest.mark.parametrize(("name", "topology"), CASES)
def test_megatron_core_loads_strictly_what_is_written_and_what_it_saves_is_read(
    name, topology, tmp_path
):
    arch = MODELS[name]
    tensors = write_model(arch, tmp_path / "model")
    written = convert(tmp_path / "model", tmp_path / "torch_dist", "torch_dist")
    expected = convert(tmp_path / "model", tmp_path / "mcore", "mcore", topology)
    padded, world = PADDED * topology.tensor_model_parallel_size, world_size(topology)
    saved = tmp_path / "saved"
    saved.mkdir()
    differing = run_ranks(load_and_save, world, arch, topology, padded, written, expected, saved)
    assert differing == [[]] * world
    back = convert(saved, tmp_path / "back", "mcore", ONE, "--load-format", "torch_dist")
    found = torch.load(back / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)["model"]
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def world_size(topology):
    return (
        topology.tensor_model_parallel_size
        * topology.pipeline_model_parallel_size
        * topology.expert_model_parallel_size
    )


# On a rank


def built(arch, topology, padded):
    """Build this rank's part of the model; returns it, and its tensors by name."""
    from ml_models.gpt import build_model, transformer_config
    from ml_parallel.groups import initialize_groups

    warnings.simplefilter("ignore", FutureWarning)  # of torch's own parts, among each other
    initialize_groups(topology)
    config = transformer_config(arch, topology)
    (chunk,) = build_model(arch, topology, config, padded_vocab_size=padded, seq_length=32)
    return chunk.module, dict(chunk.tensors())


def rank_state(directory):
    """Read what ml-convert wrote for this rank."""
    from megatron.core import parallel_state

    from ml_parallel.checkpoint import rank_directory

    rank = rank_directory(
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=parallel_state.get_expert_model_parallel_world_size(),
    )
    return torch.load(directory / rank / "model_optim_rng.pt", weights_only=False)["model"]


def load_and_save(arch, topology, padded, written, expected, target):
    """Load strictly, and save; returns the names of tensors that differ from this rank's file."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling
    from megatron.core.safe_globals import register_safe_globals

    register_safe_globals()  # a context of torch's takes back at its end what others had allowed
    module, tensors = built(arch, topology, padded)
    for tensor in tensors.values():
        tensor.data.fill_(float("nan"))
    metadata = dist_checkpointing.load_content_metadata(str(written))
    state = module.sharded_state_dict(metadata=dict(metadata))
    # Upstream's down projections have extra state, which is therefore written; ours have none.
    latent = arch.multi_latent_attention
    strict = StrictHandling.RAISE_UNEXPECTED if latent else StrictHandling.RAISE_ALL
    loaded = dist_checkpointing.load(state, str(written), strict=strict)
    theirs = rank_state(expected)
    assert {name for name in loaded if name in tensors} == theirs.keys()
    for name, tensor in theirs.items():
        tensors[name].data.copy_(tensor)
    save(module.sharded_state_dict(metadata=dict(metadata)), arch, target)
    return [name for name, tensor in theirs.items() if not torch.equal(loaded[name], tensor)]


def save(sharded, arch, target):
    """Save as megatron-core does, but in this process, and without CUDA."""
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
    from megatron.core.dist_checkpointing.strategies import torch as strategy
    from torch.distributed import checkpoint

    preprocessed, _ = save_preprocess(sharded, True, None)
    state, _, _ = strategy._replace_state_dict_keys_with_sharded_keys(preprocessed, True)
    checkpoint.save(
        strategy.mcore_to_pyt_state_dict(state, False),
        storage_writer=checkpoint.FileSystemWriter(str(target)),
        planner=strategy.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
    )
    if torch.distributed.get_rank() == 0:
        save_config(CheckpointingConfig("torch_dist", 1), str(target))
        args = argparse.Namespace(**dataclasses.asdict(arch), backend=Path("a path"))
        torch.save({"args": args, "iteration": 5}, target / "common.pt")
