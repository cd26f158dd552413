"""Mixture of experts on an NPU: every call of torch_npu, its derivative, its numbers, its limits.

Semantics are those of the operators' documentation; that of `npu_moe_gating_top_k` gives a numpy
equivalent, and that of `npu_grouped_matmul` says which operand must be transposed.
"""

from __future__ import annotations

import pytest
import torch
from npu_simulator import fake, fake_npu, mutated, recorded_calls, semantics, simulated, to_cpu
from oracle import assert_near, random, with_gradients

import ml_kernels
from ml_kernels.dispatch import BackendUnavailableError

TOKENS, EXPERTS = 10, 12


def best(values, k):
    return values.argsort(dim=-1, descending=True, stable=True)[:, :k]


def rows_like(indices):
    return torch.arange(indices.numel(), dtype=torch.int32).view_as(indices)


@semantics("npu_moe_gating_top_k_softmax")
def gating_top_k_softmax(x, finished, k):
    assert finished is None
    assert 0 < k <= min(x.shape[-1], 1024)
    scores = x.float().softmax(-1)
    indices = best(scores, k)
    return scores.gather(1, indices).to(x.dtype), indices.int(), rows_like(indices)


@semantics("npu_moe_gating_top_k_softmax_v2")
def gating_top_k_softmax_v2(x, k, finished, renorm, output_softmax):
    assert finished is None
    assert not output_softmax
    scores = x.float() if renorm else x.float().softmax(-1)
    indices = best(scores, k)
    chosen = scores.gather(1, indices)
    chosen = chosen.softmax(-1) if renorm else chosen
    return chosen.to(x.dtype), indices.int(), torch.empty(0)


