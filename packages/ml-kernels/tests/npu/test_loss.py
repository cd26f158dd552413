"""Losses over the vocabulary through torch_npu's operator, and through torch's on its tensors."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from npu_ranks import run_ranks
from npu_simulator import (
    assert_like_reference,
    fake,
    fake_npu,
    mutated,
    recorded_calls,
    semantics,
    simulated,
    to_cpu,
    vjp,
)

import ml_kernels
from ml_kernels import chunked_loss
from ml_kernels.npu import loss as npu_loss

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def log_prob_of(input):
    return input - input.logsumexp(-1, keepdim=True)


@semantics("npu_cross_entropy_loss")
def cross_entropy_loss(
    input,
    target,
    weight,
    reduction,
    ignore_index,
    label_smoothing,
    lse_square_scale_for_zloss,
    return_zloss,
):
    """What torch_npu documents; a target that is not in [0, C) is the caller's mistake."""
    assert (weight, label_smoothing, lse_square_scale_for_zloss, return_zloss) == (None, 0, 0, 0)
    assert 0 < input.shape[0] <= 200_000
    assert target.shape == input.shape[:1]
    assert target.dtype == torch.int64
    assert bool(((target >= 0) & (target < input.shape[1])).all())
    log_prob = log_prob_of(input.float()).to(input.dtype)
    loss = -log_prob.float().gather(1, target[:, None])[:, 0]
    if ignore_index >= 0:
        loss = loss.masked_fill(target == ignore_index, 0)
    loss = loss if reduction == "none" else {"mean": loss.mean, "sum": loss.sum}[reduction]()[None]
    empty = input.new_empty(0)
    return loss.to(input.dtype), log_prob, empty, empty


@semantics("npu_cross_entropy_loss_backward")
def cross_entropy_loss_backward(grad_loss, log_prob, target, reduction, ignore_index, **_):
    """The derivative of the likelihoods with respect to the logits."""
    assert reduction == "none"
    onehot = torch.nn.functional.one_hot(target, log_prob.shape[1])
    shown = target != ignore_index if ignore_index >= 0 else target >= 0
    gradient = (log_prob.float().exp() - onehot) * (grad_loss.float() * shown)[:, None]
    return gradient.to(log_prob.dtype)


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def draw_target(*shape, classes=11, seed=1):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def compare(logits, target, dtype=torch.float32, **options):
    def call(logits, target, backend):
        return ml_kernels.cross_entropy(logits, target, backend=backend, **options)

    tolerance = TOLERANCE[dtype]
    assert_like_reference(call, logits.to(dtype), target, rtol=tolerance, atol=tolerance)


def with_ignored(ignore_index=-100):
    target = draw_target(5, 2)
    target[1], target[3, 1] = ignore_index, ignore_index
    return target


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_it_agrees_with_the_reference(dtype):
    compare(draw(5, 2, 11), draw_target(5, 2), dtype)


@pytest.mark.parametrize("ignore_index", [-100, 4])
def test_ignored_targets_do_not_reach_the_kernel(ignore_index):
    compare(draw(5, 2, 11), with_ignored(ignore_index), ignore_index=ignore_index)
    compare(draw(3, 11), torch.full((3,), ignore_index), ignore_index=ignore_index)


def test_a_bfloat16_loss_is_that_of_float32():
    logits, target = draw(40, 11, dtype=torch.bfloat16) * 4, draw_target(40)
    found = ml_kernels.cross_entropy(simulated(logits), simulated(target))
    expected = ml_kernels.cross_entropy(logits, target, backend="reference")
    assert found.dtype == torch.float32
    torch.testing.assert_close(to_cpu(found), expected, rtol=1e-6, atol=1e-6)


def test_empty_and_transposed_logits_are_accepted():
    compare(draw(0, 11), draw_target(0))
    compare(draw(11, 2, 5).transpose(0, 2), draw_target(5, 2))
    compare(draw(11), draw_target())


def test_more_rows_than_the_kernel_takes_are_divided(monkeypatch):
    monkeypatch.setattr(npu_loss, "_MOST_ROWS", 4)
    with recorded_calls() as calls:
        compare(draw(5, 2, 11), with_ignored())
    sizes = [call["input"].shape[0] for name, call in calls if name == "npu_cross_entropy_loss"]
    assert sizes == [4, 4, 2]


