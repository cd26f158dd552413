"""The softmax of scaled and masked scores, on every implementation that runs here."""

from __future__ import annotations

import pytest
import torch
from oracle import runs

import ml_kernels

RUNS = runs("scaled_masked_softmax")
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""Of a probability: half a unit in the last place of a number below 1."""
B, N, SQ, SK = 2, 3, 32, 64  # sizes that every device's kernel takes


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def draw_mask(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(5)) < 0.4


def formula(x, mask, scale):
    shown = (x * scale).exp() * ~mask
    return shown / shown.sum(-1, keepdim=True).clamp(min=1e-300)


def assert_matches(device, backend, x, mask, scale):
    upstream = draw(*x.shape, seed=9, dtype=x.dtype)
    exact = x.double().requires_grad_()
    expected = formula(exact, torch.tensor(False) if mask is None else mask, scale)
    expected.backward(upstream.double())
    leaf = x.detach().to(device).requires_grad_()
    on_device = None if mask is None else mask.to(device)
    found = ml_kernels.scaled_masked_softmax(leaf, on_device, scale=scale, backend=backend)
    found.backward(upstream.to(device))
    assert found.dtype == x.dtype
    assert leaf.grad.dtype == x.dtype
    tolerance = ROUNDING[x.dtype]
    torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(leaf.grad.cpu().double(), exact.grad, rtol=0, atol=8 * tolerance)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("scale", [1.0, 0.125, 2.5])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_probabilities_and_gradients_match_the_formula(device, backend, scale, dtype):
    assert_matches(device, backend, draw(B, N, SQ, SK, dtype=dtype), draw_mask(B, N, SQ, SK), scale)


@pytest.mark.parametrize("shape", [(B, 1, SQ, SK), (1, 1, SQ, SK), (SQ, SK), (1, N, 1, SK), (SK,)])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_the_mask_is_broadcast(device, backend, shape):
    assert_matches(device, backend, draw(B, N, SQ, SK), draw_mask(*shape), 0.5)


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_it_works_without_a_mask(device, backend):
    assert_matches(device, backend, draw(B, N, SQ, SK), None, 0.5)


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_a_row_whose_keys_are_all_hidden_is_zero_and_has_no_gradient(device, backend):
    x = draw(B, N, SQ, SK).to(device).requires_grad_()
    mask = draw_mask(B, 1, SQ, SK)
    mask[1, :, 7] = True
    found = ml_kernels.scaled_masked_softmax(x, mask.to(device), scale=3.0, backend=backend)
    (found * draw(B, N, SQ, SK).to(device)).sum().backward()
    assert not found[1, :, 7].any()
    assert not x.grad[1, :, 7].any()
    torch.testing.assert_close(found.sum(-1)[0], torch.ones(N, SQ, device=device))
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_hidden_scores_do_not_matter_however_large(device, backend):
    x, mask = draw(B, N, SQ, SK).to(device), draw_mask(B, N, SQ, SK).to(device)
    mask[..., 0] = False
    found, same = (
        ml_kernels.scaled_masked_softmax(scores, mask, backend=backend)
        for scores in (x, x.masked_fill(mask, 1e30))
    )
    torch.testing.assert_close(found, same, rtol=0, atol=0)


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_visible_scores_count_however_low(device, backend):
    x, mask = draw(B, N, SQ, SK).to(device), draw_mask(B, N, SQ, SK).to(device)
    found, same = (
        ml_kernels.scaled_masked_softmax(scores, mask, backend=backend)
        for scores in (x, (x - 2**14).masked_fill(mask, 0))
    )
    torch.testing.assert_close(found, same, rtol=0, atol=2e-3)  # x - 2^14 is rounded to 2^-10


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_empty_batches_and_views_are_accepted(device, backend):
    empty = torch.zeros(0, N, SQ, SK, device=device, requires_grad=True)
    found = ml_kernels.scaled_masked_softmax(empty, None, backend=backend)
    found.sum().backward()
    assert found.shape == empty.grad.shape == empty.shape
    view = draw(SK, SQ, N, B).permute(3, 2, 1, 0)
    assert_matches(device, backend, view, draw_mask(SK, SQ).t(), 1.0)


def test_the_gradients_are_those_of_the_function():
    x, mask = draw(1, 2, 3, 4, dtype=torch.float64).requires_grad_(), draw_mask(3, 4)
    mask[1] = True
    assert torch.autograd.gradcheck(
        lambda x: ml_kernels.scaled_masked_softmax(x, mask, scale=0.7), (x,)
    )


@pytest.mark.parametrize(
    ("x", "mask", "error", "message"),
    [
        (draw(3, 4, 5), None, ValueError, r"x \(3, 4, 5\): must be \(B, N, Sq, Sk\)"),
        (draw(1, 2, 3, 4).long(), None, TypeError, "x is torch.int64"),
        (draw(1, 2, 3, 4), torch.zeros(3, 4), TypeError, "mask is torch.float32: must be .*bool"),
        (draw(1, 2, 3, 4), draw_mask(3, 3), ValueError, r"mask \(3, 3\): must be broadcastable"),
        (draw(1, 2, 3, 4), draw_mask(2, 1, 3, 4), ValueError, r"mask \(2, 1, 3, 4\)"),
        (draw(1, 2, 3, 4), draw_mask(1, 1, 2, 3, 4), ValueError, r"mask \(1, 1, 2, 3, 4\)"),
        (draw(1, 2, 3, 4), draw_mask(3, 4).to("meta"), ValueError, "mask is on meta"),
        (draw(1, 2, 3, 4), [[True]], TypeError, "mask is a list: must be a tensor"),
    ],
)
def test_wrong_arguments_are_named(x, mask, error, message):
    with pytest.raises(error, match=f"scaled_masked_softmax: {message}"):
        ml_kernels.scaled_masked_softmax(x, mask)


@pytest.mark.parametrize("scale", [float("inf"), float("nan")])
def test_a_scale_that_is_not_finite_is_refused(scale):
    with pytest.raises(ValueError, match=f"scaled_masked_softmax: scale {scale}: must be finite"):
        ml_kernels.scaled_masked_softmax(draw(1, 2, 3, 4), None, scale=scale)
