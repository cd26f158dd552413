"""Parts of the keys, as ring attention has them: their outputs merge, and so do their gradients."""

from __future__ import annotations

import pytest
import torch
from attention_formula import COMPILES_FLEX, LAYOUTS, LENGTHS, formula, tensors, to_layout
from oracle import assert_near, random, runs

from ml_kernels import flash_attention, flash_attention_backward

pytestmark = COMPILES_FLEX
RUNS = runs("flash_attention_backward")


def merged(first, second):
    """Merge the outputs and log-sum-exps of two parts of the keys."""
    (out_1, lse_1), (out_2, lse_2) = first, second
    lse = torch.logaddexp(lse_1, lse_2)
    shares = [(part - lse).exp().nan_to_num()[..., None] for part in (lse_1, lse_2)]
    return shares[0] * out_1 + shares[1] * out_2, lse


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_halves_of_the_keys_merge_to_the_whole(device, backend, dtype, masked):
    query, key, value = inputs = tensors(8, 8, width=8, value_width=8, dtype=dtype, device=device)
    upstream = random(2, 4, 8, 8, seed=9, dtype=dtype, device=device).detach()
    seen = {}
    if masked:
        mask = random(2, 1, 8, 8, seed=5) < -0.3
        mask[0, 0, 2, :4] = mask[0, 0, 3, 4:] = mask[1, 0, 5] = True  # no key in a half, or at all
        seen = {"mask": mask.detach()}
    parts, options = (slice(0, 4), slice(4, 8)), {"layout": "BNSD", "backend": backend}
    options_of = [
        {**options, **{k: v[..., part].to(device) for k, v in seen.items()}} for part in parts
    ]
    with torch.no_grad():
        halves = [
            flash_attention(query, key[:, :, part], value[:, :, part], return_lse=True, **its)
            for part, its in zip(parts, options_of, strict=True)
        ]
    out, lse = merged(*halves)
    out = out.to(dtype)
    found = [
        flash_attention_backward(
            upstream, query, key[:, :, part], value[:, :, part], out, lse, **its
        )
        for part, its in zip(parts, options_of, strict=True)
    ]
    queries, keys, values = zip(*found, strict=True)
    wide = [t.detach().cpu().double().requires_grad_() for t in inputs]
    whole, whole_lse = formula(seen)(*wide)
    expected = torch.autograd.grad(whole, wide, upstream.cpu().double())
    torch.testing.assert_close(lse.cpu().double(), whole_lse.detach(), rtol=1e-4, atol=1e-4)
    assert_near(
        [out, sum(queries), torch.cat(keys, 2), torch.cat(values, 2)], [whole, *expected], dtype
    )


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("layout", [*LAYOUTS, "TND"])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_the_gradients_of_a_part_have_its_layout(device, backend, layout, lengths):
    queries, keys = LENGTHS[lengths]
    width = {} if layout in ("SBH", "BSH") else {"value_width": 6}
    inputs = tensors(queries, keys, batch=1, **width, device=device)
    taken = [to_layout(t, layout).detach().contiguous().requires_grad_() for t in inputs]
    options = {"layout": layout, "causal": True, "backend": backend}
    if layout == "TND":
        options |= {"cu_seqlens_q": (0, 1, queries), "cu_seqlens_k": (0, 2, keys)}
    elif layout[-1] == "H":
        options["num_heads"] = 4
    out, lse = flash_attention(*taken, return_lse=True, **options)
    upstream = random(*out.shape, seed=9).detach().to(device)
    expected = torch.autograd.grad(out, taken, upstream)
    found = flash_attention_backward(upstream, *(t.detach() for t in (*taken, out, lse)), **options)
    assert_near(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_strides_do_not_matter(device, backend, dtype):
    inputs = tensors(8, 8, width=8, value_width=8, dtype=dtype, device=device)
    inputs = [t.detach() for t in inputs]
    options = {"layout": "BNSD", "causal": True, "backend": backend}
    out, lse = flash_attention(*inputs, **options, return_lse=True)
    upstream = random(*out.shape, seed=9, dtype=dtype, device=device).detach()
    expected = flash_attention_backward(upstream, *inputs, out, lse, **options)
    sliced = torch.stack((lse, lse + 1), dim=-1)[..., 0]
    strided = [t.mT.contiguous().mT for t in (upstream, *inputs, out)]
    assert_near(flash_attention_backward(*strided, sliced, **options), expected)


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_autocast_does_not_make_it_coarser(device, backend):
    inputs = [t.detach() for t in tensors(device=device)]
    options = {"layout": "BNSD", "causal": True, "backend": backend}
    out, lse = flash_attention(*inputs, **options, return_lse=True)
    given = random(*out.shape, seed=9, device=device).detach(), *inputs, out, lse
    expected = flash_attention_backward(*given, **options)
    with torch.autocast(device, torch.bfloat16):
        found = flash_attention_backward(*given, **options)
    assert_near(found, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lse": torch.ones(2, 4, 4)}, ValueError, r"lse \(2, 4, 4\): must be \(2, 4, 5\)"),
        ({"lse": torch.ones(2, 4, 5).half()}, TypeError, "lse is torch.float16: must be float32"),
        (
            {"out": torch.ones(2, 4, 5, 5)},
            ValueError,
            r"out \(2, 4, 5, 5\): must be \(2, 4, 5, 4\)",
        ),
        ({"gradient": torch.ones(2, 4, 5, 4).half()}, TypeError, "gradient is torch.float16"),
        ({"key": torch.ones(2, 3, 5, 4)}, ValueError, r"value .*: must have the batch"),
        ({"query": torch.ones(2, 4, 5, 4).int()}, TypeError, "query is torch.int32"),
    ],
)
def test_the_backward_pass_checks_what_it_is_given(change, error, message):
    query, key, value = (t.detach() for t in tensors())
    known = {"query": query, "key": key, "value": value, "gradient": query, "out": query}
    known |= {"lse": torch.ones(2, 4, 5)} | change
    with pytest.raises(error, match=f"^flash_attention_backward: {message}"):
        flash_attention_backward(**known, layout="BNSD")
