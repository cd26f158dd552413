"""Mixture of experts against transformers' routers and layers, and against formulas in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import ROUNDING, assert_matches, assert_near, random, runs, with_gradients
from torch.nn import functional as F
from transformers import DeepseekV2Config, DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

import ml_kernels
from ml_kernels import moe
from ml_kernels.cuda import moe as cuda
from ml_kernels.grouped import grouped_product

EXPERTS = 16

PERMUTATIONS = {
    "reference": (moe.moe_permute_reference, moe.moe_unpermute_reference),
    "cuda": (cuda.moe_permute, cuda.moe_unpermute),  # plain torch: it runs anywhere
}


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


def test_gating_refuses_tensors_of_another_kind():
    with pytest.raises(ValueError, match=r"logits \(3,\): must be \(tokens, experts\)"):
        ml_kernels.topk_gating(torch.zeros(3), 1)
    with pytest.raises(TypeError, match=r"logits is torch\.int64: must be floating point"):
        ml_kernels.topk_gating(torch.zeros(3, 8, dtype=torch.int64), 1)
    with pytest.raises(TypeError, match=r"selection_bias is torch\.int64"):
        ml_kernels.topk_gating(
            torch.zeros(3, 8), 1, selection_bias=torch.zeros(8, dtype=torch.int64)
        )


@given(st.data())
@settings(deadline=None, max_examples=60)
@pytest.mark.parametrize("version", PERMUTATIONS)
def test_tokens_go_to_their_experts_in_order_and_come_back(version, data):
    permute, unpermute = PERMUTATIONS[version]
    tokens, choices, experts = (
        data.draw(st.integers(low, 6), label=label)
        for low, label in ((0, "tokens"), (1, "choices"), (1, "experts"))
    )
    flat = data.draw(
        st.lists(st.integers(0, experts - 1), min_size=tokens * choices, max_size=tokens * choices)
    )
    indices = torch.tensor(flat, dtype=torch.int64).view(tokens, choices)
    x = torch.arange(tokens * 3, dtype=torch.float64).view(tokens, 3)
    permuted, order = permute(x, indices)
    slots = sorted(range(len(flat)), key=lambda slot: flat[slot])  # Python's sort is stable
    assert permuted.tolist() == [x[slot // choices].tolist() for slot in slots]
    probs = torch.rand(tokens, choices, dtype=torch.float64)
    torch.testing.assert_close(unpermute(permuted, order, probs), x * probs.sum(-1, keepdim=True))
    if choices == 1:
        assert torch.equal(unpermute(permuted, order, None), x)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("device", "backend"), runs("moe_permute"))
def test_permute_and_unpermute_match_their_formula(device, backend, dtype):
    indices = torch.randint(5, (7, 3), generator=torch.Generator().manual_seed(1)).to(device)
    scales = random(21, 1, dtype=dtype, seed=2, device=device)

    def operators(x, scales, probs):
        permuted, order = ml_kernels.moe_permute(x, indices, backend=backend)
        return ml_kernels.moe_unpermute(permuted * scales, order, probs, backend=backend)

    def formula(x, scales, probs):
        slots = indices.cpu().flatten().argsort(stable=True)
        scale_of_slot = torch.zeros(21, dtype=torch.float64).index_put((slots,), scales[:, 0])
        return torch.einsum("th,tk,tk->th", x, scale_of_slot.view(7, 3), probs)

    wide = torch.promote_types(dtype, torch.float32)  # weights stay in float32
    inputs = [random(7, 6, dtype=dtype, device=device), scales]
    inputs += [random(7, 3, dtype=wide, seed=3, device=device)]
    exact = [t.detach().cpu().double().requires_grad_() for t in inputs]
    assert_near(with_gradients(operators, inputs), with_gradients(formula, exact), dtype)


@pytest.mark.parametrize("version", PERMUTATIONS)
def test_gradients_of_permute_and_unpermute_agree_with_differences(version):
    permute, unpermute = PERMUTATIONS[version]
    indices = torch.randint(4, (5, 2), generator=torch.Generator().manual_seed(1))
    x, probs = random(5, 3, dtype=torch.float64), random(5, 2, dtype=torch.float64, seed=1)
    _, order = permute(x, indices)
    rows = random(10, 3, dtype=torch.float64, seed=2)
    assert torch.autograd.gradcheck(lambda x: permute(x, indices)[0], x)
    assert torch.autograd.gradcheck(lambda rows, p: unpermute(rows, order, p), (rows, probs))
    assert torch.autograd.gradcheck(lambda rows: unpermute(rows, order, None), rows)


@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("version", PERMUTATIONS)
def test_unpermute_has_the_gradient_of_one_input_alone(version, frozen):
    permute, unpermute = PERMUTATIONS[version]
    indices = torch.tensor([[1, 0], [0, 2], [2, 1]])
    _, order = permute(torch.zeros(3, 4), indices)
    both = [random(6, 4), random(3, 2, seed=1)]
    expected = torch.autograd.grad(unpermute(both[0], order, both[1]).sum(), both)
    alone = [t.detach().requires_grad_(i != frozen) for i, t in enumerate(both)]
    unpermute(alone[0], order, alone[1]).sum().backward()
    assert alone[frozen].grad is None
    torch.testing.assert_close(alone[1 - frozen].grad, expected[1 - frozen])


def test_gradients_by_gathers_round_a_sum_of_bfloat16_once():
    tokens = random(40, 16, dtype=torch.bfloat16)
    indices = torch.rand(40, 12, generator=torch.Generator().manual_seed(0)).argsort(-1)[:, :8]
    permuted, order = cuda.moe_permute(tokens, indices)
    upstream = random(*permuted.shape, dtype=torch.bfloat16, seed=4).detach()
    permuted.backward(upstream)
    exact = upstream.double()[order].view(40, 8, 16).sum(1)
    error = (tokens.grad.double() - exact).abs()
    # Half a unit in the last place of 8 bits, and a little for the sum in float32.
    assert bool((error <= exact.abs() * 2**-8 + 1e-6).all())


def test_permute_and_unpermute_take_tensors_that_are_not_contiguous():
    x, indices = random(8, 5).t(), torch.tensor([[0, 2, 1, 1, 0], [1, 0, 0, 2, 2]]).t()
    for permute, unpermute in PERMUTATIONS.values():
        permuted, order = permute(x, indices)
        expected, _ = permute(x.contiguous(), indices.contiguous())
        assert torch.equal(permuted, expected)
        probs = random(2, 5, seed=1).t()
        out = unpermute(permuted, order, probs)
        torch.testing.assert_close(out, x * probs.sum(-1, keepdim=True))


def test_permute_and_unpermute_refuse_shapes_that_do_not_fit():
    x, indices = torch.zeros(4, 3), torch.zeros(4, 2, dtype=torch.int64)
    permuted, order = ml_kernels.moe_permute(x, indices)
    with pytest.raises(ValueError, match=r"indices \(5, 2\): must be \(4, choices\)"):
        ml_kernels.moe_permute(x, torch.zeros(5, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"tokens \(4, 3, 1\): must be \(tokens, hidden\)"):
        ml_kernels.moe_permute(x[..., None], indices)
    with pytest.raises(TypeError, match=r"indices is torch\.float32: must be int32 or int64"):
        ml_kernels.moe_permute(x, indices.float())
    with pytest.raises(ValueError, match="indices is on meta: must be on cpu"):
        ml_kernels.moe_permute(x, indices.to("meta"))
    with pytest.raises(ValueError, match=r"permuted \(7, 3\): must be \(8, hidden\)"):
        ml_kernels.moe_unpermute(permuted[1:], order)
    with pytest.raises(ValueError, match=r"probs \(4, 3\): .* each of the 8 rows"):
        ml_kernels.moe_unpermute(permuted, order, torch.zeros(4, 3))
    with pytest.raises(TypeError, match=r"probs is torch\.int64: must be floating point"):
        ml_kernels.moe_unpermute(permuted, order, indices)
    with pytest.raises(TypeError, match=r"order is torch\.float32: must be int32 or int64"):
        ml_kernels.moe_unpermute(permuted, order.float())


SIZES = {
    "uneven": [3, 1, 7, 5],
    "empty_experts": [0, 9, 0, 0],
    "one_expert": [6],
    "no_tokens": [0, 0, 0],
}


def grouped_formula(sizes):
    def formula(x, weight):
        rows, out = x.split(sizes), []
        for expert, part in enumerate(rows):
            out.append(torch.einsum("mi,io->mo", part, weight[expert]))
        return torch.cat(out)

    return formula


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("device", "backend"), runs("grouped_matmul"))
def test_grouped_matmul_matches_its_formula(device, backend, sizes, dtype):
    inputs = [random(sum(sizes), 8, dtype=dtype, device=device)]
    inputs += [random(len(sizes), 8, 16, dtype=dtype, seed=1, device=device)]
    group_sizes = torch.tensor(sizes, device=device)
    assert_matches(
        lambda x, w: ml_kernels.grouped_matmul(x, w, group_sizes, backend=backend),
        grouped_formula(sizes),
        inputs,
    )


@pytest.mark.parametrize(("device", "backend"), runs("grouped_matmul"))
def test_grouped_matmul_takes_transposed_tensors(device, backend):
    x, weight = random(8, 9, device=device).t(), random(2, 16, 8, seed=1, device=device)
    sizes = torch.tensor([4, 5])
    out = ml_kernels.grouped_matmul(x, weight.transpose(1, 2), sizes, backend=backend)
    expected = grouped_formula([4, 5])(x, weight.transpose(1, 2))
    assert_near([out], [expected])
    out.sum().backward()
    assert weight.grad.shape == weight.shape


def test_the_gradients_of_grouped_products_agree_with_differences():
    x, weight = random(6, 3, dtype=torch.float64), random(3, 3, 2, dtype=torch.float64, seed=1)
    sizes = torch.tensor([4, 0, 2])
    assert torch.autograd.gradcheck(
        lambda x, w: ml_kernels.grouped_matmul(x, w, sizes, backend="cpu"), (x, weight)
    )


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_of_grouped_matmul_costs_no_product(frozen):
    inputs = [t.requires_grad_(i != frozen) for i, t in enumerate([random(5, 4), random(2, 4, 3)])]
    sizes = torch.tensor([2, 3])
    out = ml_kernels.grouped_matmul(*inputs, sizes)
    expected = torch.autograd.grad(
        ml_kernels.grouped_matmul(*inputs, sizes, backend="reference").sum(), inputs[1 - frozen]
    )
    torch.testing.assert_close(torch.autograd.grad(out.sum(), inputs[1 - frozen]), expected)
    assert out.grad_fn.next_functions[frozen][0] is None


@pytest.mark.skipif(
    not hasattr(F, "grouped_mm"), reason="this torch has the grouped kernel on a GPU only"
)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", [[3, 1, 7, 5], [0, 9, 0, 4]], ids=["uneven", "empty_experts"])
def test_the_calls_of_torchs_grouped_kernel_match_the_formula(sizes, transposed):
    """The calls made on a GPU, computed by torch on the CPU."""
    x, weight = random(sum(sizes), 8, dtype=torch.bfloat16), random(4, 8, 16, dtype=torch.bfloat16)
    if transposed:
        weight = weight.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
    assert_matches(
        lambda x, w: grouped_product(x, w, ends, cuda.FUSED), grouped_formula(sizes), [x, weight]
    )


@pytest.mark.parametrize(
    ("shape", "dtype", "capability", "expected"),
    [
        ((9, 8, 16), torch.bfloat16, (9, 0), True),
        ((9, 8, 16), torch.bfloat16, (7, 5), False),
        ((9, 8, 16), torch.float32, (9, 0), False),
        ((9, 8, 12), torch.bfloat16, (9, 0), False),
        ((9, 4, 16), torch.bfloat16, (9, 0), False),
        ((9, 0, 16), torch.bfloat16, (9, 0), False),
        ((0, 8, 16), torch.bfloat16, (9, 0), False),
    ],
)
def test_a_gpu_loops_where_torchs_kernel_does_not_apply(shape, dtype, capability, expected):
    rows, inner, outer = shape
    x, weight = torch.empty(rows, inner, dtype=dtype), torch.empty(2, inner, outer, dtype=dtype)
    assert cuda.fused(x, weight, capability) is expected


def test_tensors_are_aligned_for_torchs_kernel():
    buffer = torch.zeros(4 * 8 + 1, dtype=torch.bfloat16)
    shifted = buffer[1:].view(4, 8)
    assert cuda._aligned(shifted).data_ptr() % 16 == 0
    assert cuda._aligned(shifted.t()).is_contiguous()
    assert cuda._aligned(buffer) is buffer


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([1, 2], r"group_sizes \[1, 2\]: .*sum to 4, the rows of x"),
        ([5, -1], r"group_sizes \[5, -1\]: must not be negative"),
        ([4], r"group_sizes \(1,\): must be \(2,\)"),
    ],
)
def test_grouped_matmul_refuses_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=f"grouped_matmul: {message}"):
        ml_kernels.grouped_matmul(torch.zeros(4, 3), torch.zeros(2, 3, 5), torch.tensor(sizes))


def test_grouped_matmul_refuses_other_shapes_and_dtypes():
    x, weight, sizes = torch.zeros(4, 3), torch.zeros(2, 3, 5), torch.tensor([1, 3])
    with pytest.raises(ValueError, match=r"x \(1, 4, 3\): must be \(rows, inner width\)"):
        ml_kernels.grouped_matmul(x[None], weight, sizes)
    with pytest.raises(ValueError, match=r"weight \(2, 5, 3\): must be \(groups, 3, outer"):
        ml_kernels.grouped_matmul(x, weight.transpose(1, 2), sizes)
    with pytest.raises(TypeError, match=r"weight is torch\.float64: must be torch.float32"):
        ml_kernels.grouped_matmul(x, weight.double(), sizes)
    with pytest.raises(TypeError, match=r"group_sizes is torch\.int32: must be int64"):
        ml_kernels.grouped_matmul(x, weight, sizes.int())
    with pytest.raises(ValueError, match="group_sizes is on meta"):
        ml_kernels.grouped_matmul(x, weight, sizes.to("meta"))


def test_the_four_calls_are_a_layer_of_experts():
    config = MixtralConfig(
        hidden_size=12, intermediate_size=20, num_local_experts=6, num_experts_per_tok=2
    )
    config._experts_implementation = "eager"
    layer = MixtralSparseMoeBlock(config).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    x = random(17, 12)

    def ours(x):
        probs, indices = ml_kernels.topk_gating(x @ layer.gate.weight.t(), 2, order="topk_first")
        rows, order = ml_kernels.moe_permute(x, indices)
        sizes = indices.flatten().bincount(minlength=6)
        up = layer.experts.gate_up_proj.transpose(1, 2)
        down = layer.experts.down_proj.transpose(1, 2)
        inner = ml_kernels.swiglu(ml_kernels.grouped_matmul(rows, up, sizes))
        return ml_kernels.moe_unpermute(ml_kernels.grouped_matmul(inner, down, sizes), order, probs)

    expected = with_gradients(lambda x: layer(x[None])[0], [x])
    assert_near(with_gradients(ours, [x]), expected)
