"""Permutations and grouped products against formulas in float64; a layer against transformers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import ROUNDING, assert_matches, assert_near, kept_by, random, runs, with_gradients
from torch.nn import functional as F
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import ml_kernels
from ml_kernels import moe
from ml_kernels.cuda import moe as cuda
from ml_kernels.grouped import grouped_product

PERMUTATIONS = {
    "reference": (moe.moe_permute_reference, moe.moe_unpermute_reference),
    "cuda": (cuda.moe_permute, cuda.moe_unpermute),  # plain torch: it runs anywhere
}


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
    with pytest.raises(TypeError, match=r"indices is a list: must be a tensor"):
        ml_kernels.moe_permute(x, [[0], [1], [2], [3]])
    with pytest.raises(ValueError, match=r"indices -1: must not be negative"):
        ml_kernels.moe_permute(x, indices - 1)
    with pytest.raises(ValueError, match=r"order 8: must be below 8, the number of rows"):
        ml_kernels.moe_unpermute(permuted, order + 1)
    with pytest.raises(ValueError, match=r"order -1: must not be negative"):
        ml_kernels.moe_unpermute(permuted, order - 1)
    with pytest.raises(TypeError, match=r"group_sizes is a list: must be a tensor"):
        ml_kernels.grouped_matmul(x, torch.zeros(1, 3, 5), [4])


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


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_only_a_frozen_input_of_grouped_matmul_needs_is_not_kept(frozen):
    inputs = [t.requires_grad_(i != frozen) for i, t in enumerate([random(5, 4), random(2, 4, 3)])]
    kept = kept_by(ml_kernels.grouped_matmul, *inputs, torch.tensor([2, 3]), backend="cpu")
    assert kept == [inputs[frozen].data_ptr()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("device", "backend"), runs("grouped_matmul"))
def test_grouped_matmul_follows_autocast_as_the_linear_layer(device, backend, dtype):
    x = random(9, 8, dtype=dtype, device=device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, sizes = random(2, 8, 16, dtype=wide, seed=1, device=device), torch.tensor([4, 5])
    with torch.autocast(device, torch.bfloat16):
        out = ml_kernels.grouped_matmul(x, weight, sizes, backend=backend)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.bfloat16)
    assert_near([out], [grouped_formula([4, 5])(x.double(), weight.double())])
    out.sum().backward()
    assert (x.grad.dtype, weight.grad.dtype) == (dtype, wide)


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


@pytest.mark.skipif(
    not hasattr(F, "grouped_mm"), reason="this torch has the grouped kernel on a GPU only"
)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_calls_of_torchs_grouped_kernel_keep_its_rules_of_layout(transposed):
    """Meta tensors check strides as a GPU does."""
    bf16 = {"dtype": torch.bfloat16, "device": "meta"}
    x = torch.empty(9, 8, **bf16, requires_grad=True)
    weight = torch.empty(2, *((16, 8) if transposed else (8, 16)), **bf16, requires_grad=True)
    matrices = cuda._aligned_matrices(weight.transpose(1, 2) if transposed else weight)
    assert matrices._is_view() == transposed
    ends = torch.empty(2, dtype=torch.int32, device="meta")
    grouped_product(x, matrices, ends, cuda.FUSED).sum().backward()
    assert (x.grad.shape, weight.grad.shape) == (x.shape, weight.shape)


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
