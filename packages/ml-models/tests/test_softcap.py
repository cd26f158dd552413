"""Soft-capped attention is its formula, whatever the blocks, and keeps no matrix of scores."""

from __future__ import annotations

import pytest
import torch

from ml_models import softcap
from ml_models.softcap import soft_capped_attention

CAP = 1.5


def tensors(queries, keys, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (queries, 2, 4, 6), (keys, 2, 2, 6), (keys, 2, 2, 6)
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def formula(query, key, value, window, scale):
    key, value = (x.repeat_interleave(2, 2) for x in (key, value))
    scores = torch.einsum("qbnd,kbnd->bnqk", query, key) * scale
    position = torch.arange(len(key) - len(query), len(key))[:, None]
    behind = position - torch.arange(len(key))
    hidden = (behind < 0) | (behind >= (window or len(key)))
    scores = (CAP * torch.tanh(scores / CAP)).masked_fill(hidden, float("-inf"))
    return torch.einsum("bnqk,kbnd->qbnd", scores.softmax(-1), value)


@pytest.mark.parametrize("window", [None, 1, 9, 40])
@pytest.mark.parametrize(("queries", "keys"), [(37, 37), (5, 37), (1, 37)])
def test_outputs_and_gradients_are_those_of_the_formula(monkeypatch, window, queries, keys):
    monkeypatch.setattr(softcap, "_BLOCK", 8)
    given = tensors(queries, keys)
    found = soft_capped_attention(*given, cap=CAP, window=window, scale=0.9)
    expected = formula(*given, window, 0.9)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(found.shape, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, given, upstream)
    torch.testing.assert_close(torch.autograd.grad(found, given, upstream), wanted)


def test_the_scale_is_that_of_all_attention_and_the_dtype_that_of_the_query():
    given = tensors(6, 6)
    found = soft_capped_attention(*given, cap=CAP)
    torch.testing.assert_close(found, formula(*given, None, 6**-0.5))
    halves = [x.bfloat16() for x in given]
    assert soft_capped_attention(*halves, cap=CAP).dtype == torch.bfloat16


def test_dropout_is_the_same_when_a_block_is_computed_again(monkeypatch):
    monkeypatch.setattr(softcap, "_BLOCK", 8)
    query, key, value = tensors(20, 20)
    torch.manual_seed(3)
    found = soft_capped_attention(query, key, value, cap=CAP, dropout_p=0.5)
    # The output is linear in the values, so their gradient knows the weights that were used.
    (gradient,) = torch.autograd.grad(found.sum(), value, retain_graph=True)
    torch.testing.assert_close((gradient * value).sum(), found.sum())
    torch.manual_seed(4)
    assert not torch.equal(found, soft_capped_attention(query, key, value, cap=CAP, dropout_p=0.5))


def test_no_scores_are_kept_for_the_gradients():
    kept = []
    length = 512
    given = tensors(length, length, torch.float32)

    def note(x):
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        soft_capped_attention(*given, cap=CAP)
    assert sum(kept) < length * length
