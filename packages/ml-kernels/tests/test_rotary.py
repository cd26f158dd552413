"""The rotary embedding against complex numbers in float64 and the functions of transformers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import ROUNDING, assert_matches, assert_near, random, runs, with_gradients
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm_rotary
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotary

import ml_kernels
from ml_kernels.cpu import rotary as cpu
from ml_kernels.rotary import rotary_embedding_reference

DTYPES = list(ROUNDING)
POSITIONS = 6


@pytest.fixture(autouse=True)
def _fast_version_for_small_inputs(monkeypatch):
    monkeypatch.setattr(cpu, "FEW", 1)


def angles_of(width, interleaved, positions=POSITIONS):
    frequencies = ml_kernels.rotary_frequencies(width, base=100.0).inverse
    return ml_kernels.rotary_angles(
        frequencies, torch.arange(positions), interleaved=interleaved
    )  # (S, 1, 1, R)


def complex_formula(angles, interleaved, scale=1.0):
    """Turn pairs of channels as complex numbers."""
    width = angles.shape[-1]
    once = (angles[..., ::2] if interleaved else angles[..., : width // 2]).double()
    turn = torch.polar(torch.full_like(once, scale), once)

    def formula(x):
        turned, passed = x[..., :width], x[..., width:]
        first, second = (
            (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
        )
        result = torch.complex(first, second) * turn
        parts = (result.real, result.imag)
        joined = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
        return torch.cat((joined, passed), -1)

    return formula


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 8, 2])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("device", "backend"), runs("rotary_embedding"))
def test_pairs_of_channels_turn_as_complex_numbers(device, backend, interleaved, width, dtype):
    angles = angles_of(width, interleaved)
    if dtype == torch.float64:
        angles = angles.double()
    assert_matches(
        lambda x: ml_kernels.rotary_embedding(
            x, angles.to(device), interleaved=interleaved, scale=1.25, backend=backend
        ),
        complex_formula(angles, interleaved, 1.25),
        [random(POSITIONS, 2, 3, 16, dtype=dtype, device=device)],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_halves_turn_as_in_the_llama_of_transformers(backend, dtype):
    angles = angles_of(16, interleaved=False)
    query, key = random(POSITIONS, 2, 4, 16, dtype=dtype), random(POSITIONS, 2, 2, 16, dtype=dtype)
    cos, sin = (f(angles[None, :, 0, 0]).to(dtype) for f in (torch.cos, torch.sin))  # (1, S, D)
    expected = llama_rotary(*(t.permute(1, 2, 0, 3) for t in (query, key)), cos, sin)
    for one, other in zip((query, key), expected, strict=True):
        found = ml_kernels.rotary_embedding(one, angles, backend=backend)
        assert_near([found], [other.permute(2, 0, 1, 3)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_neighbours_in_half_of_the_channels_turn_as_in_the_glm_of_transformers(backend, dtype):
    angles = angles_of(8, interleaved=True)
    query = random(POSITIONS, 2, 4, 16, dtype=dtype)
    halves = angles_of(8, interleaved=False)[None, :, 0, 0]
    heads = query.permute(1, 2, 0, 3)
    expected, _ = glm_rotary(heads, heads, halves.cos().to(dtype), halves.sin().to(dtype))
    found = ml_kernels.rotary_embedding(query, angles, interleaved=True, backend=backend)
    assert_near([found], [expected.permute(2, 0, 1, 3)])


def test_the_reference_rounds_as_transformers_does():
    angles = angles_of(16, interleaved=False)
    x = random(POSITIONS, 1, 2, 16, dtype=torch.bfloat16)
    cos, sin = (f(angles[None, :, 0, 0]).bfloat16() for f in (torch.cos, torch.sin))
    expected, _ = llama_rotary(x.permute(1, 2, 0, 3), x.permute(1, 2, 0, 3), cos, sin)
    found = ml_kernels.rotary_embedding(x, angles, backend="reference")
    assert torch.equal(found, expected.permute(2, 0, 1, 3))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [4, 6])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck_passes(backend, width, interleaved):
    angles = angles_of(width, interleaved, positions=3)
    assert torch.autograd.gradcheck(
        lambda x: ml_kernels.rotary_embedding(
            x, angles, interleaved=interleaved, scale=0.5, backend=backend
        ),
        (random(3, 2, 1, 6, dtype=torch.float64),),
    )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_scores_depend_on_the_distance_of_the_positions_only(backend, interleaved):
    angles = angles_of(16, interleaved, positions=40)
    query, key = (random(1, 1, 1, 16, seed=s).expand(40, 1, 1, 16) for s in (0, 1))
    query, key = (
        ml_kernels.rotary_embedding(t, angles, interleaved=interleaved, backend=backend)[:, 0, 0]
        for t in (query, key)
    )
    scores = query @ key.T
    torch.testing.assert_close(scores[3:, 3:], scores[:-3, :-3], rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(0, 4)] * 3),
    pairs=st.integers(1, 6),
    passed=st.integers(0, 5),
    order=st.permutations(range(4)),
    ones=st.tuples(*[st.booleans()] * 3),
    start=st.integers(0, 1),
    chunk=st.integers(1, 200),
    interleaved=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_fast_version_agrees_for_every_shape_stride_and_broadcast(
    sizes, pairs, passed, order, ones, start, chunk, interleaved, dtype
):
    shape = (*sizes, 2 * pairs + passed)
    stored = [shape[i] for i in order]
    flat = random(start + torch.Size(stored).numel(), dtype=dtype)
    x = flat[start:].view(stored).permute([order.index(i) for i in range(4)])
    assert x.shape == shape
    leading = [1 if one else size for one, size in zip(ones, sizes, strict=True)]
    once = random(*leading, pairs, seed=1).detach()
    angles = once.repeat_interleave(2, -1) if interleaved else torch.cat((once, once), -1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "CHUNK", chunk)
        found = with_gradients(lambda x: cpu.rotary_embedding(x, angles, interleaved, 1.5), [x])
    assert_near(
        found,
        with_gradients(lambda x: rotary_embedding_reference(x, angles, interleaved, 1.5), [x]),
    )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_tensor_may_start_anywhere_in_its_memory(backend, interleaved):
    angles, flat = angles_of(16, interleaved), random(1 + POSITIONS * 16)
    assert_matches(
        lambda x: ml_kernels.rotary_embedding(
            x[1:].view(POSITIONS, 1, 1, 16), angles, interleaved=interleaved, backend=backend
        ),
        lambda x: complex_formula(angles, interleaved)(x[1:].view(POSITIONS, 1, 1, 16)),
        [flat],
    )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_result_may_be_changed_in_place(backend, interleaved):
    angles, x = angles_of(16, interleaved), random(POSITIONS, 2, 3, 16)
    out = ml_kernels.rotary_embedding(x, angles, interleaved=interleaved, backend=backend)
    (found,) = torch.autograd.grad(out.mul_(2).sum(), x)
    (expected,) = torch.autograd.grad(2 * complex_formula(angles, interleaved)(x).sum(), x)
    assert_near([found], [expected])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_angles_are_constants(backend, interleaved):
    angles = angles_of(16, interleaved).requires_grad_()
    out = ml_kernels.rotary_embedding(
        random(POSITIONS, 2, 3, 16), angles, interleaved=interleaved, backend=backend
    )
    out.sum().backward()
    assert angles.grad is None


X = torch.ones(6, 2, 3, 16)


@pytest.mark.parametrize(
    ("x", "angles", "error", "message"),
    [
        (X[0], torch.ones(1, 1, 1, 8), ValueError, r"x \(2, 3, 16\) and angles \(1, 1, 1, 8\): bo"),
        (X, torch.ones(6, 8), ValueError, r"angles \(6, 8\): both must have four dimensions"),
        (X, torch.ones(5, 1, 1, 8), ValueError, r"angles \(5, 1, 1, 8\): the first three dimens"),
        (X, torch.ones(6, 1, 2, 8), ValueError, r"must be 1 or those of x \(6, 2, 3, 16\)"),
        (X, torch.ones(6, 1, 1, 7), ValueError, r"the last dimension must be even, above 0 and"),
        (X, torch.ones(6, 1, 1, 18), ValueError, "at most the 16 channels of x"),
        (X, torch.ones(6, 1, 1, 0), ValueError, "the last dimension must be even, above 0"),
        (X, torch.ones(6, 1, 1, 8).bfloat16(), TypeError, "angles is torch.bfloat16: must be"),
        (X, torch.ones(6, 1, 1, 8).long(), TypeError, "angles is torch.int64: must be floating"),
        (X.int(), torch.ones(6, 1, 1, 8), TypeError, "x is torch.int32: must be floating point"),
        (X, torch.ones(6, 1, 1, 8).to("meta"), ValueError, "angles is on meta: must be on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(x, angles, error, message):
    with pytest.raises(error, match=f"rotary_embedding: .*{message}"):
        ml_kernels.rotary_embedding(x, angles)


@pytest.mark.parametrize("scale", [float("inf"), float("nan")])
def test_a_scale_that_is_not_finite_is_refused(scale):
    with pytest.raises(ValueError, match=f"rotary_embedding: scale {scale}: must be finite"):
        ml_kernels.rotary_embedding(X, torch.ones(6, 1, 1, 8), scale=scale)
