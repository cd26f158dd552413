"""Sequences that share a row give what they give alone: every attention, and whole models."""

from __future__ import annotations

import functools

import pytest
import torch
from attention_layer import CASES, LATENT, YARN, architecture, assert_close, build

from ml_models.packing import packed_sequences
from ml_parallel.testing import run_ranks
from ml_parallel.topology import Topology

LENGTHS = (9, 1, 17, 13)
STRETCHED = {"rope_scaling_type": "dynamic", "rope_scaling_factor": 2.0}
LAYERS = {
    **CASES,
    "latent": ({**LATENT, **YARN}, 0),
    "table of the longest": ({**STRETCHED, "original_max_position_embeddings": 64}, 0),
}
MODELS = {
    name: architecture(num_layers=2, swiglu=True, **fields)
    for name, fields in {
        "rotary": {"num_query_groups": 2},
        "experts": {"num_experts": 4, "moe_ffn_hidden_size": 24},
        "learned": {"position_embedding_type": "learned_absolute"},
        "alibi": {"position_embedding_type": "alibi"},
    }.items()
}
TP2 = Topology(tensor_model_parallel_size=2, sequence_parallel=True)


def test_a_row_is_described_by_ends_and_positions():
    packed = packed_sequences((3, 1, 2), "cpu")
    assert packed.ends == (0, 3, 4, 6)
    assert packed.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert packed.longest == 3
    assert packed.pairs == 9 + 1 + 4


def of_a_layer(arch, layer, hidden, packed):
    """Return the output, and the gradients of the input and of the parameters."""
    module = build(arch, layer)
    hidden = hidden.clone().requires_grad_()
    if packed:
        sequences = packed_sequences(LENGTHS, "cpu")
        output, bias = module(hidden, None, packed_seq_params=sequences)
        output = output if bias is None else output + bias
    else:
        pairs = (module(part, None) for part in hidden.split(LENGTHS))
        output = torch.cat([part if bias is None else part + bias for part, bias in pairs])
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(6))
    (output * upstream).sum().backward()
    found = {name: p.grad for name, p in module.named_parameters()}
    return {"output": output.detach(), "input": hidden.grad, **found}


def both_of_a_layer(arch, layer):
    """Return what `of_a_layer` does, packed and alone."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(sum(LENGTHS), 1, arch.hidden_size, generator=generator)
    both = (of_a_layer(arch, layer, hidden, packed) for packed in (True, False))
    return [{name: tensor.numpy() for name, tensor in one.items()} for one in both]


def of_layers(cases):
    from ml_parallel.groups import initialize_groups

    initialize_groups(Topology())
    return {
        name: both_of_a_layer(architecture(**fields), layer)
        for name, (fields, layer) in cases.items()
    }


def test_every_attention_gives_each_sequence_what_it_gives_it_alone():
    (found,) = run_ranks(of_layers, 1, LAYERS)
    assert set(found) == set(LAYERS)
    for case, (packed, alone) in found.items():
        assert set(packed) == set(alone)
        for name, wanted in alone.items():
            assert_close(packed[name], torch.from_numpy(wanted), f"{case}: {name}", 1e-5)


def test_a_sequence_that_sees_the_one_before_is_another(monkeypatch):
    """What the test above would not miss."""
    as_one = functools.partial(packed_sequences, (sum(LENGTHS),))
    monkeypatch.setattr(f"{__name__}.packed_sequences", lambda _, device: as_one(device))
    (found,) = run_ranks(of_layers, 1, {"plain": ({}, 0)})
    packed, alone = found["plain"]
    assert abs(packed["output"] - alone["output"]).max() > 1e-2


def build_model(arch, topology):
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from ml_models import gpt
    from ml_models.initialize import initialize
    from ml_parallel.groups import initialize_groups

    place = initialize_groups(topology)
    model_parallel_cuda_manual_seed(1)  # megatron-core wants one with sequence parallelism
    rows = {"padded_vocab_size": 12}
    config = gpt.transformer_config(arch, topology)
    chunks = gpt.build_model(arch, topology, config, seq_length=64, **rows)
    initialize(chunks, arch, seed=3, tp_rank=place.tp_rank, tp_size=place.tp_size, **rows)
    return chunks[0].module.eval()


def of_a_model(arch, topology, packed):
    """Return the losses of every token, and the gradients."""
    model = build_model(arch, topology)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, arch.vocab_size, (1, sum(LENGTHS)), generator=generator)
    labels = tokens.roll(-1)
    if packed:
        sequences = packed_sequences(LENGTHS, "cpu")
        positions = sequences.positions[None]
        losses = model(tokens, positions, None, labels=labels, packed_seq_params=sequences)
    else:
        parts = zip(tokens.split(LENGTHS, 1), labels.split(LENGTHS, 1), strict=True)
        alone = [
            model(part, torch.arange(part.shape[1])[None], None, labels=wanted)
            for part, wanted in parts
        ]
        losses = torch.cat(alone, 1)
    (losses * torch.linspace(0, 1, losses.shape[1])).sum().backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return {"losses": losses.detach().numpy(), **gradients}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_each_sequence_the_loss_it_has_alone(name):
    arch = MODELS[name]
    (alone,) = run_ranks(of_a_model, 1, arch, Topology(), False)
    (packed,) = run_ranks(of_a_model, 1, arch, Topology(), True)
    for part, wanted in alone.items():
        assert_close(packed[part], torch.from_numpy(wanted), part, 1e-5)


def test_ranks_that_have_each_a_part_of_the_row_give_the_same_losses():
    arch = MODELS["rotary"]
    (alone,) = run_ranks(of_a_model, 1, arch, Topology(), False)
    for rank in run_ranks(of_a_model, 2, arch, TP2, True):
        assert_close(rank["losses"], torch.from_numpy(alone["losses"]), "losses", 1e-5)
