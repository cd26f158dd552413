"""Every operator against the formula in float64, on every implementation that runs here."""

from __future__ import annotations

import pytest
import torch

import ml_kernels
from ml_kernels.dispatch import IMPLEMENTATIONS, BackendUnavailableError, implementation

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def backends(operator):
    return sorted(b for o, b in IMPLEMENTATIONS if o == operator and b in ("reference", "cpu"))


def random(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()


def assert_close_with_gradients(operator, formula, inputs, dtype):
    """Compare outputs and the gradients of all inputs with the formula in float64."""
    wide = [t.detach().double().requires_grad_() for t in inputs]
    expected, found = formula(*wide), operator(*inputs)
    assert found.dtype == inputs[0].dtype
    upstream = random(*expected.shape, seed=9).detach()
    expected.backward(upstream.double())
    found.backward(upstream.to(found.dtype))
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    for tensor, reference in zip(inputs, wide, strict=True):
        scale = max(1.0, float(reference.grad.abs().max()))
        torch.testing.assert_close(
            tensor.grad.double() / scale, reference.grad / scale, rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", backends("rms_norm"))
def test_rms_norm_matches_its_formula(backend, dtype):
    def formula(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    inputs = [random(7, 2, 48, dtype=dtype), random(48, dtype=dtype, seed=1)]
    assert_close_with_gradients(
        lambda x, w: ml_kernels.rms_norm(x, w, eps=1e-5, backend=backend), formula, inputs, dtype
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", backends("layer_norm"))
def test_layer_norm_matches_its_formula(backend, dtype):
    def formula(x, weight, bias):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias

    inputs = [random(5, 2, 48, dtype=dtype), *(random(48, dtype=dtype, seed=s) for s in (1, 2))]
    assert_close_with_gradients(
        lambda *args: ml_kernels.layer_norm(*args, eps=1e-5, backend=backend),
        formula,
        inputs,
        dtype,
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", backends("swiglu"))
def test_swiglu_takes_the_gate_from_the_first_half(backend, dtype):
    def formula(x):
        gate, up = x[..., :24], x[..., 24:]
        return gate / (1 + (-gate).exp()) * up

    assert_close_with_gradients(
        lambda x: ml_kernels.swiglu(x, backend=backend),
        formula,
        [random(6, 2, 48, dtype=dtype)],
        dtype,
    )


@pytest.mark.parametrize("width", [16, 8])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("backend", backends("rotary"))
def test_rotary_turns_pairs_of_channels_as_complex_numbers(backend, interleaved, width):
    positions, head = 6, 16
    frequencies = 1.0 / 10000 ** (torch.arange(0, width, 2) / width)
    angles = torch.arange(positions)[:, None] * frequencies  # (S, R / 2)
    repeated = angles.repeat_interleave(2, -1) if interleaved else angles.repeat(1, 2)

    def formula(x):
        turned, passed = x[..., :width], x[..., width:]
        first, second = (
            (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
        )
        turn = torch.polar(torch.ones_like(angles), angles)[:, None, None].to(torch.complex128)
        result = torch.complex(first, second) * turn
        parts = (result.real, result.imag)
        joined = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
        return torch.cat((joined, passed), -1)

    assert_close_with_gradients(
        lambda x: ml_kernels.apply_rotary(
            x, repeated[:, None, None], interleaved=interleaved, backend=backend
        ),
        formula,
        [random(positions, 2, 3, head)],
        torch.float32,
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (1, 9), (4, 9)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("backend", backends("attention"))
def test_attention_matches_its_formula(backend, groups, causal, queries, keys, dtype):
    heads, head = 4, 8

    def formula(q, k, v):
        out = torch.zeros(queries, 2, heads, head, dtype=torch.float64)
        for batch in range(2):
            for n in range(heads):
                g = n // (heads // groups)
                for i in range(queries):
                    last = i + keys - queries + 1 if causal else keys
                    scores = k[:last, batch, g] @ q[i, batch, n] / head**0.5
                    out[i, batch, n] = torch.softmax(scores, 0) @ v[:last, batch, g]
        return out

    inputs = [random(queries, 2, heads, head, dtype=dtype)]
    inputs += [random(keys, 2, groups, head, dtype=dtype, seed=s) for s in (1, 2)]
    assert_close_with_gradients(
        lambda q, k, v: ml_kernels.dot_product_attention(q, k, v, causal=causal, backend=backend),
        formula,
        inputs,
        dtype,
    )


@pytest.mark.parametrize("backend", backends("attention"))
def test_attention_drops_weights_and_keeps_their_mean(backend):
    torch.manual_seed(0)
    q, k = (random(64, 1, 4, 8, seed=seed).detach() for seed in (0, 1))
    ones = torch.ones(64, 1, 4, 8)
    out = ml_kernels.dot_product_attention(q, k, ones, dropout_p=0.25, backend=backend)
    assert out.std() > 0.05
    assert abs(float(out.mean()) - 1.0) < 0.05


def test_attention_refuses_heads_that_do_not_fit_the_groups():
    with pytest.raises(ValueError, match="heads a multiple of the groups"):
        ml_kernels.dot_product_attention(random(4, 1, 3, 8), random(4, 1, 2, 8), random(4, 1, 2, 8))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", backends("cross_entropy"))
def test_cross_entropy_matches_its_formula(backend, dtype):
    target = torch.randint(0, 11, (5, 2), generator=torch.Generator().manual_seed(3))

    def formula(logits):
        return logits.exp().sum(-1).log() - logits.gather(-1, target[..., None])[..., 0]

    logits = random(5, 2, 11, dtype=dtype)
    loss = ml_kernels.cross_entropy(logits, target, backend=backend)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), formula(logits.double()), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    wide = logits.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(formula(wide).sum(), wide)
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=TOLERANCE[dtype])


def test_a_backend_asked_for_by_name_never_falls_back():
    x = random(2, 4)
    with pytest.raises(BackendUnavailableError, match="swiglu has no npu implementation"):
        ml_kernels.swiglu(x, backend="npu")
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailableError, match="CUDA"):
            ml_kernels.rms_norm(x, x[0], eps=1e-5, backend="cuda")


def test_the_implementation_follows_the_device_of_the_tensor():
    assert implementation("rms_norm", random(2)).__module__ == "ml_kernels.cpu.norm"
    assert implementation("rms_norm", random(2).to("meta")).__module__ == "ml_kernels.norm"


def test_available_says_why_not():
    assert ml_kernels.available("rms_norm", "cpu") is None
    assert "no operator" in ml_kernels.available("tea", "cpu")


@pytest.mark.parametrize(("operator", "backend"), sorted(IMPLEMENTATIONS))
def test_every_entry_of_the_table_names_a_function(operator, backend):
    module, _, function = IMPLEMENTATIONS[operator, backend].partition(":")
    assert callable(getattr(__import__(module, fromlist=[function]), function))
