"""The backward pass written for bfloat16 on a CPU, over several blocks of queries."""

from __future__ import annotations

import pytest
import torch

from ml_kernels import fused
from ml_kernels.cpu import attention
from ml_kernels.dispatch import implementation


def inputs(dtype, *, positions=300, batch=2, heads=6, groups=2, width=16, size=1.0):
    generator = torch.Generator().manual_seed(0)
    sizes = (heads, groups, groups, heads)
    return [
        (torch.randn(positions, batch, n, width, generator=generator) * size).to(dtype)
        for n in sizes
    ]


def gradients(function, query, key, value, upstream, scale=0.25):
    leaves = [t.detach().requires_grad_() for t in (query, key, value)]
    out = function(*leaves, scale)
    return out.detach(), torch.autograd.grad(out, leaves, upstream)


def torchs_own(query, key, value, scale):
    return fused.dot_product_attention(query, key, value, True, scale, 0.0)


def relative_errors(found, expected):
    return [float((f.double() - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True)]


@pytest.mark.parametrize("groups", [6, 2, 1])
def test_blocks_of_queries_give_the_gradients_of_the_formula(groups):
    given = inputs(torch.float32, groups=groups)
    out, found = gradients(attention.causal_attention, *given)
    expected_out, expected = gradients(torchs_own, *(t.double() for t in given))
    assert max(relative_errors([out, *found], [expected_out, *expected])) < 1e-6


@pytest.mark.parametrize("size", [1.0, 3.0])
def test_large_bfloat16_scores_cost_no_more_accuracy_than_in_torch(size):
    given = inputs(torch.bfloat16, size=size)
    _, expected = gradients(torchs_own, *(t.double() for t in given))
    torchs = relative_errors(gradients(torchs_own, *given)[1], expected)
    ours = relative_errors(gradients(attention.causal_attention, *given)[1], expected)
    assert max(ours) < 1.5 * max(torchs)


def test_tensors_that_are_views_of_one_projection_are_accepted():
    width = 16
    mixed = torch.cat(inputs(torch.float32)[:3], dim=2)  # (S, B, heads + 2 groups, D)
    query, key, value = mixed.split([6, 2, 2], dim=2)
    upstream = torch.ones(300, 6, 2, width).transpose(1, 2)
    _, found = gradients(attention.causal_attention, query, key, value, upstream)
    _, expected = gradients(torchs_own, query.double(), key.double(), value.double(), upstream)
    assert max(relative_errors(found, expected)) < 1e-6


def test_a_future_score_however_large_changes_nothing():
    query, key, value, upstream = inputs(torch.bfloat16, positions=8, groups=6)
    query[:4], key[4:] = 1e3, 1e3
    upstream[4:] = 0
    _, (of_query, of_key, of_value) = gradients(
        attention.causal_attention, query, key, value, upstream
    )
    assert of_query.isfinite().all()
    assert not of_key[4:].any()
    assert not of_value[4:].any()


def test_it_is_used_where_it_is_faster_only(monkeypatch):
    calls = []
    monkeypatch.setattr(attention, "causal_attention", lambda *given: calls.append(given))
    monkeypatch.setattr(attention, "_multiplies_bfloat16", lambda: True)
    query, key, value, _ = inputs(torch.bfloat16, positions=4)
    attend = implementation("attention", query)
    attend(query, key, value, True, 0.25, 0.0)
    assert len(calls) == 1
    attend(query[:1], key, value, True, 0.25, 0.0)
    attend(query, key, value, False, 0.25, 0.0)
    attend(query, key, value, True, 0.25, 0.5)
    attend(query.float(), key.float(), value.float(), True, 0.25, 0.0)
    assert len(calls) == 1
