"""What is built trains as plain torch does: its autograd, its clipping, its AdamW."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from training_job import LAYOUTS, SEQUENCE, UNTIED, Job, Rank, global_batch

from ml_parallel.testing import run_ranks
from ml_parallel.topology import Topology
from ml_train.config import Adam

STEPS = 3
BIASED = dataclasses.replace(UNTIED, add_qkv_bias=True)
# A large epsilon, so that an update shows the size of the gradients and not their direction only.
ADAM = {"weight_decay": 0.3, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_eps": 1e-3}


def train_both(job):
    """Return (loss, gradient norm, largest difference of a weight by name) of each step."""
    rank = Rank(job)
    (module,) = (chunk.module for chunk in rank.state.chunks)
    ours = dict(module.named_parameters())
    plain = {name: tensor.detach().clone().requires_grad_() for name, tensor in ours.items()}
    adamw = torch_adamw(plain, job.optimizer)
    steps = []
    for iteration in range(STEPS):
        result = rank.step(iteration)
        loss = mean_loss(module, plain, *global_batch(job, iteration))
        loss.backward()
        clip = job.optimizer.clip_grad or float("inf")
        norm = clip_grad_norm_(plain.values(), clip)
        adamw.step()
        adamw.zero_grad()
        assert result.updated
        assert result.loss == pytest.approx(float(loss.detach()), rel=1e-6)
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-5)
        steps.append({name: largest_difference(ours[name], plain[name]) for name in ours})
    return steps


def largest_difference(one, other):
    return float((one.detach() - other.detach()).abs().max())


def torch_adamw(parameters, adam):
    matrices = [tensor for tensor in parameters.values() if tensor.dim() == 2]
    others = [tensor for tensor in parameters.values() if tensor.dim() != 2]
    assert matrices
    assert others
    return torch.optim.AdamW(
        [{"params": matrices}, {"params": others, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(adam.adam_beta1, adam.adam_beta2),
        eps=adam.adam_eps,
        weight_decay=adam.weight_decay,
    )


def mean_loss(module, weights, tokens, mask):
    """Return the loss of the whole batch at once, without any of megatron-core's schedules."""
    positions = torch.arange(SEQUENCE).expand(len(tokens), -1)
    inputs = (tokens[:, :-1], positions, None)
    labels = {"labels": tokens[:, 1:]}
    losses = torch.func.functional_call(module, weights, inputs, labels)  # (B, S)
    return (losses * mask).sum() / mask.sum()


@pytest.mark.parametrize("clip_grad", [0.05, 0.0])
@pytest.mark.parametrize("layout", ["single", "dp2", "dp2 dist"])
def test_steps_are_those_of_plain_torch(layout, clip_grad):
    world_size, topology = LAYOUTS.get(layout, (1, Topology()))
    job = Job(
        topology=topology,
        arch=BIASED,
        micro_batch_size=2,
        optimizer=Adam(clip_grad=clip_grad, **ADAM),
    )
    for steps in run_ranks(train_both, world_size, job):
        for differences in steps:
            assert differences == pytest.approx(dict.fromkeys(differences, 0.0), abs=2e-6)


def decays(job):
    """Return (number of axes, weight decay) of the parameters this rank updates."""
    from ml_parallel.optimizer import optimizer_shards

    rank = Rank(job)
    decay = {
        main: group["weight_decay"]
        for group in rank.optimizer.param_groups
        for main in group["params"]
    }
    return {
        (shard.parameter.dim(), decay[shard.main]) for shard in optimizer_shards(rank.optimizer)
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["tp2", "dp4 dist overlap", "pp2 vpp dp2 dist overlap"])
def test_only_matrices_decay_whatever_the_layout(layout, dtype):
    world_size, topology = LAYOUTS[layout]
    ranks = run_ranks(decays, world_size, Job(topology=topology, arch=BIASED, dtype=dtype))
    assert set().union(*ranks) == {(1, 0.0), (2, 0.1)}


def options(job):
    rank = Rank(job)
    (optimizer,) = rank.optimizer.chained_optimizers
    scaler, groups = optimizer.grad_scaler, optimizer.param_groups
    return {(group["betas"], group["eps"]) for group in groups}, {
        "clip_grad": optimizer.config.clip_grad,
        "initial_loss_scale": float(scaler.scale),
        "min_loss_scale": float(scaler.min_scale),
        "loss_scale_window": scaler.growth_interval,
        "hysteresis": scaler.hysteresis,
    }


def test_every_flag_of_the_optimizer_reaches_it():
    scaling = {
        "clip_grad": 0.7,
        "initial_loss_scale": 2.0**12,
        "min_loss_scale": 4.0,
        "loss_scale_window": 17,
        "hysteresis": 3,
    }
    adam = Adam(**ADAM, **scaling)
    ((groups, found),) = run_ranks(options, 1, Job(dtype=torch.float16, optimizer=adam))
    assert groups == {((adam.adam_beta1, adam.adam_beta2), adam.adam_eps)}
    assert found == scaling
