"""Gating against the routers of transformers, and against a choice made one token at a time."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracle import assert_near, random, runs, with_gradients
from transformers import DeepseekV2Config, DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

import ml_kernels

EXPERTS = 16


def scattered(probs, indices, experts):
    """Weights of all experts, `(T, E)`: the order of the chosen does not matter."""
    return torch.zeros(len(probs), experts, dtype=probs.dtype).scatter(1, indices, probs)


def routed(router, logits):
    """Ask a router of transformers about logits, through an identity for its weight."""
    with torch.no_grad():
        router.weight.copy_(torch.eye(EXPERTS))
    _, probs, indices = router(logits)
    return scattered(probs, indices, EXPERTS)


ROUTERS = {
    "deepseek_v2_greedy": (
        DeepseekV2TopkRouter,
        DeepseekV2Config,
        {"num_experts_per_tok": 3, "routed_scaling_factor": 16.0, "topk_method": "greedy"},
        {"scaling_factor": 16.0},
    ),
    "deepseek_v2_groups": (
        DeepseekV2TopkRouter,
        DeepseekV2Config,
        {
            "num_experts_per_tok": 3,
            "topk_method": "group_limited_greedy",
            "n_group": 8,
            "topk_group": 3,
        },
        {"num_groups": 8, "group_topk": 3},
    ),
    "deepseek_v3": (
        DeepseekV3TopkRouter,
        DeepseekV3Config,
        {"num_experts_per_tok": 5, "n_group": 4, "topk_group": 2, "norm_topk_prob": True},
        {
            "score": "sigmoid",
            "num_groups": 4,
            "group_topk": 2,
            "group_score": "top2_sum",
            "renormalize": True,
            "scaling_factor": 2.5,
        },
    ),
    "mixtral_renormalised": (
        MixtralTopKRouter,
        MixtralConfig,
        {"num_experts_per_tok": 2, "num_local_experts": EXPERTS},
        {"renormalize": True},
    ),
    "mixtral_topk_first": (
        MixtralTopKRouter,
        MixtralConfig,
        {"num_experts_per_tok": 2, "num_local_experts": EXPERTS},
        {"order": "topk_first"},
    ),
    "qwen3_moe": (
        Qwen3MoeTopKRouter,
        Qwen3MoeConfig,
        {"num_experts_per_tok": 4, "num_experts": EXPERTS, "norm_topk_prob": False},
        {},
    ),
}


@pytest.mark.parametrize("case", ROUTERS)
def test_gating_equals_the_router_of_transformers(case):
    router_class, config_class, sizes, options = ROUTERS[case]
    if config_class in (DeepseekV2Config, DeepseekV3Config):
        sizes = {**sizes, "n_routed_experts": EXPERTS}
    router = router_class(config_class(hidden_size=EXPERTS, num_attention_heads=4, **sizes))
    if case == "deepseek_v3":
        bias = random(EXPERTS, seed=5).detach()
        router.e_score_correction_bias.copy_(bias)
        options = {**options, "selection_bias": bias}
    logits = random(50, EXPERTS)

    def ours(logits):
        probs, indices = ml_kernels.topk_gating(logits, sizes["num_experts_per_tok"], **options)
        return scattered(probs, indices, EXPERTS)

    expected = with_gradients(lambda logits: routed(router, logits), [logits])
    assert_near(with_gradients(ours, [logits]), expected)


def chosen_one_token_at_a_time(logits, k, score, order, groups, kept, best, bias):
    """Choose as a person would: sort the groups, sort what is left of the experts."""
    values = logits.softmax(0) if score == "softmax" else logits.sigmoid()
    worth = (logits if order == "topk_first" else values) + bias
    experts = range(len(logits))
    if groups:
        size = len(logits) // groups
        members = [list(experts[g * size : (g + 1) * size]) for g in range(groups)]
        members.sort(key=lambda g: -sum(sorted(float(worth[e]) for e in g)[-best:]))
        experts = list(itertools.chain(*members[:kept]))
    return values, sorted(experts, key=lambda e: -float(worth[e]))[:k]


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("groups", "kept", "best"), [(None, None, 1), (4, 2, 1), (4, 2, 2)])
@pytest.mark.parametrize(
    ("score", "order"),
    [("softmax", "score_first"), ("softmax", "topk_first"), ("sigmoid", "score_first")],
)
def test_gating_follows_its_formula(score, order, groups, kept, best, with_bias, renormalize):
    bias = torch.randn(12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    bias *= with_bias
    logits = random(20, 12, dtype=torch.float64)
    probs, indices = ml_kernels.topk_gating(
        logits,
        3,
        score=score,
        order=order,
        num_groups=groups,
        group_topk=kept,
        group_score="max" if best == 1 else "top2_sum",
        selection_bias=bias if with_bias else None,
        renormalize=renormalize,
        scaling_factor=1.5,
    )
    assert indices.dtype == torch.int64
    for token, row in enumerate(logits.detach()):
        values, experts = chosen_one_token_at_a_time(row, 3, score, order, groups, kept, best, bias)
        assert indices[token].tolist() == experts
        expected = values[experts]
        if renormalize or order == "topk_first":
            expected = expected / expected.sum()
        torch.testing.assert_close(probs[token], 1.5 * expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"renormalize": True, "scaling_factor": 1.5},
        {"order": "topk_first"},
        {"score": "sigmoid", "renormalize": True},
        {"score": "sigmoid", "num_groups": 2, "group_topk": 1},
    ],
)
def test_the_gradient_of_gating_agrees_with_differences(options):
    logits = random(2, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: ml_kernels.topk_gating(x, 2, **options)[0], logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("device", "backend"), runs("topk_gating"))
def test_weights_are_taken_in_float32(device, backend, dtype):
    logits = random(9, EXPERTS, dtype=dtype, device=device)
    probs, indices = ml_kernels.topk_gating(logits, 4, renormalize=True, backend=backend)
    assert probs.dtype == torch.float32
    exact = logits.detach().double().softmax(-1).gather(1, indices)
    torch.testing.assert_close(probs.double(), exact / exact.sum(-1, keepdim=True))
    probs.square().sum().backward()
    assert logits.grad.dtype == dtype


def test_a_selection_bias_chooses_but_does_not_weigh_and_has_no_gradient():
    logits = random(6, 8)
    bias = torch.zeros(8).index_fill_(0, torch.tensor([5]), 10.0).requires_grad_()
    probs, indices = ml_kernels.topk_gating(logits, 1, selection_bias=bias)
    assert indices.flatten().tolist() == [5] * 6
    torch.testing.assert_close(probs[:, 0], logits.detach().softmax(-1)[:, 5])
    probs.sum().backward()
    assert bias.grad is None


def test_a_group_of_negative_scores_is_not_left_for_dropped_experts():
    """Dropped experts count as minus infinity, not 0: biased scores may be negative."""
    bias = torch.tensor([-1.0, -2.0, -3.0, -4.0, -9.0, -9.0, -9.0, -9.0])
    _, indices = ml_kernels.topk_gating(
        random(5, 8), 4, score="sigmoid", num_groups=2, group_topk=1, selection_bias=bias
    )
    assert indices.sort(-1).values.tolist() == [[0, 1, 2, 3]] * 5


def test_scores_that_vanish_do_not_divide_by_zero():
    probs, _ = ml_kernels.topk_gating(
        torch.full((2, 4), -200.0), 2, score="sigmoid", renormalize=True
    )
    assert torch.equal(probs, torch.zeros(2, 2))


@pytest.mark.parametrize("options", [{}, {"num_groups": 2, "group_topk": 1}])
def test_no_tokens_choose_nothing(options):
    logits = torch.empty(0, 8, requires_grad=True)
    probs, indices = ml_kernels.topk_gating(logits, 2, **options)
    assert (probs.shape, indices.shape) == ((0, 2), (0, 2))
    probs.sum().backward()
    assert logits.grad.shape == (0, 8)


@pytest.mark.parametrize(
    ("k", "options", "message"),
    [
        (0, {}, "k 0: must be 1 to 8"),
        (9, {}, "k 9: must be 1 to 8"),
        (2, {"score": "tanh"}, "score tanh: must be in .*softmax"),
        (2, {"order": "last"}, "order last: must be in"),
        (2, {"group_score": "mean"}, "group_score mean: must be in"),
        (2, {"score": "sigmoid", "order": "topk_first"}, "order topk_first: .*needs score"),
        (2, {"num_groups": 2}, "num_groups 2: needs group_topk, which is None"),
        (2, {"group_topk": 2}, "num_groups None: needs group_topk, which is 2"),
        (2, {"num_groups": 3, "group_topk": 1}, "num_groups 3: must divide 8"),
        (2, {"num_groups": 0, "group_topk": 1}, "num_groups 0: must divide 8"),
        (2, {"num_groups": 4, "group_topk": 5}, "group_topk 5: must be 1 to num_groups=4"),
        (5, {"num_groups": 4, "group_topk": 2}, "k 5: must be at most 4.*group_topk=2"),
        (
            2,
            {"num_groups": 8, "group_topk": 4, "group_score": "top2_sum"},
            "group_score top2_sum: needs groups of two experts, has 8 / 8",
        ),
        (2, {"selection_bias": torch.zeros(7)}, r"selection_bias \(7,\): must be \(8,\)"),
        (2, {"selection_bias": torch.zeros(8, device="meta")}, "selection_bias is on meta"),
    ],
)
def test_gating_refuses_what_contradicts_itself(k, options, message):
    with pytest.raises(ValueError, match=f"topk_gating: {message}"):
        ml_kernels.topk_gating(torch.zeros(3, 8), k, **options)


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_gating_refuses_a_factor_that_is_not_finite(factor):
    with pytest.raises(ValueError, match=f"topk_gating: scaling_factor {factor}: must be finite"):
        ml_kernels.topk_gating(torch.zeros(3, 8), 2, scaling_factor=factor)


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("k", {"k": 2.0}),
        ("num_groups", {"k": 2, "num_groups": 2.0, "group_topk": 1}),
        ("group_topk", {"k": 2, "num_groups": 2, "group_topk": True}),
    ],
)
def test_gating_refuses_numbers_that_count_nothing(argument, options):
    message = f"topk_gating: {argument} {options[argument]}: must be an int"
    with pytest.raises(TypeError, match=message):
        ml_kernels.topk_gating(torch.zeros(3, 8), **options)


def test_gating_refuses_tensors_of_another_kind():
    with pytest.raises(ValueError, match=r"logits \(3,\): must be \(tokens, experts\)"):
        ml_kernels.topk_gating(torch.zeros(3), 1)
    with pytest.raises(TypeError, match=r"logits is torch\.int64: must be floating point"):
        ml_kernels.topk_gating(torch.zeros(3, 8, dtype=torch.int64), 1)
    with pytest.raises(TypeError, match=r"selection_bias is torch\.int64"):
        ml_kernels.topk_gating(
            torch.zeros(3, 8), 1, selection_bias=torch.zeros(8, dtype=torch.int64)
        )


def test_an_expert_that_is_switched_off_is_not_replaced_by_one_of_another_group():
    """With -inf for both, the first of them would win: of a group that was not chosen."""
    logits = torch.tensor([[1.0, 2.0, 5.0, float("-inf")]])
    groups = {"num_groups": 2, "group_topk": 1, "group_score": "max"}
    _, indices = ml_kernels.topk_gating(logits, 2, order="topk_first", **groups)
    assert sorted(indices[0].tolist()) == [2, 3]