@pytest.mark.parametrize(
    ("operator", "change"),
    [
        ("npu_cross_entropy_loss", lambda call: {"input": call["input"].bfloat16()}),
        ("npu_cross_entropy_loss", lambda call: {"input": call["input"].flip(-1)}),
        ("npu_cross_entropy_loss", lambda call: {"target": call["target"].flip(0)}),
        ("npu_cross_entropy_loss", lambda call: {"target": call["target"] - 100}),
        ("npu_cross_entropy_loss", lambda call: {"ignore_index": 3}),
        ("npu_cross_entropy_loss", lambda call: {"label_smoothing": 0.1}),
        ("npu_cross_entropy_loss_backward", lambda call: {"log_prob": 2 * call["log_prob"]}),
        ("npu_cross_entropy_loss_backward", lambda call: {"grad_loss": call["grad_loss"].abs()}),
    ],
)
def test_a_wrong_call_is_noticed(operator, change):
    with mutated(operator, change), pytest.raises(AssertionError):
        compare(draw(22, 11), torch.arange(22) % 11)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_reduced_loss_is_noticed(reduction):
    change = mutated("npu_cross_entropy_loss", lambda call: {"reduction": reduction})
    with change, pytest.raises(RuntimeError, match=r"shape '\[22\]' is invalid"):
        compare(draw(22, 11), draw_target(22))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_real_schema_and_derivative_accept_the_call(dtype):
    with fake_npu(), recorded_calls() as calls:
        logits = fake(5, 2, 11, dtype=dtype, requires_grad=True)
        losses = ml_kernels.cross_entropy(logits, fake(5, 2, dtype=torch.int64))
        losses.sum().backward()
    assert (losses.shape, losses.dtype, losses.device.type) == ((5, 2), torch.float32, "npu")
    gradient = logits.grad
    assert (gradient.shape, gradient.dtype, gradient.device.type) == (logits.shape, dtype, "npu")
    assert [operator for operator, _ in calls] == [
        "npu_cross_entropy_loss",
        "npu_cross_entropy_loss_backward",
    ]
    # What the documentation allows to change where gradients are wanted.
    defaults = torch.ops.npu.npu_cross_entropy_loss.default._schema.arguments[2:]
    changed = {a.name for a in defaults if calls[0][1][a.name] != a.default_value}
    assert changed == {"reduction"}
    assert calls[0][1]["reduction"] == calls[1][1]["reduction"] == "none"


def test_float64_is_refused():
    with pytest.raises(ml_kernels.BackendUnavailableError, match=r"logits torch\.float64"):
        ml_kernels.cross_entropy(simulated(draw(2, 3).double()), simulated(draw_target(2)))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_linear_loss_runs_on_an_npu_with_torchs_operators(dtype, monkeypatch):
    monkeypatch.setattr(chunked_loss, "_DEVICE_ELEMENTS", 3 * 11)  # four chunks
    hidden, weight = draw(5, 2, 8, dtype=dtype), draw(11, 8, dtype=dtype, seed=2)
    target, token_weights = with_ignored(), torch.rand(5, 2)

    def call(hidden, weight, backend):
        on_npu = backend == "npu"
        return 3 * ml_kernels.linear_cross_entropy(
            hidden,
            weight,
            simulated(target) if on_npu else target,
            token_weights=simulated(token_weights) if on_npu else token_weights,
            backend=backend,
        )

    tolerance = 4 * TOLERANCE[dtype]
    assert_like_reference(call, hidden, weight, rtol=tolerance, atol=tolerance)


def test_the_linear_loss_keeps_everything_on_the_npu():
    with fake_npu(), recorded_calls() as calls:
        hidden = fake(5, 2, 8, dtype=torch.bfloat16, requires_grad=True)
        weight = fake(11, 8, dtype=torch.bfloat16, requires_grad=True)
        loss = ml_kernels.linear_cross_entropy(hidden, weight, fake(5, 2, dtype=torch.int64))
        loss.backward()
    assert (loss.shape, loss.dtype, loss.device.type) == ((), torch.float32, "npu")
    for leaf in (hidden, weight):
        assert (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, torch.bfloat16)
        assert leaf.grad.device.type == "npu"
    assert calls == []


def cut_losses():
    logits, target = draw(5, 2, 12), with_ignored()
    rank, size = dist.get_rank(), logits.shape[-1] // 2
    part = simulated(logits[..., rank * size : (rank + 1) * size], requires_grad=True)
    losses = ml_kernels.cross_entropy(part, simulated(target), group=dist.group.WORLD)
    losses.sum().backward()
    return to_cpu(losses), to_cpu(part.grad)


def test_a_vocabulary_cut_over_npus_gives_the_same_losses_and_gradients():
    results = run_ranks(cut_losses, 2)

    def whole(logits):
        return ml_kernels.cross_entropy(logits, with_ignored(), backend="reference")

    logits = draw(5, 2, 12)
    for losses, _ in results:
        torch.testing.assert_close(losses, whole(logits))
    found = torch.cat([gradient for _, gradient in results], dim=-1)
    torch.testing.assert_close(found, vjp(whole, [logits], [torch.ones(5, 2)])[0])
