"""The cross entropy of given logits, on every implementation that runs here."""

from __future__ import annotations

import pytest
import torch
from gloo_ranks import run_ranks
from oracle import random, runs
from torch.nn import functional as F

import ml_kernels
from ml_kernels import chunked_loss
from ml_kernels.loss import cross_entropy_reference

RUNS = runs("cross_entropy")
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""Of a gradient of at most 1: half a unit in its last place, and the error of float32."""


def draw(*shape, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def draw_target(*shape, classes, seed=1):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def formula(logits, target, ignore_index=-100):
    """The losses in float64, token by token."""
    losses = [
        row.sum() * 0 if wanted == ignore_index else row.exp().sum().log() - row[wanted]
        for row, wanted in zip(logits.flatten(0, -2), target.flatten(), strict=True)
    ]
    return torch.stack(losses).view(target.shape)


def losses_and_gradient(function, logits, upstream):
    leaf = logits.detach().requires_grad_()
    losses = function(leaf)
    (gradient,) = torch.autograd.grad(losses, leaf, upstream.to(losses))
    return losses.detach(), gradient


def assert_matches(device, backend, logits, target, tolerance=2e-6, **options):
    upstream = draw(*target.shape, seed=9)
    expected = losses_and_gradient(
        lambda x: formula(x, target, **options), logits.double(), upstream
    )
    found = losses_and_gradient(
        lambda x: ml_kernels.cross_entropy(x, target.to(device), backend=backend, **options),
        logits.to(device),
        upstream,
    )
    assert found[0].dtype == torch.promote_types(logits.dtype, torch.float32)
    assert found[1].dtype == logits.dtype
    torch.testing.assert_close(found[0].cpu().double(), expected[0], rtol=2e-6, atol=2e-6)
    size = float(upstream.abs().max()) if upstream.numel() else 1.0
    torch.testing.assert_close(found[1].cpu().double(), expected[1], rtol=0, atol=tolerance * size)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_losses_and_gradients_match_the_formula(device, backend, dtype):
    logits, target = draw(5, 2, 11, dtype=dtype, scale=2), draw_target(5, 2, classes=11)
    assert_matches(device, backend, logits, target, ROUNDING[dtype])


@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_ignored_targets_have_no_loss_and_no_gradient(device, backend, ignore_index):
    logits, target = draw(7, 2, 6), draw_target(7, 2, classes=6)
    target[1], target[4, 0] = ignore_index, ignore_index
    assert_matches(device, backend, logits, target, ignore_index=ignore_index)
    leaf = logits.to(device).requires_grad_()
    losses = ml_kernels.cross_entropy(
        leaf, target.to(device), ignore_index=ignore_index, backend=backend
    )
    losses.sum().backward()
    ignored = target == ignore_index
    assert not losses[ignored].any()
    assert not leaf.grad[ignored].any()
    assert leaf.grad[~ignored].any(-1).all()


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_it_agrees_with_torch_where_everything_is_ignored(device, backend):
    logits = draw(4, 6).to(device).requires_grad_()
    target = torch.full((4,), -100, device=device)
    losses = ml_kernels.cross_entropy(logits, target, backend=backend)
    losses.sum().backward()
    torch.testing.assert_close(losses, F.cross_entropy(logits, target, reduction="none"))
    assert not logits.grad.any()


@pytest.mark.parametrize("shape", [(0, 6), (3, 0, 6), (6,), (1, 1), (2, 1, 3, 6)])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_no_tokens_one_token_and_many_dimensions_work(device, backend, shape):
    logits = draw(*shape).to(device).requires_grad_()
    target = draw_target(*shape[:-1], classes=shape[-1]).to(device)
    losses = ml_kernels.cross_entropy(logits, target, backend=backend)
    losses.sum().backward()
    assert losses.shape == target.shape
    expected = F.cross_entropy(
        logits.flatten(0, -2) if len(shape) > 1 else logits[None],
        target.flatten(),
        reduction="none",
    )
    torch.testing.assert_close(losses.flatten(), expected)
    assert logits.grad.shape == logits.shape


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_tensors_may_be_any_views(device, backend):
    logits = draw(11, 5, 4).permute(2, 1, 0)[:, ::2]
    target = draw_target(3, 4, classes=11).t()
    assert not logits.is_contiguous()
    assert_matches(device, backend, logits, target)
    assert_matches(device, backend, draw(11).expand(4, 3, 11), target[:1].expand(4, 3))


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_large_logits_neither_overflow_nor_lose_the_loss(device, backend):
    logits = (draw(6, 9) + torch.tensor([[3e4], [-3e4], [1e3], [0.0], [80.0], [200.0]])).to(device)
    target = draw_target(6, classes=9).to(device)
    expected = F.cross_entropy(logits.cpu().double(), target.cpu(), reduction="none")
    found = ml_kernels.cross_entropy(logits, target, backend=backend)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_columns_of_minus_infinity_take_no_part(device, backend):
    logits, target = draw(3, 8).to(device), torch.tensor([0, 5, 2], device=device)
    hidden = torch.full((3, 4), -torch.inf, device=device)
    padded = torch.cat([logits, hidden], dim=1).requires_grad_()
    losses = ml_kernels.cross_entropy(padded, target, backend=backend)
    expected = F.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(losses.detach(), expected)
    losses.sum().backward()
    assert not padded.grad[:, 8:].any()
    assert padded.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_gradients_are_those_of_the_function(backend):
    logits, target = (
        draw(4, 3, 5, dtype=torch.float64).requires_grad_(),
        draw_target(4, 3, classes=5),
    )
    target[2, 1] = -100
    assert torch.autograd.gradcheck(
        lambda x: ml_kernels.cross_entropy(x, target, backend=backend), (logits,)
    )


@pytest.mark.parametrize("rows_at_a_time", [1, 4, 7, 100])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_number_of_rows_at_a_time_changes_nothing(dtype, rows_at_a_time, monkeypatch):
    monkeypatch.setattr(chunked_loss, "_CACHED_ELEMENTS", rows_at_a_time * 13)
    logits, target = draw(14, 13, dtype=dtype), draw_target(14, classes=13)
    target[3] = -100
    upstream = draw(14, seed=9)
    expected, of_logits = losses_and_gradient(
        lambda x: formula(x, target), logits.double(), upstream
    )
    losses, gradient = losses_and_gradient(
        lambda x: chunked_loss.cross_entropy(x, target, -100, None), logits, upstream
    )
    torch.testing.assert_close(losses.double(), expected, rtol=2e-6, atol=2e-6)
    tolerance = ROUNDING[dtype] * float(upstream.abs().max())
    torch.testing.assert_close(gradient.double(), of_logits, rtol=0, atol=tolerance)


def test_the_gradient_can_be_taken_twice_and_the_logits_are_left_alone():
    logits = draw(3, 8).requires_grad_()
    before = logits.detach().clone()
    total = ml_kernels.cross_entropy(logits, torch.tensor([1, 2, 3])).sum()
    first, second = (torch.autograd.grad(total, logits, retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, second)
    assert torch.equal(logits.detach(), before)


def part_of(tensor, dim):
    """This rank's part, as a leaf of its own."""
    size = tensor.shape[dim] // torch.distributed.get_world_size()
    part = tensor.narrow(dim, torch.distributed.get_rank() * size, size)
    return part.detach().clone().requires_grad_()


