"""Weights of a Hugging Face Llama, converted, compute on megatron-core what transformers does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy
import pytest
import torch
from harness import pretrain_config

from ml_convert.cli import main as ml_convert
from ml_models.registry import family_for
from ml_parallel.testing import run_ranks
from ml_parallel.topology import Topology
from ml_train.config import check_world

BATCH, SEQUENCE = 4, 48
TOKENS = torch.randint(
    0, 301, (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(4)
)  # the last one is a label only
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
TOPOLOGIES = {
    "single": Topology(),
    "tp2": Topology(**TP2),
    "tp2 sp": Topology(**TP2, sequence_parallel=True),
    # More ranks than the model's two groups of keys and values.
    "tp4": Topology(tensor_model_parallel_size=4),
    "tp4 sp": Topology(tensor_model_parallel_size=4, sequence_parallel=True),
    "pp2": Topology(**PP2),
    "pp2 vpp": Topology(**PP2, num_layers_per_virtual_pipeline_stage=1),
    "tp2 pp2 vpp sp": Topology(
        **TP2, **PP2, num_layers_per_virtual_pipeline_stage=1, sequence_parallel=True
    ),
}


class Reference(NamedTuple):
    """A tiny random Llama, and what transformers computes with it for TOKENS."""

    path: Path
    gradients: Path
    """A directory like a model's, whose weights are the gradients of the loss."""
    logits: torch.Tensor
    """`(BATCH, SEQUENCE, V)`."""
    loss: float


@pytest.fixture(scope="module", params=["untied", "tied"])
def llama(request, tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=301,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=request.param == "tied",
        rope_theta=50000.0 if request.param == "tied" else 10000.0,
        rms_norm_eps=1e-6,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name:
                tensor.add_(torch.randn_like(tensor) * 0.2)
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder / "weights")
    result = model(TOKENS, labels=TOKENS)
    result.loss.backward()
    logits = result.logits.detach()[:, :-1].clone()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(tensor.grad)
    model.save_pretrained(folder / "gradients")
    return Reference(folder / "weights", folder / "gradients", logits, float(result.loss.detach()))


def convert(source, target, topology):
    """Convert to Megatron-Core, for another layout than the one that reads it."""
    arguments = ["--load-dir", str(source), "--save-dir", str(target), "--save-format", "mcore"]
    sizes = {
        "tensor": topology.pipeline_model_parallel_size,
        "pipeline": min(2, topology.tensor_model_parallel_size),
    }
    for kind, size in sizes.items():
        arguments += [f"--target-{kind}-parallel-size", str(size)]
    assert ml_convert(arguments) == 0


def logits_loss_and_gradients(weights, gradients, config):
    """Return on each rank its logits, if it has any, the loss, and both sides' gradients."""
    from ml_parallel import checkpoint
    from ml_train.build import build
    from ml_train.restore import restore
    from ml_train.step import _reduce, _run_schedule, mean_loss

    built = build(config)
    # A gradient is laid out like its weight, and so are those that transformers computed.
    restore(checkpoint.latest(gradients, print), built.state)
    expected = {name: tensor.detach().clone() for name, tensor in parameters(built)}
    restore(checkpoint.latest(weights, print), built.state)
    logits = all_logits(built)
    batches = [iter(micro_batches()) for _ in built.chunks]
    reports = _run_schedule(built.chunks, batches, built.shape, forward_only=False)
    loss = mean_loss([_reduce(reports, built.shape, False)])
    found = {name: tensor.main_grad.clone() for name, tensor in parameters(built)}
    return logits, loss, as_arrays(found), as_arrays(expected)


def parameters(built):
    return [
        (chunk.global_name(name), tensor)
        for chunk in built.state.chunks
        for name, tensor in chunk.module.named_parameters()
    ]


def as_arrays(tensors):
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def micro_batches():
    positions = torch.arange(SEQUENCE)[None]
    mask = torch.ones(1, SEQUENCE)
    return [
        {
            "tokens": row[None, :-1],
            "labels": row[None, 1:],
            "loss_mask": mask,
            "position_ids": positions,
        }
        for row in TOKENS
    ]


def all_logits(built):
    """Return the logits (BATCH, SEQUENCE, V) on the last stage, None on the others."""
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region as gather

    def forward(batches, model):
        batch = next(batches)
        output = model(batch["tokens"], batch["position_ids"], None)
        return output, lambda logits, **_: gather(logits)

    several = len(built.chunks) > 1
    batches = [iter(micro_batches()) for _ in built.chunks]
    with torch.no_grad():
        logits = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=batches if several else batches[0],
            model=list(built.chunks) if several else built.chunks[0],
            num_microbatches=built.shape.num_microbatches,
            seq_length=SEQUENCE,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    if not logits:
        return None
    return torch.cat(logits)[..., : built.state.arch.vocab_size].numpy()


@pytest.mark.parametrize("layout", TOPOLOGIES)
def test_logits_loss_and_gradients_agree_with_transformers(llama, layout, tmp_path):
    topology = TOPOLOGIES[layout]
    convert(llama.path, tmp_path / "weights", topology)
    convert(llama.gradients, tmp_path / "gradients", topology)
    hf_config = json.loads((llama.path / "config.json").read_text())
    model = family_for(hf_config).from_hf(hf_config)
    config = pretrain_config(model, topology, length=SEQUENCE, samples=BATCH)
    world_size = topology.tensor_model_parallel_size * topology.pipeline_model_parallel_size
    ranks = run_ranks(
        logits_loss_and_gradients,
        world_size,
        tmp_path / "weights",
        tmp_path / "gradients",
        check_world(config, world_size),
    )
    assert float(llama.logits.std()) > 0.5  # else agreement would mean little
    assert ranks[-1][0] is not None
    for logits, loss, gradients, expected in ranks:
        if logits is not None:
            assert_near(logits, llama.logits.numpy(), 1e-4)
        assert loss == pytest.approx(llama.loss, rel=1e-5)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert_near(gradient, expected[name], 1e-4 * abs(expected[name]).max(), name)


def assert_near(found, expected, tolerance, name=""):
    numpy.testing.assert_allclose(found, expected, rtol=1e-4, atol=tolerance, err_msg=name)
