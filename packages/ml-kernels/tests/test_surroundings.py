"""Operators do not depend on what a program has set around them."""

from __future__ import annotations

import pytest
import torch
from operator_calls import calls
from oracle import with_gradients
from torch._subclasses.fake_tensor import FakeTensorMode

import ml_kernels


@pytest.mark.parametrize("name", calls())
def test_the_default_device_is_none_of_their_business(name):
    inputs, call = calls()[name]
    expected = with_gradients(call, inputs)
    with torch.device("meta"):
        found = call(*inputs)
    found = found if isinstance(found, tuple) else (found,)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", calls())
def test_neither_is_the_default_dtype(name, dtype):
    inputs, call = calls()[name]
    expected = with_gradients(call, inputs)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = call(*inputs)
    finally:
        torch.set_default_dtype(before)
    found = found if isinstance(found, tuple) else (found,)
    assert [t.dtype for t in found] == [t.dtype for t in expected[: len(found)]]
    assert all(map(torch.equal, found, expected))


def test_bfloat16_attention_is_causal_whatever_the_default_device():
    query = torch.randn(1, 300, 2, 16).bfloat16()
    options = {"layout": "BSND", "causal": True}
    expected = ml_kernels.flash_attention(query, query, query, **options)
    with torch.device("meta"):
        found = ml_kernels.flash_attention(query, query, query, **options)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["flash_attention", "rotary_embedding"])
def test_autocast_to_the_other_half_precision_changes_nothing(name, autocast):
    dtype = torch.bfloat16 if autocast == torch.float16 else torch.float16
    x = torch.randn(1, 300, 4, 64).to(dtype)

    def call():
        if name == "flash_attention":
            return ml_kernels.flash_attention(x, x, x, layout="BSND", causal=True)
        angles = torch.randn(1, 300, 1, 32).repeat(1, 1, 1, 2)
        return ml_kernels.rotary_embedding(x, angles)

    torch.manual_seed(0)
    expected = call()
    torch.manual_seed(0)
    with torch.autocast("cpu", autocast):
        assert torch.equal(call(), expected)


def test_fake_tensors_have_no_values_to_be_checked():
    with FakeTensorMode():
        x, index = torch.randn(4, 8), torch.zeros(4, dtype=torch.int64)
        assert ml_kernels.cross_entropy(x, index).shape == (4,)
        assert ml_kernels.linear_cross_entropy(x, torch.randn(11, 8), index).shape == ()
        copies, order = ml_kernels.moe_permute(x, index[:, None])
        assert ml_kernels.moe_unpermute(copies, order).shape == (4, 8)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's
@pytest.mark.parametrize("name", [name for name in calls() if name != "grouped_matmul"])
def test_a_model_that_is_compiled_is_one_graph(name):
    """But for grouped_matmul, whose rows are cut by the values of a tensor that no graph knows."""
    inputs, call = calls()[name]
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found, expected = with_gradients(compiled, inputs), with_gradients(call, inputs)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_bfloat16_attention_is_one_graph():
    query = torch.randn(1, 300, 2, 16).bfloat16()
    torch.compiler.reset()

    def call(query):
        return ml_kernels.flash_attention(query, query, query, layout="BSND", causal=True)

    found = torch.compile(call, fullgraph=True, backend="aot_eager")(query)
    torch.testing.assert_close(found, call(query), rtol=2e-2, atol=2e-2)


def test_a_step_of_the_optimizer_is_one_graph():
    given = [torch.randn(8), torch.randn(8), torch.zeros(8), torch.zeros(8)]
    expected = [[t.clone()] for t in given]
    found = [[t.clone()] for t in given]
    torch.compiler.reset()

    def step(p, g, m, v):
        ml_kernels.adamw(p, g, m, v, step=1, lr=0.1)

    step(*expected)
    torch.compile(step, fullgraph=True, backend="aot_eager")(*found)
    torch.testing.assert_close(found, expected)