@semantics("npu_moe_gating_top_k")
def gating_top_k(
    x,
    k,
    bias,
    k_group,
    group_count,
    group_select_mode,
    renorm,
    norm_type,
    out_flag,
    routed_scaling_factor,
    eps,
    **_,
):
    size = x.shape[1] // group_count
    assert renorm == 0, "only 0 is supported"
    assert bias is None or bias.dtype == x.dtype
    assert x.shape[1] % group_count == 0
    assert size > 2
    assert -(-size // 32) * 32 * group_count <= 2048
    assert 1 <= k <= size * k_group
    scores = x.float().sigmoid() if norm_type else x.float().softmax(-1)
    worth = scores if bias is None else scores + bias.float()
    if group_count > 1:
        groups = worth.view(len(x), group_count, size)
        of_group = groups.topk(2, -1).values.sum(-1) if group_select_mode else groups.amax(-1)
        kept = torch.zeros(len(x), group_count, dtype=torch.bool)
        kept[torch.arange(len(x))[:, None], best(of_group, k_group)] = True
        worth = groups.masked_fill(~kept[..., None], -torch.inf).view_as(x)
    indices = best(worth, k)
    chosen = scores.gather(1, indices)
    if norm_type == 1:
        chosen = chosen / (chosen.sum(-1, keepdim=True) + eps)
    chosen = chosen * routed_scaling_factor
    return chosen.to(x.dtype), indices.int(), scores if out_flag else torch.empty_like(scores)


@semantics("npu_gather_backward")
def gather_backward(grad, self_size, dim, index, sparse_grad):
    """torch_npu's derivative of `torch.gather`, which our derivative of gating takes."""
    return torch.zeros(self_size, dtype=grad.dtype).scatter_add(dim, index, grad)


@semantics("npu_moe_token_permute")
def token_permute(tokens, indices, num_out_tokens, padded_mode):
    assert not num_out_tokens
    assert not padded_mode
    slots = indices.flatten().argsort(stable=True)
    return tokens[slots // indices.shape[1]], slots.argsort().int()


@semantics("npu_moe_token_permute_grad_v2")
def token_permute_grad(grad_permuted_tokens, sorted_indices, tokens_size_0, tokens_dtype, **others):
    assert not others["padded_mode"]
    copies = grad_permuted_tokens[sorted_indices].view(tokens_size_0, others["num_topK"], -1)
    return copies.float().sum(1).to(tokens_dtype)


@semantics("_npu_moe_token_unpermute")
def token_unpermute(permuted_tokens, sorted_indices, probs, padded_mode, restore_shape):
    assert not padded_mode
    assert restore_shape is None
    assert sorted_indices.dtype == torch.int32
    rows = permuted_tokens[sorted_indices].float()
    if probs is not None:
        rows = (rows.view(*probs.shape, -1) * probs.float()[..., None]).sum(1)
    return rows.to(permuted_tokens.dtype), permuted_tokens


@semantics("npu_moe_token_unpermute_grad_v2")
def token_unpermute_grad(
    grad_unpermuted_tokens,
    sorted_indices,
    permuted_tokens_size_0,
    permuted_tokens_dtype,
    probs,
    permuted_tokens,
    **_,
):
    gradient = grad_unpermuted_tokens.float()
    of_rows = torch.zeros(permuted_tokens_size_0, gradient.shape[1])
    if probs is None:
        of_rows[sorted_indices] = gradient
        return of_rows.to(permuted_tokens_dtype), torch.empty(0)
    of_rows[sorted_indices] = (gradient[:, None] * probs.float()[..., None]).flatten(0, 1)
    rows = permuted_tokens[sorted_indices].float().view(*probs.shape, -1)
    of_probs = (rows * gradient[:, None]).sum(-1)
    return of_rows.to(permuted_tokens_dtype), of_probs.to(probs.dtype)


@semantics("npu_grouped_matmul")
def grouped_matmul(x, weight, group_list, split_item, group_type, group_list_type, **others):
    assert split_item in (2, 3), "one tensor in, one tensor out"
    assert not any(v for name, v in others.items() if name not in ("output_dtype", "act_type"))
    (x,), (weight,) = x, weight
    assert group_list.dtype == torch.int64
    ends = group_list if group_list_type == 0 else group_list.cumsum(0)
    groups = list(zip([0, *ends.tolist()[:-1]], ends.tolist(), strict=True))
    if group_type == 0:
        assert x.is_contiguous(), "x must not be transposed"
        assert weight.is_contiguous() or weight.transpose(1, 2).is_contiguous()
        assert weight.shape[0] == len(groups) > 1
        assert groups[-1][1] == len(x)
        return [torch.cat([x[a:b] @ weight[i] for i, (a, b) in enumerate(groups)])]
    assert group_type == 2
    assert x.t().is_contiguous(), "x must be a transposed view"
    assert weight.is_contiguous(), "weight must not be transposed"
    assert groups[-1][1] == x.shape[1]
    return [torch.stack([x[:, a:b] @ weight[a:b] for a, b in groups])]


def on_npu(tensor):
    if not isinstance(tensor, torch.Tensor):
        return tensor
    return simulated(tensor, requires_grad=tensor.requires_grad)


def compare(function, *inputs):
    """Compare values and gradients on the simulated NPU with those of the reference."""
    floating = [t for t in inputs if t.requires_grad]
    others = [t for t in inputs if not t.requires_grad]
    expected = with_gradients(lambda *given: function(*given, *others), floating)
    on_device = [on_npu(t) for t in others]
    found = with_gradients(
        lambda *given: function(*given, *on_device), [on_npu(t) for t in floating]
    )
    # Where rounding is to the dtype of the inputs, results in float32 share it.
    assert_near([to_cpu(t) for t in found], expected, floating[0].dtype)


GATINGS = {
    "softmax_first": ("npu_moe_gating_top_k_softmax", {}),
    "softmax_first_renormalised": (
        "npu_moe_gating_top_k_softmax",
        {"renormalize": True, "scaling_factor": 1.5},
    ),
    "topk_first": ("npu_moe_gating_top_k_softmax_v2", {"order": "topk_first"}),
    "topk_first_scaled": (
        "npu_moe_gating_top_k_softmax_v2",
        {"order": "topk_first", "scaling_factor": 2.0},
    ),
    "softmax_groups": (
        "npu_moe_gating_top_k",
        {"num_groups": 4, "group_topk": 2, "scaling_factor": 16.0},
    ),
    "softmax_groups_renormalised": (
        "npu_moe_gating_top_k",
        {"num_groups": 4, "group_topk": 2, "renormalize": True, "scaling_factor": 16.0},
    ),
    "softmax_bias": ("npu_moe_gating_top_k", {"selection_bias": True}),
    "sigmoid_renormalised": (
        "npu_moe_gating_top_k",
        {"score": "sigmoid", "renormalize": True, "scaling_factor": 2.5},
    ),
    "deepseek_v3": (
        "npu_moe_gating_top_k",
        {
            "score": "sigmoid",
            "num_groups": 4,
            "group_topk": 2,
            "group_score": "top2_sum",
            "renormalize": True,
            "scaling_factor": 2.5,
            "selection_bias": True,
        },
    ),
    "sigmoid": (None, {"score": "sigmoid"}),
    "topk_first_groups": (None, {"order": "topk_first", "num_groups": 4, "group_topk": 2}),
    "topk_first_bias": (None, {"order": "topk_first", "selection_bias": True}),
    "groups_of_two": (None, {"num_groups": 6, "group_topk": 3}),
}


def biased(options):
    """Replace the marker of a selection bias by one."""
    options = dict(options)
    bias = options.pop("selection_bias", None)
    return options, [random(EXPERTS, seed=7).detach()] if bias else []


def compare_gating(options, dtype=torch.float32):
    options, bias = biased(options)

    def scattered(logits, *bias):
        probs, indices = ml_kernels.topk_gating(
            logits, 3, selection_bias=bias[0] if bias else None, **options
        )
        assert (probs.dtype, indices.dtype) == (torch.float32, torch.int64)
        return torch.zeros_like(logits, dtype=torch.float32).scatter(1, indices, probs)

    compare(scattered, random(TOKENS, EXPERTS, dtype=dtype), *bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", GATINGS)
def test_gating_agrees_with_the_reference_through_the_kernel_of_the_table(case, dtype):
    operator, options = GATINGS[case]
    with recorded_calls() as calls:
        compare_gating(options, dtype)
    kernels = [(name, given["x"].dtype) for name, given in calls if name != "npu_gather_backward"]
    assert kernels == ([(operator, torch.float32)] if operator else [])


@pytest.mark.parametrize("case", [case for case, (operator, _) in GATINGS.items() if operator])
def test_gating_calls_fit_the_schema_and_have_our_derivative(case):
    operator, options = GATINGS[case]
    options, bias = biased(options)
    with fake_npu(), recorded_calls() as calls:
        logits = fake(TOKENS, EXPERTS, dtype=torch.bfloat16, requires_grad=True)
        bias = {"selection_bias": fake(EXPERTS)} if bias else {}
        probs, indices = ml_kernels.topk_gating(logits, 3, **options, **bias)
        probs.sum().backward()
    assert [name for name, _ in calls] == [operator, "npu_gather_backward"]
    assert (probs.shape, probs.dtype, probs.device.type) == ((TOKENS, 3), torch.float32, "npu")
    assert (indices.shape, indices.dtype, indices.device.type) == ((TOKENS, 3), torch.int64, "npu")
    assert (logits.grad.shape, logits.grad.dtype) == ((TOKENS, EXPERTS), torch.bfloat16)


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("softmax_first", {"x": lambda x: x.flip(-1)}),
        ("topk_first", {"renorm": lambda _: 0}),
        ("softmax_groups", {"norm_type": lambda _: 1}),
        ("softmax_groups", {"group_select_mode": lambda _: 1}),
        ("softmax_groups", {"k_group": lambda _: 3}),
        ("softmax_groups", {"group_count": lambda _: 2}),
        ("softmax_groups", {"routed_scaling_factor": lambda _: 16.0}),
        ("softmax_bias", {"bias": lambda _: None}),
        ("deepseek_v3", {"bias": lambda bias: -bias}),
        ("deepseek_v3", {"norm_type": lambda _: 0}),
        ("deepseek_v3", {"group_select_mode": lambda _: 0}),
        ("deepseek_v3", {"routed_scaling_factor": lambda _: 1.0}),
    ],
)
def test_a_wrong_gating_call_is_noticed(case, change):
    operator, options = GATINGS[case]
    with (
        mutated(operator, lambda given: {name: new(given[name]) for name, new in change.items()}),
        pytest.raises(AssertionError),
    ):
        compare_gating(options)


def test_gating_of_no_tokens_calls_no_kernel():
    with recorded_calls() as calls:
        for backend in (None, "npu"):
            logits = simulated(torch.zeros(0, EXPERTS))
            probs, indices = ml_kernels.topk_gating(logits, 2, backend=backend)
            assert (probs.shape, indices.shape) == ((0, 2), (0, 2))
    assert calls == []


@pytest.mark.parametrize(
    ("shape", "k", "options", "message"),
    [
        ((2, 12), 3, {"score": "sigmoid"}, "score sigmoid: on an NPU needs renormalize=True"),
        ((2, 12), 3, {"order": "topk_first", "num_groups": 4, "group_topk": 2}, "order topk_first"),
        ((2, 12), 3, {"order": "topk_first", "selection_bias": True}, "takes .* no selection_bias"),
        ((2, 1200), 1025, {"order": "topk_first"}, "takes .* at most 1024 choices"),
        ((2, 12), 3, {"num_groups": 6, "group_topk": 3}, "must have 3 experts at least"),
        ((1, 2049), 2, {"selection_bias": True}, r"logits \(1, 2049\): .* 2048 at most"),
        # 65 groups of 3, each rounded up to 32: 2080
        ((1, 195), 2, {"num_groups": 65, "group_topk": 1}, r"logits \(1, 195\): .* 2048 at most"),
        ((2, 12), 3, {"dtype": torch.float64}, r"logits is torch\.float64"),
    ],
)
def test_gating_that_no_kernel_computes_is_refused_if_named_and_else_torchs(
    shape, k, options, message
):
    options = dict(options)
    logits = simulated(torch.randn(shape, dtype=options.pop("dtype", None)))
    if options.pop("selection_bias", False):
        options["selection_bias"] = simulated(torch.zeros(shape[1]))
    with recorded_calls() as calls:
        with pytest.raises(BackendUnavailableError, match=f"topk_gating: .*{message}"):
            ml_kernels.topk_gating(logits, k, **options, backend="npu")
        found = ml_kernels.topk_gating(logits, k, **options)
        expected = ml_kernels.topk_gating(logits, k, **options, backend="reference")
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(to_cpu(one), to_cpu(other))
    assert calls == []


INDICES = torch.tensor([[3, 0], [1, 3], [0, 1], [3, 2], [1, 0]])


def there_and_back(tokens, probs, indices):
    permuted, order = ml_kernels.moe_permute(tokens, indices)
    scales = torch.arange(1, 11, device=tokens.device, dtype=tokens.dtype)[:, None]
    return ml_kernels.moe_unpermute(permuted * scales, order, probs)


def compare_permutation(dtype=torch.float32, probs_dtype=torch.float32):
    probs = random(5, 2, seed=1, dtype=probs_dtype)
    compare(there_and_back, random(5, 4, dtype=dtype), probs, INDICES)


@pytest.mark.parametrize("probs_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_permute_and_unpermute_agree_with_the_reference(dtype, probs_dtype):
    with recorded_calls() as calls:
        compare_permutation(dtype, probs_dtype)
    assert [name for name, _ in calls] == [
        "npu_moe_token_permute",
        "_npu_moe_token_unpermute",
        "npu_moe_token_unpermute_grad_v2",
        "npu_moe_token_permute_grad_v2",
    ]


def test_one_expert_for_each_token_needs_no_weights():
    def function(tokens, indices):
        permuted, order = ml_kernels.moe_permute(tokens, indices)
        return permuted, ml_kernels.moe_unpermute(permuted * 3, order)

    compare(function, random(5, 4), torch.tensor([[2], [0], [1], [0], [2]]))


def test_permute_and_unpermute_fit_the_schema_and_torch_npus_derivative():
    with fake_npu():
        tokens = fake(6, 8, dtype=torch.bfloat16, requires_grad=True)
        probs = fake(6, 2, requires_grad=True)
        indices = torch.empty(6, 2, dtype=torch.int64, device="npu")
        permuted, order = ml_kernels.moe_permute(tokens, indices)
        out = ml_kernels.moe_unpermute(permuted, order, probs)
        out.sum().backward()
    assert (permuted.shape, permuted.dtype) == ((12, 8), torch.bfloat16)
    assert (order.shape, order.dtype, order.device.type) == ((12,), torch.int32, "npu")
    assert (out.shape, out.dtype, out.device.type) == ((6, 8), torch.bfloat16, "npu")
    assert (tokens.grad.shape, probs.grad.shape) == ((6, 8), (6, 2))
    assert (tokens.grad.dtype, probs.grad.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("operator", "change"),
    [
        ("npu_moe_token_permute", {"indices": lambda indices: indices.flip(0)}),
        (
            "_npu_moe_token_unpermute",
            {"sorted_indices": lambda order: order.argsort().to(torch.int32)},
        ),
        (
            "_npu_moe_token_unpermute",
            {"sorted_indices": lambda order: torch.arange(10, dtype=torch.int32, device="npu")},
        ),
        ("_npu_moe_token_unpermute", {"probs": lambda probs: torch.ones_like(probs)}),
        ("_npu_moe_token_unpermute", {"probs": lambda probs: probs.flip(1)}),
    ],
    ids=["other_experts", "inverted_order", "no_permutation", "no_weights", "swapped_weights"],
)
def test_a_wrong_permutation_is_noticed(operator, change):
    with (
        mutated(operator, lambda given: {name: new(given[name]) for name, new in change.items()}),
        pytest.raises(AssertionError),
    ):
        compare_permutation()


def test_permuting_no_tokens_calls_no_kernel():
    tokens = simulated(torch.zeros(0, 4), requires_grad=True)
    with recorded_calls() as calls:
        permuted, order = ml_kernels.moe_permute(
            tokens, simulated(torch.zeros(0, 2, dtype=torch.int64))
        )
        out = ml_kernels.moe_unpermute(permuted, order, simulated(torch.zeros(0, 2)))
        out.sum().backward()
    assert calls == []
    assert (out.shape, order.dtype, tokens.grad.shape) == ((0, 4), torch.int32, (0, 4))


def test_permutations_outside_the_documented_limits_are_refused():
    with fake_npu():
        indices = torch.empty(4, 2, dtype=torch.int64, device="npu")
        order = torch.empty(8, dtype=torch.int32, device="npu")
        with pytest.raises(BackendUnavailableError, match=r"moe_permute: tokens is torch\.float64"):
            ml_kernels.moe_permute(fake(4, 8, dtype=torch.float64), indices)
        with pytest.raises(BackendUnavailableError, match=r"indices \(4, 513\): .*at most 512"):
            ml_kernels.moe_permute(fake(4, 8), torch.empty(4, 513, dtype=torch.int64, device="npu"))
        with pytest.raises(BackendUnavailableError, match=r"fewer than 16777215 of all"):
            ml_kernels.moe_permute(
                fake(2**20, 1), torch.empty(2**20, 16, dtype=torch.int64, device="npu")
            )
        with pytest.raises(BackendUnavailableError, match=r"order is torch\.int64: .*its own"):
            ml_kernels.moe_unpermute(fake(8, 4), order.long())
        with pytest.raises(BackendUnavailableError, match=r"probs is torch\.float64"):
            ml_kernels.moe_unpermute(fake(8, 4), order, fake(4, 2, dtype=torch.float64))
        rows = torch.empty(1024, dtype=torch.int32, device="npu")
        with pytest.raises(BackendUnavailableError, match=r"probs \(1, 1024\): .*at most 512"):
            ml_kernels.moe_unpermute(fake(1024, 4), rows, fake(1, 1024))


def compare_grouped(sizes=(3, 0, 7, 5), dtype=torch.float32, transposed=False, host=False):
    x, weight = random(sum(sizes), 6, dtype=dtype), random(len(sizes), 6, 4, dtype=dtype, seed=1)
    if transposed:
        weight = random(len(sizes), 4, 6, dtype=dtype, seed=1)
    sizes = torch.tensor(sizes)

    def function(x, weight, *on_device):
        matrices = weight.transpose(1, 2) if transposed else weight
        return ml_kernels.grouped_matmul(x, matrices, sizes if host else on_device[0])

    compare(function, x, weight, *(() if host else (sizes,)))


@pytest.mark.parametrize("host", [False, True], ids=["sizes_on_npu", "sizes_on_host"])
@pytest.mark.parametrize("transposed", [False, True], ids=["matrices", "transposed_views"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_grouped_matmul_agrees_with_the_reference(dtype, transposed, host):
    with recorded_calls() as calls:
        compare_grouped(dtype=dtype, transposed=transposed, host=host)
    assert [name for name, _ in calls] == ["npu_grouped_matmul"] * 3
    assert [arguments["group_type"] for _, arguments in calls] == [0, 0, 2]


def test_grouped_matmul_fits_the_schema_and_has_our_derivative():
    with fake_npu(), recorded_calls() as calls:
        x = fake(20, 8, dtype=torch.bfloat16, requires_grad=True)
        weight = fake(4, 8, 16, dtype=torch.bfloat16, requires_grad=True)
        sizes = torch.empty(4, dtype=torch.int64, device="npu")
        out = ml_kernels.grouped_matmul(x, weight, sizes)
        out.sum().backward()
    assert (out.shape, out.dtype, out.device.type) == ((20, 16), torch.bfloat16, "npu")
    assert (x.grad.shape, weight.grad.shape) == (x.shape, weight.shape)
    assert len(calls) == 3


@pytest.mark.parametrize("sizes", [(6,), (0, 0, 0)], ids=["one_group", "no_rows"])
def test_one_group_and_no_rows_call_no_kernel(sizes):
    with recorded_calls() as calls:
        compare_grouped(sizes)
    assert calls == []


@pytest.mark.parametrize(
    "change",
    [
        lambda given: {"group_list_type": 0},
        lambda given: {"group_list": given["group_list"].flip(0)},
        lambda given: {"weight": [w.flip(0) for w in given["weight"]]},
        lambda given: {
            "weight": [w.transpose(1, 2).reshape(w.shape) if w.dim() == 3 else w
                       for w in given["weight"]]
        },
        lambda given: {"x": [x.contiguous() for x in given["x"]]},
        lambda given: {"split_item": 0},
        lambda given: {"group_type": 0},
    ],
    ids=[
        "sizes_taken_for_ends",
        "sizes_of_other_groups",
        "matrices_of_other_groups",
        "matrices_transposed",
        "transposed_copy",
        "several_outputs",
        "never_summed",
    ],
)  # fmt: skip
def test_a_wrong_grouped_product_is_noticed(change):
    with mutated("npu_grouped_matmul", change), pytest.raises((AssertionError, RuntimeError)):
        compare_grouped()


def test_grouped_products_outside_the_documented_limits_are_refused():
    with fake_npu():
        sizes = torch.empty(1025, dtype=torch.int64, device="npu")
        x, weight = fake(4, 8, dtype=torch.float64), fake(2, 8, 4, dtype=torch.float64)
        with pytest.raises(BackendUnavailableError, match=r"x is torch\.float64"):
            ml_kernels.grouped_matmul(x, weight, sizes[:2])
        with pytest.raises(BackendUnavailableError, match=r"weight \(1025, 8, 4\): .*at most 1024"):
            ml_kernels.grouped_matmul(fake(4, 8), fake(1025, 8, 4), sizes)
        with pytest.raises(BackendUnavailableError, match="widths below 65536"):
            ml_kernels.grouped_matmul(fake(4, 8), fake(2, 8, 65536), sizes[:2])
