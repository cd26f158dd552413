"""Weights of a Hugging Face Llama, converted, give the same logits on megatron-core."""

from __future__ import annotations

import pytest
import torch

from ml_convert.cli import main as ml_convert
from ml_models.architecture import Architecture
from ml_models.registry import family_for
from ml_models.weights import padded_vocab_size
from ml_parallel.stages import stage_layers
from ml_parallel.testing import run_ranks
from ml_parallel.topology import Topology

TOKENS = torch.randint(0, 301, (2, 48), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module", params=["untied", "tied", "theta"])
def llama(request, tmp_path_factory):
    """Return a directory with a tiny random Llama, and its logits and loss for TOKENS."""
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
        rope_theta=50000.0 if request.param == "theta" else 10000.0,
        rms_norm_eps=1e-6,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name:
                tensor.add_(torch.randn_like(tensor) * 0.2)
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path)
    with torch.no_grad():
        result = model(TOKENS, labels=TOKENS)
    return path, result.logits, float(result.loss)


def logits_and_loss(checkpoint, hf_config, topology):
    """Return the full logits (B, S, V) on the last stage, and the mean loss there."""
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region as gather
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from ml_models.gpt import build_model, transformer_config
    from ml_parallel import checkpoint as directories
    from ml_parallel.groups import initialize_groups
    from ml_parallel.optimizer import build_optimizer, distribute
    from ml_train.restore import restore
    from ml_train.state import TrainingState

    arch: Architecture = family_for(hf_config).from_hf(hf_config)
    place = initialize_groups(topology, num_chunks=len(stage_layers(arch.num_layers, topology)[0]))
    model_parallel_cuda_manual_seed(1)
    rows = padded_vocab_size(
        arch.vocab_size,
        make_vocab_size_divisible_by=16,
        tensor_model_parallel_size=topology.tensor_model_parallel_size,
    )
    config = transformer_config(arch, topology)
    chunks = build_model(arch, topology, config, padded_vocab_size=rows, seq_length=48)
    wrapped = distribute([chunk.module for chunk in chunks], config, topology)
    state = TrainingState(
        arch=arch,
        topology=topology,
        place=place,
        padded_vocab_size=rows,
        params_dtype="float32",
        global_batch_size=1,
        chunks=chunks,
        wrapped=wrapped,
        optimizer=build_optimizer(wrapped, OptimizerConfig(optimizer="adam", lr=1e-3)),
    )
    restore(directories.latest(checkpoint, print), state)
    (module,) = [chunk.module for chunk in chunks]
    positions = torch.arange(48).expand(2, -1)
    group = torch.distributed.group.WORLD
    with torch.no_grad():
        if topology.pipeline_model_parallel_size == 1:
            logits = gather(module(TOKENS, positions, None))
        elif place.pp_rank == 0:
            torch.distributed.send(module(TOKENS, positions, None), 1, group)
            return None
        else:
            hidden = torch.empty(48, 2, arch.hidden_size)
            torch.distributed.recv(hidden, 0, group)
            module.set_input_tensor(hidden)
            logits = gather(module(None, None, None))
    logits = logits[..., : arch.vocab_size]
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    return logits.numpy(), float(loss)


@pytest.mark.parametrize(
    "topology",
    [
        Topology(),
        Topology(tensor_model_parallel_size=2),
        Topology(pipeline_model_parallel_size=2),
    ],
    ids=["single", "tp2", "pp2"],
)
def test_logits_agree_with_transformers(llama, topology, tmp_path):
    import json

    path, expected, expected_loss = llama
    tp, pp = topology.tensor_model_parallel_size, topology.pipeline_model_parallel_size
    # Converted for one layout, read in another.
    arguments = ["--load-dir", str(path), "--save-dir", str(tmp_path / "mcore")]
    arguments += ["--save-format", "mcore", "--target-tensor-parallel-size", str(pp)]
    arguments += ["--target-pipeline-parallel-size", str(tp), "--verify"]
    assert ml_convert(arguments) == 0
    config = json.loads((path / "config.json").read_text())
    results = run_ranks(logits_and_loss, tp * pp, tmp_path / "mcore", config, topology)
    found, loss = results[-1]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert float(expected.std()) > 0.5  # else agreement would mean little
