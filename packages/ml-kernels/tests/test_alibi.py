"""ALiBi against transformers' Bloom."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_near, random, runs
from torch.nn import functional as F
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from ml_kernels import alibi_bias, alibi_slopes, flash_attention


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 12, 32, 40, 71, 112])
def test_slopes_and_the_row_form_are_those_of_bloom(heads):
    positions = build_alibi_tensor(torch.ones(1, 9), heads, torch.float32)  # (N, 1, 9)
    slopes = alibi_slopes(heads)
    assert slopes.dtype == torch.float32
    torch.testing.assert_close(slopes, positions[:, 0, 1])
    torch.testing.assert_close(alibi_bias(slopes, 4, 9, form="row"), positions)


@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (2, 5), (5, 2), (1, 3), (0, 2)])
def test_the_square_form_counts_from_the_query(queries, keys):
    slopes = torch.tensor([1.0, 0.5])
    bias = alibi_bias(slopes, queries, keys, form="square")
    filled = alibi_bias(slopes, queries, keys, form="square", fill_neg_inf=True)
    assert bias.shape == (2, queries, keys)
    for i in range(queries):
        for j in range(keys):
            distance = j - (i + keys - queries)
            assert bias[:, i, j].tolist() == [distance, distance / 2]
            assert torch.equal(filled[:, i, j] == float("-inf"), torch.tensor([distance > 0] * 2))
    seen = filled > float("-inf")
    assert torch.equal(filled[seen], bias[seen])


@pytest.mark.parametrize("form", ["row", "square"])
@pytest.mark.parametrize(("device", "backend"), runs("flash_attention"))
def test_attention_with_slopes_is_attention_with_the_bias(device, backend, form):
    query, key, value = (random(2, 6, 7, 8, seed=s, device=device) for s in range(3))
    slopes = alibi_slopes(6).to(device)
    filled = alibi_bias(slopes, 7, 7, form="square", fill_neg_inf=True)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=filled[None])
    options = {"alibi_slopes": slopes, "alibi_form": form, "causal": True, "backend": backend}
    assert_near([flash_attention(query, key, value, layout="BNSD", **options)], [expected])


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="alibi_slopes: num_heads 0: must be positive"):
        alibi_slopes(0)
    with pytest.raises(ValueError, match="alibi_bias: form 'line': must be 'row' or 'square'"):
        alibi_bias(torch.ones(2), 3, 3, form="line")
    with pytest.raises(ValueError, match="alibi_bias: fill_neg_inf True: needs form='square'"):
        alibi_bias(torch.ones(2), 3, 3, form="row", fill_neg_inf=True)
    with pytest.raises(ValueError, match=r"alibi_bias: slopes \(2, 1\): must be \(heads,\)"):
        alibi_bias(torch.ones(2, 1), 3, 3, form="row")
    with pytest.raises(TypeError, match=r"alibi_bias: slopes is a list: must be a tensor"):
        alibi_bias([0.5], 3, 3, form="row")
    with pytest.raises(TypeError, match=r"alibi_slopes: num_heads 2\.0: must be an int"):
        alibi_slopes(2.0)


@pytest.mark.parametrize("form", ["row", "square"])
def test_float64_slopes_give_a_float64_bias(form):
    slopes = torch.tensor([1 / 3, 1 / 7], dtype=torch.float64)
    positions = torch.arange(1000, dtype=torch.float64)
    if form == "square":
        positions = positions - positions[:, None]
    bias = alibi_bias(slopes, 1000, 1000, form=form)
    assert torch.equal(bias, (slopes[:, None, None] * positions).view(bias.shape))
