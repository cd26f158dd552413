"""Every preset is a run that ml-train accepts, of the published model, cut as ModelLink cuts it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from ml_models import flags, registry
from ml_models.flags import UsageError
from ml_models.weights import parameters
from ml_parallel.testing import run_ranks
from ml_parallel.topology import Topology
from ml_train.config import PretrainConfig, check_world

EXAMPLES = Path(__file__).parents[1] / "examples"
PRESETS = sorted(path for path in EXAMPLES.glob("*/*.yaml"))
FAMILIES = [registry.family(name) for name in registry.names()]
SIZES = {size.name: (family, size) for family in FAMILIES for size in family.sizes}
CHOSEN_FOR_TRAINING = ("init_method_std", "moe_aux_loss_coeff")
# Presets of a published size with another name, and what they change.
VARIANTS = {
    "chatglm3-6b-8k": ("chatglm3-6b", {}),
    "chatglm3-6b-64k": ("chatglm3-6b-32k", {"max_position_embeddings": 65536}),
    "llama3.1-8b-8k": ("llama3.1-8b", {}),
    "llama3.1-8b-128k": ("llama3.1-8b", {}),
    "grok1-40b": ("grok-1", {"num_layers": 8}),
}
# Rows of ModelLink's table, whose flags wait for context parallelism.
CONTEXT_PARALLEL = {"chatglm3-6b-32k", "chatglm3-6b-64k", "llama3.1-8b-128k", "mixtral-8x7b"}


def published(name):
    """Return the family, the model and the number of parameters behind a preset."""
    size, changes = VARIANTS.get(name, (name, {}))
    family, found = SIZES[size]
    arch = dataclasses.replace(family.size(found), **changes)
    if "num_layers" not in changes:
        return arch, found.parameters
    whole = family.size(found)
    layer = sum(math.prod(p.shape) for p in parameters(whole) if p.layer == 0)
    return arch, found.parameters - (whole.num_layers - arch.num_layers) * layer


def read(path, *more):
    words = ["--config", str(path), "--data-path", "corpus", "--master-addr", "node0", *more]
    return flags.parse(PretrainConfig, words, prog="ml-train pretrain")


def test_every_row_of_the_table_has_a_preset():
    assert len(PRESETS) == 47


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_a_run_of_the_published_model(path):
    more = ("--context-parallel-size", "1") if path.stem in CONTEXT_PARALLEL else ()
    config = read(path, *more)
    launch, training = config.launch, config.training
    check_world(config, launch.nnodes * launch.nproc_per_node)
    assert training.seq_length <= config.model.max_position_embeddings
    arch, count = published(path.stem)
    unchanged = {name: getattr(arch, name) for name in CHOSEN_FOR_TRAINING}
    assert dataclasses.replace(config.model, **unchanged) == arch
    assert sum(math.prod(p.shape) for p in parameters(config.model)) == count
    if more:
        with pytest.raises(UsageError, match="--context-parallel-size"):
            read(path)


def count_on_meta():
    """Build every preset without memory; return the number of parameters by name."""
    from ml_models.gpt import build_model, transformer_config
    from ml_parallel.groups import initialize_groups

    topology = Topology()
    initialize_groups(topology, num_chunks=1)
    counts = {}
    for path in PRESETS:
        arch, _ = published(path.stem)
        with torch.device("meta"):
            chunks = build_model(
                arch,
                topology,
                transformer_config(arch, topology),
                padded_vocab_size=arch.vocab_size,
                seq_length=arch.max_position_embeddings,
            )
        tensors = [tensor for chunk in chunks for _, tensor in chunk.tensors()]
        assert all(tensor.is_meta for tensor in tensors)
        counts[path.stem] = sum(tensor.numel() for tensor in tensors)
    return counts


@pytest.mark.slow
def test_the_model_that_is_built_has_as_many_parameters_as_was_published():
    (counts,) = run_ranks(count_on_meta, 1, timeout=300)
    assert counts == {path.stem: published(path.stem)[1] for path in PRESETS}
