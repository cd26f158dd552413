"""flash_attention against its formula in float64, torch and transformers.

Shapes: `(B, N, S, D)`.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from attention_formula import COMPILES_FLEX, LENGTHS, SEEN, formula, on, output_of, sized, tensors
from oracle import ROUNDING, assert_matches, assert_near, random, runs
from torch.nn import functional as F
from transformers import masking_utils
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from ml_kernels import flash_attention

pytestmark = COMPILES_FLEX
RUNS = runs("flash_attention")
DTYPES = list(ROUNDING)


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_it_matches_its_formula(device, backend, lengths, seen):
    options = sized(SEEN[seen], *LENGTHS[lengths])
    assert_matches(
        lambda q, k, v: flash_attention(
            q, k, v, layout="BNSD", backend=backend, **on(device, options)
        ),
        output_of(options),
        tensors(*LENGTHS[lengths], device=device),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seen", ["full", "causal", "everything"])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_it_matches_its_formula_in_every_dtype(device, backend, seen, dtype):
    assert_matches(
        lambda q, k, v: flash_attention(
            q, k, v, layout="BNSD", backend=backend, **on(device, SEEN[seen])
        ),
        output_of(SEEN[seen]),
        tensors(dtype=dtype, device=device),
    )


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_a_group_of_keys_serves_several_heads(device, backend, groups):
    assert_matches(
        lambda q, k, v: flash_attention(q, k, v, layout="BNSD", causal=True, backend=backend),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        tensors(9, 9, groups=groups, width=8, value_width=8, device=device),
    )


@pytest.mark.parametrize("seen", ["full", "causal", "window", "masked", "slopes in a window"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_sinks_take_part_in_the_softmax_and_learn(device, backend, lengths, seen):
    options = sized(SEEN[seen], *LENGTHS[lengths])
    assert_matches(
        lambda q, k, v, sinks: flash_attention(
            q, k, v, layout="BNSD", backend=backend, sinks=sinks, **on(device, options)
        ),
        output_of(options),
        [*tensors(*LENGTHS[lengths], device=device), random(4, seed=3, device=device)],
    )


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_sinks_are_those_of_gpt_oss(device, backend):
    query, key, value = tensors(device=device)
    sinks = random(4, seed=3, device=device)
    module = SimpleNamespace(num_key_value_groups=2, sinks=sinks, training=False)
    future = torch.full((5, 5), float("-inf"), device=device).triu(1)
    expected, _ = eager_attention_forward(module, query, key, value, future, scaling=0.5)
    out = flash_attention(
        query, key, value, layout="BNSD", causal=True, sinks=sinks, scale=0.5, backend=backend
    )
    assert_near([out], [expected.transpose(1, 2)])


@pytest.mark.parametrize("seen", ["causal", "window", "everything", "square slopes"])
def test_the_reference_passes_gradcheck(seen):
    inputs = tensors(3, 5, batch=1, width=2, value_width=3, dtype=torch.float64)
    options = sized(SEEN[seen], 3, 5)
    options.update({k: v[:1] for k, v in options.items() if k == "mask"})
    sinks = random(4, dtype=torch.float64)
    for more in ([], [sinks]):
        assert torch.autograd.gradcheck(
            lambda q, k, v, *s: flash_attention(
                q, k, v, layout="BNSD", backend="reference", sinks=s[0] if s else None, **options
            ),
            [*inputs, *more],
        )


# What is hidden.


def weights_of(queries, keys, backend, device, **options):
    """Return the matrix of weights: what comes out when the values are a unit matrix."""
    query, key, _ = tensors(queries, keys, batch=1, heads=1, groups=1, width=keys, device=device)
    value = torch.eye(keys, device=device)[None, None]
    return flash_attention(query, key, value, layout="BNSD", backend=backend, **options)[0, 0]


@pytest.mark.parametrize("window", [1, 2, 7, 16, 20])
@pytest.mark.parametrize("queries", [1, 3, 16])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_a_window_is_that_of_hugging_face(device, backend, queries, window):
    keys = 16
    weights = weights_of(queries, keys, backend, device, causal=True, window=window)
    visible = masking_utils.sdpa_mask(
        batch_size=1,
        q_length=queries,
        kv_length=keys,
        q_offset=keys - queries,
        mask_function=masking_utils.sliding_window_causal_mask_function(window),
        allow_is_causal_skip=False,
    )
    assert torch.equal(weights.cpu() > 0, visible[0, 0])


@pytest.mark.parametrize(
    "shape", [(), (5,), (5, 5), (4, 1, 1), (2, 1, 1, 5), (2, 4, 5, 5), (1, 4, 5, 1)]
)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_a_mask_of_any_shape_that_broadcasts_is_taken(device, backend, causal, shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(7)) < 0.5
    inputs = tensors(device=device)
    options = {"layout": "BNSD", "causal": causal, "backend": backend}
    out = flash_attention(*inputs, mask=mask.to(device), **options)
    full = mask.expand(2, 4, 5, 5)
    assert_near([out], output_of({"mask": full, "causal": causal})(*inputs)[None])


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_the_log_sum_exp_is_that_of_the_visible_scores(device, backend, lengths, seen):
    inputs = tensors(*LENGTHS[lengths], device=device)
    options = sized(SEEN[seen], *LENGTHS[lengths])
    out, lse = flash_attention(
        *inputs, layout="BNSD", return_lse=True, backend=backend, **on(device, options)
    )
    expected, expected_lse = formula(options)(*(t.detach().cpu().double() for t in inputs))
    assert lse.dtype == torch.float32
    assert not lse.requires_grad
    assert_near([out], [expected])
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("seen", ["causal", "square slopes"])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_autocast_does_not_make_it_coarser(device, backend, seen):
    inputs = tensors(device=device)
    options = {"layout": "BNSD", "return_lse": True, "backend": backend, **on(device, SEEN[seen])}
    expected = flash_attention(*inputs, **options)
    with torch.autocast(device, torch.bfloat16):
        found = flash_attention(*inputs, **options)
    assert [t.dtype for t in found] == [torch.float32] * 2
    assert_near(found, expected)


@pytest.mark.parametrize("more", [{}, {"return_lse": True}, {"sinks": torch.ones(4)}])
@pytest.mark.parametrize(
    "hidden",
    [
        {"mask": torch.ones(5, 5).triu(-2).bool()},
        {"mask": torch.ones(5, 5).triu(-2).bool(), "causal": True},
        {"keys": 3, "causal": True},
    ],
)
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_a_query_without_keys_gives_zero_and_no_gradient(device, backend, hidden, more):
    blind = 2 if "keys" in hidden else 3
    inputs = tensors(keys=hidden.get("keys", 5), device=device)
    seen = {key: value for key, value in hidden.items() if key != "keys"}
    result = flash_attention(
        *inputs, layout="BNSD", backend=backend, **on(device, {**seen, **more})
    )
    out, *lse = result if isinstance(result, tuple) else (result,)
    gradients = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert not out[:, :, :blind].any()
    assert out[:, :, blind:].any(-1).all()
    assert not gradients[0][:, :, :blind].any()
    assert all(t.isfinite().all() for t in (out, *gradients))
    for logs in lse:
        assert torch.equal(
            logs == float("-inf"), (torch.arange(5) < blind).to(device).expand(2, 4, 5)
        )


# Dropout.


@pytest.mark.parametrize("seen", ["full", "causal", "window", "masked", "row slopes"])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_dropped_weights_leave_the_mean_as_it_was(device, backend, seen):
    torch.manual_seed(0)
    options = {**on(device, SEEN[seen]), "layout": "BNSD", "dropout_p": 0.25, "backend": backend}
    query, key = (t.detach() for t in tensors(64, 64, device=device)[:2])
    if "mask" in options:
        options["mask"] = (random(2, 1, 64, 64, seed=3) < 0.2).to(device)
    out = flash_attention(query, key, torch.ones(2, 2, 64, 4, device=device), **options)
    assert out.std() > 0.05
    assert abs(float(out.mean()) - 1.0) < 0.05


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_dropped_weight_has_no_gradient(backend):
    torch.manual_seed(0)
    query, key, _ = tensors(8, 8, batch=1, heads=1, groups=1)
    value = torch.eye(8)[None, None].requires_grad_()
    out = flash_attention(query, key, value, layout="BNSD", dropout_p=0.5, backend=backend)
    (of_value,) = torch.autograd.grad(out[0, 0].diagonal().sum(), value)
    # The diagonal of the weights: where it was dropped, its value does not matter.
    assert torch.equal(of_value[0, 0].diagonal() == 0, out[0, 0].diagonal() == 0)
    assert (out == 0).any()
    assert (out != 0).any()
