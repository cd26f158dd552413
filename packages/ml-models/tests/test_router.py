"""The router's losses against their published formulas, and its precision."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_blocks import DEEPSEEK3, GPT_OSS
from test_gpt import build

from ml_parallel.testing import run_ranks
from ml_parallel.topology import Topology

LENGTH, BATCH = 6, 3


def router_of(arch):
    (chunk,), *_ = build(arch, Topology())
    router = chunk.module.decoder.layers[-1].mlp.router
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
    return router, torch.randn(LENGTH, BATCH, arch.hidden_size, generator=generator)


def loss_gradients(arch):
    """Return the gradients of the losses alone, the router's and those of the formulas."""
    router, hidden = router_of(arch)
    probs, _ = router(hidden)
    (probs.sum() * 0).backward()
    weight = router.weight.detach().double().requires_grad_()
    # Losses are means; the run divides every gradient by the number of tokens in the end.
    (losses(arch, weight, hidden.double()) * LENGTH * BATCH).backward()
    return router.weight.grad.numpy(), weight.grad.numpy()


def losses(arch, weight, hidden):
    """Switch Transformer's loss (arXiv:2101.03961) over what, and ST-MoE's (arXiv:2202.08906)."""
    logits = hidden @ weight.T  # (S, B, E)
    balance = {
        "aux_loss": lambda: switch_loss(arch, logits.flatten(0, 1)),
        "seq_aux_loss": lambda: sum(switch_loss(arch, z) for z in logits.unbind(1)) / BATCH,
        "none": lambda: 0.0,
    }[arch.moe_router_load_balancing_type]()
    return arch.moe_aux_loss_coeff * balance + arch.moe_z_loss_coeff * (
        logits.logsumexp(-1).square().mean()
    )


def switch_loss(arch, logits):
    scores = logits.softmax(-1)
    if arch.moe_router_score_function == "sigmoid":
        scores = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    experts, k = arch.num_experts, arch.moe_router_topk
    chosen = torch.zeros_like(scores).scatter(1, scores.topk(k).indices, 1.0)
    return experts * (chosen.mean(0) / k * scores.mean(0)).sum()


@pytest.mark.parametrize("arch", [GPT_OSS, DEEPSEEK3], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("balancing", "aux", "z"),
    [("aux_loss", 0.1, 0.0), ("seq_aux_loss", 0.1, 0.0), ("none", 0.1, 0.01)],
)
def test_the_losses_are_the_published_ones(arch, balancing, aux, z):
    arch = dataclasses.replace(
        arch,
        add_bias_linear=False,
        moe_router_load_balancing_type=balancing,
        moe_aux_loss_coeff=aux,
        moe_z_loss_coeff=z,
    )
    ((found, expected),) = run_ranks(loss_gradients, 1, arch)
    assert abs(expected).max() > 1e-3
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def logits_in_bfloat16(arch):
    router, hidden = router_of(arch)
    router, hidden = router.bfloat16(), hidden.bfloat16().requires_grad_()
    found = router.gating(hidden)
    weight, bias = (t.detach().double().requires_grad_() for t in (router.weight, router.bias))
    wide = hidden.detach().double().requires_grad_()
    expected = wide @ weight.T + bias
    towards = torch.randn(found.shape, generator=torch.Generator().manual_seed(5))
    found.backward(towards)
    expected.backward(towards.double())
    pairs = [(found, expected)] + [
        (ours.grad, theirs.grad)
        for ours, theirs in ((hidden, wide), (router.weight, weight), (router.bias, bias))
    ]
    return found.dtype, [float(((a - b).abs().max() / b.abs().max()).detach()) for a, b in pairs]


def test_logits_are_exact_whatever_the_dtype_of_the_model():
    ((dtype, errors),) = run_ranks(logits_in_bfloat16, 1, GPT_OSS)
    assert dtype == torch.float32
    assert errors[0] < 1e-6  # a product in bfloat16 is wrong by 4e-3
    assert max(errors[1:]) < 4e-3  # gradients have the dtype of what they belong to


def counts(arch):
    router, hidden = router_of(arch)
    router.expert_bias.copy_(torch.tensor([50.0, 50.0, 50.0] + [0.0] * 5))
    _, chosen = router(hidden)
    with torch.no_grad():
        router(hidden)
    router.eval()(hidden)
    return chosen.sum(0).tolist(), router.local_tokens_per_expert.tolist()


def bias_update_rate(arch):
    return router_of(arch)[0].config.moe_router_bias_update_rate


def test_how_fast_biases_follow_is_a_flag():
    arch = dataclasses.replace(DEEPSEEK3, moe_router_bias_update_rate=0.25)
    assert run_ranks(bias_update_rate, 1, arch) == [0.25]


def test_tokens_are_counted_in_training_only_and_biased_experts_get_them():
    arch = dataclasses.replace(DEEPSEEK3, moe_router_num_groups=None, moe_router_group_topk=None)
    ((chosen, counted),) = run_ranks(counts, 1, arch)
    assert chosen == counted == [LENGTH * BATCH] * 3 + [0] * 5
