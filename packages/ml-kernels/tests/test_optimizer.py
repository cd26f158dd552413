"""AdamW over lists of tensors, on every implementation that runs here."""

from __future__ import annotations

import pytest
import torch
from oracle import runs

import ml_kernels

RUNS = runs("adamw")
OPTIONS = {"lr": 3e-3, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.1}
SHAPES = [(5, 3), (7,), (), (2, 1, 4)]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def state_of(params):
    return [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]


def torchs(params, grads_of_steps):
    """Yield the parameters after each step of torch.optim.AdamW."""
    params = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = torch.optim.AdamW(
        params,
        lr=OPTIONS["lr"],
        betas=(OPTIONS["beta1"], OPTIONS["beta2"]),
        eps=OPTIONS["eps"],
        weight_decay=OPTIONS["weight_decay"],
        foreach=False,
    )
    for grads in grads_of_steps:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.to(param.dtype)
        optimizer.step()
        yield [p.detach().clone() for p in params]


def ours(device, backend, params, grads_of_steps):
    params = [p.clone().to(device) for p in params]
    state = state_of(params)
    for step, grads in enumerate(grads_of_steps, start=1):
        on_device = [g.to(device) for g in grads]
        ml_kernels.adamw(params, on_device, *state, step=step, **OPTIONS, backend=backend)
        yield [p.cpu().clone() for p in params]


def grads_of(steps, shapes=SHAPES, dtype=torch.float32):
    return [[draw(*s, seed=100 * t + i, dtype=dtype) for i, s in enumerate(shapes)] for t in steps]


def test_the_reference_takes_torchs_steps_in_float64():
    params = [draw(*shape, seed=i, dtype=torch.float64) for i, shape in enumerate(SHAPES)]
    grads = grads_of(range(10), dtype=torch.float64)
    for found, expected in zip(
        ours("cpu", "reference", params, grads), torchs(params, grads), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_ten_steps_in_float32_are_torchs(device, backend):
    params = [draw(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    grads = grads_of(range(10))
    exact = torchs([p.double() for p in params], grads)
    for found, expected in zip(ours(device, backend, params, grads), exact, strict=True):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_a_half_precision_step_is_rounded_once(device, backend, dtype):
    params = [draw(64, dtype=dtype)]
    (grads,) = grads_of([1], [(64,)], dtype)
    (found,) = ours(device, backend, params, [grads])
    (exact,) = torchs([params[0].double()], [grads])
    unit = torch.finfo(dtype).eps * exact[0].abs()
    assert ((found[0].double() - exact[0]).abs() <= 0.51 * unit).all()


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_half_precision_parameters_may_have_a_float32_state(device, backend):
    param, grad = draw(64, dtype=torch.bfloat16).to(device), draw(64, seed=1).to(device)
    state = [[torch.zeros(64, device=device)] for _ in range(2)]
    ml_kernels.adamw([param], [grad], *state, step=1, lr=0.1, beta1=0.75, backend=backend)
    torch.testing.assert_close(state[0][0], grad / 4, rtol=1e-6, atol=0)
    assert param.dtype == torch.bfloat16


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_parameters_and_state_are_changed_in_place(device, backend):
    params = [torch.nn.Parameter(draw(4, 3).to(device)), torch.nn.Parameter(draw(0, 3).to(device))]
    grads = [draw(4, 3, seed=1).to(device), draw(0, 3).to(device)]
    averages, squares = state_of([p.detach() for p in params])
    before = [t.data_ptr() for t in (*params, *averages, *squares)]
    ml_kernels.adamw(params, grads, averages, squares, step=1, **OPTIONS, backend=backend)
    assert [t.data_ptr() for t in (*params, *averages, *squares)] == before
    torch.testing.assert_close(averages[0], 0.2 * grads[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(squares[0], 0.05 * grads[0] ** 2, rtol=1e-5, atol=1e-7)
    assert params[0].requires_grad
    assert params[0].is_leaf


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_tensors_may_be_views_of_larger_ones(device, backend):
    whole, grad = draw(6, 8), draw(6, 4, seed=1)
    (expected,) = ours("cpu", "reference", [whole[:, ::2].clone()], [[grad]])
    untouched = whole[:, 1::2].clone()
    whole = whole.to(device)
    view = whole[:, ::2]
    transposed = grad.t().contiguous().t().to(device)
    ml_kernels.adamw([view], [transposed], *state_of([view]), step=1, **OPTIONS, backend=backend)
    torch.testing.assert_close(view.cpu(), expected[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(whole[:, 1::2].cpu(), untouched)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_graph_from_before_a_step_is_not_gone_on_with(backend):
    params, grads = [torch.nn.Parameter(draw(4))], [draw(4, seed=1)]
    out = (params[0] * params[0]).sum()
    state = state_of([params[0].detach()])
    ml_kernels.adamw(params, grads, *state, step=1, **OPTIONS, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_no_parameters_need_no_step():
    ml_kernels.adamw([], [], [], [], step=1, lr=0.1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"step": 0}, ValueError, "step 0: must be 1 at the first step"),
        ({"lr": -1.0}, ValueError, "lr -1.0: must not be negative"),
        ({"eps": -1e-8}, ValueError, "eps -1e-08: must not be negative"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay -0.1: must not be negative"),
        ({"beta1": 1.0}, ValueError, r"beta1 1.0: must be in \[0, 1\)"),
        ({"beta2": -0.5}, ValueError, r"beta2 -0.5: must be in \[0, 1\)"),
        ({"step": 1.5}, TypeError, "step 1.5: must be an int"),
        ({"lr": float("inf")}, ValueError, "lr inf: must be finite"),
        ({"lr": float("nan")}, ValueError, "lr nan: must not be negative"),
        ({"grads": [None]}, TypeError, r"grads\[0\] is a NoneType: must be a tensor"),
        ({"grads": draw(1, 4)}, TypeError, "grads is a Tensor: must be a list of tensors"),
        ({"params": draw(1, 4)}, TypeError, "params is a Tensor: must be a list of tensors"),
        ({"grads": []}, ValueError, "grads of length 0: must be 1, like params"),
        ({"exp_avgs": [draw(3)]}, ValueError, r"exp_avgs\[0\] is \(3,\) on cpu: must be \(4,\)"),
        ({"exp_avg_sqs": [draw(4).to("meta")]}, ValueError, r"exp_avg_sqs\[0\] is .* on meta"),
        ({"grads": [draw(4).bfloat16()]}, TypeError, r"grads\[0\] is torch.bfloat16: must be"),
        ({"params": [draw(4).long()]}, TypeError, r"params\[0\] is torch.int64"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    lists = {name: [draw(4)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    given = lists | {"step": 1, "lr": 0.1} | changes
    with pytest.raises(error, match=f"adamw: {message}"):
        ml_kernels.adamw(**given)


def test_nothing_is_changed_before_all_is_checked():
    params = [draw(4), draw(4)]
    before = params[0].clone()
    with pytest.raises(ValueError, match=r"grads\[1\]"):
        ml_kernels.adamw(params, [draw(4), draw(3)], *state_of(params), step=1, lr=0.1)
    assert torch.equal(params[0], before)