def cut_losses_and_gradient(function, logits, target, upstream, **options):
    part = part_of(logits, -1)
    losses = function(part, target, group=torch.distributed.group.WORLD, **options)
    losses.backward(upstream)
    return losses.detach(), part.grad


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_vocabulary_cut_over_ranks_gives_the_same_losses_and_gradients(ranks, backend):
    logits, target = draw(5, 2, 12, scale=3), draw_target(5, 2, classes=12)
    logits[..., -4:] = -torch.inf  # padding: with three ranks the whole part of the last
    target = target % 8
    target[3, 1] = -100
    upstream = draw(5, 2, seed=9)

    def compute():
        return cut_losses_and_gradient(
            ml_kernels.cross_entropy, logits, target, upstream, backend=backend
        )

    expected, of_logits = losses_and_gradient(
        lambda x: formula(x[..., :8], target), logits.double(), upstream
    )
    results = run_ranks(compute, ranks)
    for losses, _ in results:
        torch.testing.assert_close(losses.double(), expected, rtol=2e-6, atol=2e-6)
    found = torch.cat([gradient for _, gradient in results], dim=-1)
    torch.testing.assert_close(found.double(), of_logits, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cut_vocabulary_in_half_precision_is_rounded_once(dtype):
    logits, target = draw(40, 12, dtype=dtype), draw_target(40, classes=12)
    upstream = torch.ones(40)

    def compute():
        return cut_losses_and_gradient(ml_kernels.cross_entropy, logits, target, upstream)

    expected, of_logits = losses_and_gradient(
        lambda x: formula(x, target), logits.double(), upstream
    )
    results = run_ranks(compute, 2)
    torch.testing.assert_close(results[0][0].double(), expected, rtol=2e-6, atol=2e-6)
    found = torch.cat([gradient for _, gradient in results], dim=-1)
    torch.testing.assert_close(found.double(), of_logits, rtol=0, atol=ROUNDING[dtype])


def test_a_cut_vocabulary_costs_two_reductions_whatever_the_number_of_rows(monkeypatch):
    monkeypatch.setattr(chunked_loss, "_CACHED_ELEMENTS", 6)
    logits, target = draw(5, 12), draw_target(5, classes=12)

    def count():
        calls = []
        reduce = torch.distributed.all_reduce
        torch.distributed.all_reduce = lambda x, *given, **named: (
            calls.append(x.numel()),
            reduce(x, *given, **named),
        )
        ml_kernels.cross_entropy(logits[:, :6], target, group=torch.distributed.group.WORLD)
        return calls

    assert run_ranks(count, 2) == [[5, 10]] * 2


def test_a_cut_vocabulary_without_tokens_works():
    def compute():
        logits = torch.zeros(0, 6, requires_grad=True)
        target = torch.zeros(0, dtype=torch.int64)
        losses = ml_kernels.cross_entropy(logits, target, group=torch.distributed.group.WORLD)
        losses.sum().backward()
        return losses.shape, logits.grad.shape

    assert run_ranks(compute, 2) == [((0,), (0, 6))] * 2


def test_a_group_of_one_rank_is_no_group():
    logits, target = draw(4, 6), draw_target(4, classes=6)

    def compute():
        return ml_kernels.cross_entropy(logits, target, group=torch.distributed.group.WORLD)

    assert torch.equal(run_ranks(compute, 1)[0], ml_kernels.cross_entropy(logits, target))


def test_a_rank_outside_the_group_is_told_so():
    def compute():
        group = torch.distributed.new_group([0])
        if torch.distributed.get_rank() == 1:
            with pytest.raises(TypeError, match=r"cross_entropy: group is .* belongs to"):
                ml_kernels.cross_entropy(draw(2, 6), torch.tensor([0, 1]), group=group)

    run_ranks(compute, 2)


def test_second_derivatives_of_a_cut_vocabulary_are_refused():
    def compute():
        logits = draw(2, 6).requires_grad_()
        losses = ml_kernels.cross_entropy(
            *(logits, torch.tensor([0, 7])),
            group=torch.distributed.group.WORLD,
            backend="reference",
        )
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(losses.sum(), logits, create_graph=True)

    run_ranks(compute, 2)


@pytest.mark.parametrize("wrong", [-1, 12, -100])
def test_targets_of_a_cut_vocabulary_must_be_in_the_whole_of_it(wrong):
    def compute():
        target = torch.tensor([11, wrong])
        with pytest.raises(ValueError, match=rf"target {wrong}: must be in \[0, 12\)"):
            ml_kernels.cross_entropy(
                draw(2, 6), target, ignore_index=-7, group=torch.distributed.group.WORLD
            )

    run_ranks(compute, 2)


@pytest.mark.parametrize(
    ("logits", "target", "error", "message"),
    [
        (draw(2, 6), torch.tensor([0, 6]), ValueError, r"target 6: must be in \[0, 6\)"),
        (draw(2, 6), torch.tensor([-1, 0]), ValueError, r"target -1: must be .* ignore_index -100"),
        (draw(2, 6), torch.tensor([0]), ValueError, r"target \(1,\): must be \(2,\)"),
        (draw(2, 6), torch.zeros(2, 6, dtype=torch.int64), ValueError, r"target \(2, 6\)"),
        (draw(2, 6), torch.tensor([0, 1], dtype=torch.int32), TypeError, "int32: must be .*int64"),
        (draw(2, 6), torch.tensor([0.0, 1.0]), TypeError, "target is torch.float32"),
        (draw(2, 6).long(), torch.tensor([0, 1]), TypeError, "logits is torch.int64"),
        (draw(2, 6), torch.zeros(2, dtype=torch.int64, device="meta"), ValueError, "on meta"),
        (torch.tensor(1.0), torch.tensor(0), ValueError, r"logits \(\): must be \(\.\.\., V\)"),
        (draw(2, 0), torch.tensor([0, 0]), ValueError, "vocabulary 0"),
    ],
)
def test_wrong_arguments_are_named(logits, target, error, message):
    with pytest.raises(error, match=f"cross_entropy: .*{message}|cross_entropy: {message}"):
        ml_kernels.cross_entropy(logits, target)


def test_the_reference_is_torchs():
    logits, target = draw(5, 11), draw_target(5, classes=11)
    expected = F.cross_entropy(logits, target, reduction="none")
    assert torch.equal(cross_entropy_reference(logits, target, -100, None), expected)


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_losses_may_be_changed_in_place(device, backend):
    logits = random(4, 13, device=device)
    losses = ml_kernels.cross_entropy(logits, torch.arange(4, device=device), backend=backend)
    (found,) = torch.autograd.grad(losses.mul_(2).sum(), logits)
    again = ml_kernels.cross_entropy(logits, torch.arange(4, device=device), backend=backend)
    assert torch.equal(found, torch.autograd.grad(2 * again.sum(), logits)[0])
