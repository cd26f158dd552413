"""The Triton kernels in Triton's interpreter, on a CPU, against formulas in float64.

On a GPU the tests of the operators run them compiled.
"""

from __future__ import annotations

import pytest
import torch
from oracle import ROUNDING, assert_matches, assert_near, random, with_gradients
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from ml_kernels import chunked_loss, dispatch
from ml_kernels.cuda import activation, linear_loss, loss, norm, rotary
from ml_kernels.cuda.loss import cross_entropy
from ml_kernels.cuda.rotary import rotary_embedding
from ml_kernels.rotary import rotary_embedding_reference

DTYPES = list(ROUNDING)
EPS = 1e-5


def rms(x, weight, unit_offset):
    scaled = x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    return scaled * (weight + 1 if unit_offset else weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("shape", [(7, 2, 48), (3, 40), (1, 1), (70, 130)])
def test_rms_norm(dtype, offset, shape):
    inputs = [random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=1)]
    assert_matches(
        lambda x, w: norm.rms_norm(x, w, EPS, offset), lambda x, w: rms(x, w, offset), inputs
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("used", [slice(0, 2), slice(0, 1), slice(1, 2)])
def test_add_rms_norm(dtype, used):
    inputs = [random(33, 48, dtype=dtype, seed=s) for s in (0, 1)] + [
        random(48, dtype=dtype, seed=2)
    ]

    def formula(x, residual, weight):
        total = x + residual
        total = total + (total.to(dtype).double() - total).detach()
        return (rms(total, weight, False), total)[used]

    assert_matches(lambda *t: norm.add_rms_norm(*t, EPS, False)[used], formula, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm(dtype, bias):
    inputs = [random(37, 2, 48, dtype=dtype)]
    inputs += [random(48, dtype=dtype, seed=s) for s in (1, 2)[: 1 + bias]]
    assert_matches(
        lambda x, w, b=None: norm.layer_norm(x, w, b, EPS),
        lambda x, w, b=None: F.layer_norm(x, (48,), w, b, EPS),
        inputs,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["silu", "tanh", "none"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("width", [24, 1500])
def test_activations(dtype, bias, kind, gated, width):
    wide = width * (1 + gated)
    inputs = [random(5, 3, wide, dtype=dtype)]
    inputs += [random(wide, dtype=dtype, seed=1)] if bias else []

    def formula(x, b=None):
        x = x if b is None else x + b
        gate, up = x.chunk(2, -1) if gated else (x, 1)
        return (F.silu(gate) if kind == "silu" else F.gelu(gate, approximate=kind)) * up

    assert_matches(lambda x, b=None: activation._activate(x, b, kind, gated=gated), formula, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [16, 6])
@pytest.mark.parametrize("shared", [(5, 1, 1), (1, 2, 1), (5, 2, 3), (1, 1, 1)])
def test_rotary_embedding(dtype, interleaved, width, shared, monkeypatch):
    monkeypatch.setattr(rotary, "_NUMBERS", 16)  # two heads or fewer at a time
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    half = random(*shared, width // 2, seed=3, dtype=wide).detach() * 9
    angles = half.repeat_interleave(2, -1) if interleaved else torch.cat((half, half), -1)
    x = random(5, 2, 3, 16, dtype=dtype)
    found = with_gradients(lambda x: rotary_embedding(x, angles, interleaved, 1.5), [x])
    expected = with_gradients(
        lambda x: rotary_embedding_reference(x, angles, interleaved, 1.5), [x]
    )
    assert_near(found, expected)
    strided = random(2, 5, 16, 3, dtype=dtype).permute(1, 0, 3, 2)
    found = rotary_embedding(strided, angles, interleaved, 1.5)
    assert_near([found], [rotary_embedding_reference(strided, angles, interleaved, 1.5)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "at_a_time"), [(11, 8192), (300, 64), (5000, 2048)])
@pytest.mark.parametrize("order", [1, -1])
def test_cross_entropy(dtype, width, at_a_time, order, monkeypatch):
    monkeypatch.setattr(loss, "_COLUMNS", at_a_time)
    target = torch.tensor([3, -100, 0, width - 1, 7, 7])
    assert_matches(
        lambda x: loss.cross_entropy(x, target, -100, None),
        lambda x: F.cross_entropy(x, target, reduction="none"),
        # The maximum is found early, or anew in each block of columns.
        [(order * random(6, width, dtype=dtype).detach().sort().values).requires_grad_()],
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_cross_entropy(dtype, monkeypatch):
    monkeypatch.setattr(loss, "_COLUMNS", 16)
    monkeypatch.setattr(chunked_loss, "_CHUNK_ELEMENTS", 3 * 37)
    monkeypatch.setattr(chunked_loss, "_CACHED_ELEMENTS", 3 * 37)
    target = torch.tensor([3, -100, 0, 36, 7, 7, 1, 2])
    given = (target, None, "mean", -100, None)
    inputs = [random(8, 12, dtype=dtype), random(37, 12, dtype=dtype, seed=1)]
    found = with_gradients(
        lambda h, w: linear_loss.linear_cross_entropy(h, w, *given)[None], inputs
    )
    wide = [t.detach().double().requires_grad_() for t in inputs]
    expected = with_gradients(lambda h, w: F.cross_entropy(h @ w.t(), target)[None], wide)
    assert_near(found, expected, dtype)  # the logits are of this dtype


def test_with_a_group_the_ranks_meet_between_statistics_and_loss(monkeypatch):
    given = []
    monkeypatch.setattr(chunked_loss, "cross_entropy", lambda *arguments: given.append(arguments))
    arguments = (torch.ones(2, 4), torch.zeros(2, dtype=torch.int64), -100, object())
    cross_entropy(*arguments)
    assert given == [arguments]


def test_in_a_model_that_is_compiled_they_are_a_part_of_its_graph():
    x, weight, target = random(6, 16), random(16, seed=1), torch.arange(6)
    angles = random(6, 1, 1, 2, seed=2).detach().repeat(1, 1, 1, 2)

    def model(x, weight):
        x, total = norm.add_rms_norm(x, 2 * x, weight, EPS, False)
        x = activation.swiglu(
            norm.layer_norm(norm.rms_norm(x, weight, EPS, True), weight, None, EPS), None
        )
        x = (
            rotary_embedding(
                activation.geglu(total, None, "tanh").view(6, 1, 2, 4), angles, False, 1.0
            ).flatten(1)
            + x
        )
        return cross_entropy(activation.gelu(x, weight[:8], "none"), target, -100, None)

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_near(with_gradients(compiled, [x, weight]), with_gradients(model, [x, weight]))


@pytest.mark.parametrize("width", [0, 1])
def test_nothing_is_computed_of_nothing(width):
    x = random(0 if width else 3, 4 * width)
    assert activation.swiglu(x, None).shape == (x.shape[0], 2 * width)
    assert norm.rms_norm(x, torch.ones(4 * width), EPS, False).shape == x.shape


def test_rows_too_wide_for_a_program_are_compiled_by_torch(monkeypatch):
    monkeypatch.setattr(norm, "_WIDEST", 8)
    monkeypatch.setattr(norm, "_WIDEST_CENTRED", 8)
    made = []
    monkeypatch.setattr(norm.graphs, "compiled", lambda f, **_: made.append(f) or f)
    x, weight = random(3, 9), random(9, seed=1)
    norm.rms_norm(x, weight, EPS, False)
    norm.add_rms_norm(x, x, weight, EPS, False)
    norm.layer_norm(x, weight, None, EPS)
    assert [f.__name__.removesuffix("_reference") for f in made] == [
        "rms_norm",
        "add_rms_norm",
        "layer_norm",
    ]


def test_every_entry_of_the_table_for_cuda_names_a_function():
    targets = [t for (_, device), t in dispatch.IMPLEMENTATIONS.items() if device == "cuda"]
    assert all(callable(dispatch._load(target)) for target in targets)


def all_of_them(x, weight, residual, target):
    """Yield every output of a kernel from a leaf `x` `(R, H)`, by name."""
    angles = torch.zeros(x.shape[0], 1, 1, x.shape[1])
    yield "rms_norm", norm.rms_norm(x, weight, EPS, False)
    out, total = norm.add_rms_norm(x, residual, weight, EPS, False)
    yield from (("add_rms_norm", out), ("total", total * 1))
    yield "layer_norm", norm.layer_norm(x, weight, None, EPS)
    yield "swiglu", activation.swiglu(x, None)
    yield "gelu", activation.gelu(x, weight, "tanh")
    yield "rotary_embedding", rotary_embedding(x[:, None, None], angles, False, 1.0)
    yield "cross_entropy", cross_entropy(x, target, -100, None)


def test_results_may_be_changed_in_place():
    x, weight, residual = random(4, 16), random(16, seed=1), random(4, 16, seed=2)
    given = (x, weight, residual, torch.arange(4))
    for (name, out), (_, again) in zip(all_of_them(*given), all_of_them(*given), strict=True):
        (expected,) = torch.autograd.grad(2 * again.sum(), x)
        (found,) = torch.autograd.grad(out.mul_(2).sum(), x)
        assert torch.equal(found, expected), name


def test_copies_of_what_has_gaps_are_not_kept_for_backward():
    whole = random(64, 3 * 32)
    x, weight, residual = whole[:, 32:64], random(32, seed=1), whole[:, :32]
    given = {t.untyped_storage().data_ptr() for t in (whole, weight)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        outputs = dict(all_of_them(x, weight, residual, torch.arange(64) % 32))
    given |= {t.untyped_storage().data_ptr() for t in outputs.values()}
    large = [t for t in kept if t.numel() >= x.numel() and t.is_floating_point()]
    copies = [t for t in large if t.untyped_storage().data_ptr() not in given]
    # The sum of add_rms_norm, which is a result, and the angles.
    assert sorted(t.shape for t in copies) == [(64, 1, 1, 32), (64, 32)]


def test_fake_tensors_reach_no_kernel(monkeypatch):
    def no_kernel(*_):
        raise AssertionError("a kernel was started without memory")

    for module in (norm, activation, rotary, loss):
        monkeypatch.setattr(module.launch, "on", no_kernel)
    with FakeTensorMode():
        x, weight = torch.ones(4, 16, requires_grad=True), torch.ones(16)
        shapes = [o.shape for _, o in all_of_them(x, weight, x, torch.ones(4).long())]
        given = (torch.ones(4).long(), None, "sum", -100, None)
        total = linear_loss.linear_cross_entropy(x, torch.ones(32, 16), *given)
    assert shapes[:4] == [(4, 16)] * 4
    assert total.shape == ()


def test_a_few_channels_of_wide_heads_are_rotated():
    x, angles = random(1, 1, 70, 2048), random(1, 1, 1, 1, seed=1).detach().expand(1, 1, 1, 2)
    found = rotary_embedding(x, angles, False, 1.0)
    assert_near([found], [rotary_embedding_reference(x, angles, False, 1.0)])


def test_a_number_alone_is_no_row():
    x, bias = torch.tensor(0.3), torch.tensor(0.2)
    assert_near([activation.gelu(x, bias, "none")], [F.gelu(x + bias)])
