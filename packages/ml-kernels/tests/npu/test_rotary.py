"""Rotary position embedding through torch_npu's operator."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from npu_simulator import (
    assert_like_reference,
    fake,
    fake_npu,
    mutated,
    recorded_calls,
    semantics,
    simulated,
    vjp,
)

import ml_kernels

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

S, B, N, D = 5, 2, 3, 16


def rotated(input, r1, r2, rotary_mode):
    if rotary_mode == "half":
        first, second = input.chunk(2, -1)
        turned = torch.cat((-second, first), dim=-1)
    else:
        turned = torch.stack((-input[..., 1::2], input[..., ::2]), dim=-1).flatten(-2)
    return r1 * input + r2 * turned


@semantics("npu_rotary_mul")
def rotary_mul(input, r1, r2, rotary_mode, rotate):
    assert rotate is None
    assert rotary_mode in ("half", "interleave")
    assert input.dim() == r1.dim() == 4
    assert r1.shape == r2.shape
    assert input.shape[-1] == r1.shape[-1]
    assert input.dtype == r1.dtype == r2.dtype
    assert _documented(input.shape, r1.shape, rotary_mode)
    return rotated(input.float(), r1.float(), r2.float(), rotary_mode).to(input.dtype)


def _documented(x, r, mode):
    """The documented layouts (B, N, S, D), (B, S, N, D), (S, B, N, D) and sizes."""
    for batch, heads, sequence in ((0, 1, 2), (0, 2, 1), (1, 2, 0)):
        sizes = x[batch], x[heads]
        kept = [[sequence]] if mode == "interleave" else [[sequence], [sequence, batch], [0, 1, 2]]
        small = sizes[0] * sizes[1] < 1000 if mode == "interleave" else max(sizes) < 1000
        fits = any(all(r[i] == (x[i] if i in k else 1) for i in range(3)) for k in kept)
        if small and fits and x[3] < 896 and x[3] % 2 == 0:
            return True
    return False


@semantics("npu_rotary_mul_backward")
def rotary_mul_backward(grad, input, r1, r2, rotary_mode):
    wide = [t.float() for t in (input, r1, r2)]
    gradients = vjp(lambda x, a, b: rotated(x, a, b, rotary_mode), wide, [grad.float()])
    return tuple(t.to(input.dtype) for t in gradients)


def inputs(shape=(S, B, N, D), angles_shape=(S, 1, 1, D), interleaved=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator).to(dtype)
    angles = torch.rand(*angles_shape[:3], angles_shape[3] // 2, generator=generator) * 6
    pairs = angles.repeat_interleave(2, -1) if interleaved else angles.repeat(1, 1, 1, 2)
    return x, pairs


def compare(x, angles, interleaved=False, scale=1.0, **closeness):
    def call(x, backend):
        on_device = simulated(angles) if x.device.type == "npu" else angles
        return ml_kernels.rotary_embedding(
            x, on_device, interleaved=interleaved, scale=scale, backend=backend
        )

    assert_like_reference(call, x, **closeness)


@pytest.mark.parametrize("width", [D, 8])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_both_forms_and_part_of_the_channels_agree_with_the_reference(dtype, interleaved, width):
    given = inputs(angles_shape=(S, 1, 1, width), interleaved=interleaved, dtype=dtype)
    closeness = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    compare(*given, interleaved, scale=1.3, **closeness)


@pytest.mark.parametrize(
    "angles_shape",
    [(S, 1, 1, D), (1, B, 1, D), (1, 1, N, D), (S, B, 1, D), (S, 1, N, D), (S, B, N, D)],
)
def test_angles_may_vary_along_the_sequence_and_the_batch_in_any_order(angles_shape):
    compare(*inputs(angles_shape=angles_shape))
    varying = sum(size > 1 for size in angles_shape[:3])
    if varying > 1:
        with pytest.raises(ml_kernels.BackendUnavailableError, match="along the sequence and noth"):
            compare(*inputs(angles_shape=angles_shape, interleaved=True), interleaved=True)
    else:
        compare(*inputs(angles_shape=angles_shape, interleaved=True), interleaved=True)


@pytest.mark.parametrize("interleaved", [False, True])
def test_one_position_is_accepted_wherever_the_sequence_is(interleaved):
    for shape in ((1, B, N, D), (B, 1, N, D), (B, N, 1, D)):
        given = inputs(shape, (1, 1, 1, D), interleaved=interleaved)
        compare(*given, interleaved)


@pytest.mark.parametrize("angles_shape", [(1, B, N, D), (1, 1, 1, D)])
def test_angles_that_vary_along_other_dimensions_are_refused(angles_shape):
    with pytest.raises(ml_kernels.BackendUnavailableError, match="must vary along the sequence"):
        compare(*inputs(angles_shape=angles_shape))


@pytest.mark.parametrize(
    ("shape", "width", "interleaved", "message"),
    [
        ((2, 1, 1, 1024), 896, False, "must have fewer than 896 channels"),
        ((2, 1000, 1, 4), 4, False, r"x \(2, 1000, 1, 4\): on an NPU batch and heads must be"),
        ((2, 50, 20, 4), 4, True, "batch times heads must be below 1000"),
    ],
)
def test_sizes_outside_the_documented_limits_are_refused(shape, width, interleaved, message):
    given = inputs(shape, (shape[0], 1, 1, width), interleaved=interleaved)
    with pytest.raises(ml_kernels.BackendUnavailableError, match=message):
        compare(*given, interleaved)


@pytest.mark.parametrize(
    ("shape", "interleaved"), [((2, 999, 2, 4), False), ((2, 27, 37, 4), True)]
)
def test_sizes_just_inside_the_limits_are_accepted(shape, interleaved):
    compare(*inputs(shape, (2, 1, 1, 4), interleaved=interleaved), interleaved)


def test_empty_and_transposed_inputs_are_accepted():
    compare(*inputs((0, B, N, D), (0, 1, 1, D)))
    x, angles = inputs((B, S, N, D), (S, 1, 1, D))
    compare(x.transpose(0, 1), angles)


@pytest.mark.parametrize(
    ("operator", "change"),
    [
        ("npu_rotary_mul", lambda call: {"rotary_mode": "interleave"}),
        ("npu_rotary_mul", lambda call: {"r1": call["r2"], "r2": call["r1"]}),
        ("npu_rotary_mul", lambda call: {"r2": -call["r2"]}),
        ("npu_rotary_mul", lambda call: {"r1": call["r1"] / 1.3}),
        ("npu_rotary_mul_backward", lambda call: {"r2": -call["r2"]}),
        ("npu_rotary_mul_backward", lambda call: {"rotary_mode": "interleave"}),
    ],
)
def test_a_wrong_call_is_noticed(operator, change):
    with mutated(operator, change), pytest.raises(AssertionError):
        compare(*inputs(angles_shape=(S, 1, 1, 8)), scale=1.3)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_real_schema_and_derivative_accept_the_call(interleaved):
    with fake_npu(), recorded_calls() as calls:
        x = fake(S, B, N, D, dtype=torch.bfloat16, requires_grad=True)
        rotate = partial(ml_kernels.rotary_embedding, interleaved=interleaved)
        out = rotate(x, fake(S, 1, 1, 8))
        out.sum().backward()
    for result in (out, x.grad):
        assert (result.shape, result.dtype) == (x.shape, torch.bfloat16)
        assert result.device.type == "npu"
    assert [operator for operator, _ in calls] == ["npu_rotary_mul", "npu_rotary_mul_backward"]
    assert calls[0][1]["r1"].dtype == torch.bfloat16


def test_float64_is_refused():
    x, angles = inputs()
    with pytest.raises(ml_kernels.BackendUnavailableError, match=r"x torch\.float64"):
        compare(x.double(), angles)
