"""The cross entropy of a linear layer, which never holds all the logits."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from gloo_ranks import run_ranks
from live_memory import peak_bytes
from oracle import runs
from torch.nn import functional as F

import ml_kernels
from ml_kernels import chunked_loss

RUNS = runs("linear_cross_entropy")
IN_FLOAT32 = [run for run in RUNS if run.values[1] != "reference"]
"""Which scale the gradients in float32: the reference rounds those of the logits first."""
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
"""Relative, of the norm of a gradient."""


def draw(*shape, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def draw_target(*shape, classes=11, seed=1):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def formula(hidden, weight, target, token_weights=None, reduction="mean", ignore_index=-100):
    """The weighted sum of float64 losses, token by token."""
    if token_weights is None:
        token_weights = torch.ones(target.shape)
    total = weighted = 0.0
    tokens = zip(hidden.flatten(0, -2), target.flatten(), token_weights.flatten(), strict=True)
    for token, wanted, factor in tokens:
        if wanted != ignore_index:
            logits = weight @ token
            weighted = weighted + factor.double() * (logits.exp().sum().log() - logits[wanted])
            total += factor.double()
    return weighted if reduction == "sum" else weighted / total


def loss_and_gradients(function, hidden, weight, upstream=1.0):
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = function(*leaves)
    (loss * upstream).backward()
    return loss.detach(), *(leaf.grad for leaf in leaves)


def assert_close(found, expected, tolerance):
    torch.testing.assert_close(found[0].cpu().double(), expected[0], rtol=tolerance, atol=1e-6)
    for gradient, exact in zip(found[1:], expected[1:], strict=True):
        assert (gradient.cpu().double() - exact).norm() <= tolerance * exact.norm()


def assert_matches(
    device, backend, hidden, weight, target, upstream=1.0, token_weights=None, **options
):
    expected = loss_and_gradients(
        lambda h, w: formula(h, w, target, token_weights, **options),
        hidden.double(),
        weight.double(),
        upstream,
    )
    on_device = None if token_weights is None else token_weights.to(device)
    found = loss_and_gradients(
        lambda h, w: ml_kernels.linear_cross_entropy(
            h, w, target.to(device), token_weights=on_device, backend=backend, **options
        ),
        hidden.to(device),
        weight.to(device),
        upstream,
    )
    assert found[0].shape == ()
    assert found[0].dtype == torch.float32
    assert found[1].dtype == found[2].dtype == hidden.dtype
    assert_close(found, expected, TOLERANCE[hidden.dtype])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_loss_and_gradients_match_the_formula(device, backend, dtype, reduction):
    hidden, weight = draw(9, 2, 8, dtype=dtype), draw(11, 8, dtype=dtype, seed=2)
    assert_matches(device, backend, hidden, weight, draw_target(9, 2), reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignore_index", [-100, 4])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_ignored_tokens_take_no_part_and_others_by_their_weights(
    device, backend, ignore_index, reduction
):
    target, token_weights = draw_target(9, 2), torch.rand(9, 2).bfloat16()
    target[2], target[7, 1], token_weights[5] = ignore_index, ignore_index, 0
    options = {"reduction": reduction, "ignore_index": ignore_index}
    inputs = draw(9, 2, 8), draw(11, 8, seed=2), target
    assert_matches(device, backend, *inputs, **options)
    assert_matches(device, backend, *inputs, token_weights=token_weights, **options)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_what_is_not_finite_in_an_ignored_token_takes_no_part(device, backend, bad, dtype):
    target, token_weights = draw_target(9), torch.rand(9)
    clean, weight = draw(9, 8, dtype=dtype), draw(11, 8, dtype=dtype, seed=2)
    hidden = clean.clone()
    target[4], hidden[4, 3], token_weights[4] = -100, bad, bad

    def compute(hidden, token_weights):
        return loss_and_gradients(
            lambda h, w: ml_kernels.linear_cross_entropy(
                *(h, w, target.to(device)), token_weights=token_weights.to(device), backend=backend
            ),
            hidden.to(device),
            weight.to(device),
        )

    expected = compute(clean, token_weights.masked_fill(target < 0, 0))
    found = compute(hidden, token_weights)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not found[1][4].any()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_vocabulary_of_nan_is_not_seen_by_ignored_tokens(backend):
    target, weight = torch.full((3,), -100), torch.full((11, 8), torch.nan)
    assert ml_kernels.linear_cross_entropy(draw(3, 8), weight, target, backend=backend) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.bool])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_loss_is_in_float32_whatever_the_dtype_of_the_token_weights(backend, dtype):
    token_weights = (torch.arange(9) % 3 > 0).to(dtype)
    for reduction in ("mean", "sum"):
        assert_matches(
            *("cpu", backend, draw(9, 8).bfloat16(), draw(11, 8).bfloat16(), draw_target(9)),
            token_weights=token_weights,
            reduction=reduction,
        )


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_a_loss_mask_of_bools_gives_torchs_mean_of_what_it_shows(device, backend):
    hidden, weight = draw(9, 8).to(device), draw(11, 8, seed=2).to(device)
    target, shown = draw_target(9).to(device), (torch.arange(9) % 3 > 0).to(device)
    loss = ml_kernels.linear_cross_entropy(
        hidden, weight, target, token_weights=shown, backend=backend
    )
    expected = F.cross_entropy((hidden @ weight.t())[shown], target[shown])
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("upstream", [-0.25, 1024.0])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_the_upstream_gradient_scales_both(device, backend, upstream):
    inputs = draw(9, 2, 8), draw(11, 8, seed=2), draw_target(9, 2)
    assert_matches(device, backend, *inputs, upstream=upstream)


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_views_and_any_number_of_dimensions_are_accepted(device, backend):
    hidden = draw(8, 6, 5).permute(2, 1, 0)[:, ::2]
    weight, target = draw(8, 22, seed=2).t()[::2], draw_target(3, 5).t()
    assert not hidden.is_contiguous()
    assert not weight.is_contiguous()
    assert_matches(device, backend, hidden, weight, target)
    assert_matches(device, backend, draw(8).expand(4, 8), weight, target[:4, 0])


@pytest.mark.parametrize("shape", [(8,), (1, 8), (2, 1, 3, 8)])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_one_token_has_the_loss_of_torch(device, backend, shape):
    hidden, weight = draw(*shape).to(device), draw(11, 8, seed=2).to(device)
    target = draw_target(*shape[:-1]).to(device)
    loss = ml_kernels.linear_cross_entropy(hidden, weight, target, backend=backend)
    rows = (hidden @ weight.t()).reshape(-1, 11)
    torch.testing.assert_close(loss, F.cross_entropy(rows, target.reshape(-1)))


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_hidden_states_of_no_channel_say_nothing_of_the_target(device, backend):
    found = loss_and_gradients(
        lambda h, w: ml_kernels.linear_cross_entropy(
            h, w, torch.tensor([1, 0], device=device), backend=backend
        ),
        torch.zeros(2, 0, device=device),
        torch.zeros(11, 0, device=device),
    )
    assert found[0].item() == pytest.approx(math.log(11))
    assert [t.shape for t in found[1:]] == [(2, 0), (11, 0)]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_the_loss_of_no_token_is_zero_and_so_are_its_gradients(device, backend, tokens, reduction):
    found = loss_and_gradients(
        lambda h, w: ml_kernels.linear_cross_entropy(
            h, w, torch.full((tokens,), -100, device=device), reduction=reduction, backend=backend
        ),
        draw(tokens, 8).to(device),
        draw(11, 8).to(device),
    )
    assert [t.shape for t in found] == [(), (tokens, 8), (11, 8)]
    assert not any(t.any() for t in found)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_gradients_are_those_of_the_function(backend):
    hidden, weight = (draw(n, 4, dtype=torch.float64, seed=n).requires_grad_() for n in (6, 5))
    target, token_weights = draw_target(6, classes=5), torch.rand(6)
    target[2] = -100

    def function(hidden, weight):
        return ml_kernels.linear_cross_entropy(
            hidden, weight, target, token_weights=token_weights, backend=backend
        )

    assert torch.autograd.gradcheck(function, (hidden, weight))


@pytest.mark.parametrize("tokens_at_a_time", [1, 4, 5, 100])
@pytest.mark.parametrize("in_the_cache", [1, 3, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_tokens_at_a_time_changes_nothing(
    dtype, in_the_cache, tokens_at_a_time, monkeypatch
):
    monkeypatch.setattr(chunked_loss, "_CHUNK_ELEMENTS", tokens_at_a_time * 11)
    monkeypatch.setattr(chunked_loss, "_CACHED_ELEMENTS", in_the_cache * 11)
    monkeypatch.setattr(chunked_loss, "_BLOCK_ELEMENTS", 3 * 8)
    hidden, weight = draw(9, 2, 8, dtype=dtype), draw(11, 8, dtype=dtype, seed=2)
    assert_matches("cpu", "cpu", hidden, weight, draw_target(9, 2))


def test_a_bfloat16_weight_gradient_does_not_lose_what_many_chunks_add(monkeypatch):
    monkeypatch.setattr(chunked_loss, "_CHUNK_ELEMENTS", 11)
    hidden, weight = draw(300, 8, dtype=torch.bfloat16).abs(), draw(11, 8, dtype=torch.bfloat16)
    target = draw_target(300)
    expected = loss_and_gradients(
        lambda h, w: F.cross_entropy(h @ w.t(), target), hidden.double(), weight.double()
    )
    found = loss_and_gradients(
        lambda h, w: ml_kernels.linear_cross_entropy(h, w, target), hidden, weight
    )
    # 300 additions in bfloat16 would be off by several percent.
    assert_close(found, expected, TOLERANCE[torch.bfloat16] / 3)


def test_a_loss_scale_saves_small_float16_gradients():
    hidden, weight = draw(512, 8, dtype=torch.float16), draw(1000, 8, dtype=torch.float16) / 8
    target = draw_target(512)
    _, *expected = loss_and_gradients(
        lambda h, w: F.cross_entropy(h @ w.t(), target), hidden.double(), weight.double(), 4096.0
    )
    _, *found = loss_and_gradients(
        lambda h, w: ml_kernels.linear_cross_entropy(h, w, target), hidden, weight, 4096.0
    )
    # The rows of tokens that are no target: probabilities of 1/1000, divided by 512 tokens.
    for one, other in ((found[0], expected[0]), (found[1][11:], expected[1][11:])):
        assert (one.double() - other).norm() < TOLERANCE[torch.float16] * other.norm()


def test_the_sum_of_float16_gradients_may_be_out_of_range_if_their_mean_is_not(monkeypatch):
    monkeypatch.setattr(chunked_loss, "_CHUNK_ELEMENTS", 100 * 11)
    hidden = torch.full((1000, 8), 256.0).half()
    target = torch.full((1000,), 3)
    _, _, of_weight = loss_and_gradients(
        lambda h, w: ml_kernels.linear_cross_entropy(h, w, target),
        hidden,
        torch.zeros(11, 8).half(),
    )
    expected = (torch.full((11, 1), 1 / 11) - torch.eye(11)[:, 3:4]).expand(11, 8) * 256
    torch.testing.assert_close(of_weight.float(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("factor", "reduction", "upstream"),
    [(1e-6, "mean", 1024.0), (1e-6, "sum", 65536.0), (1e5, "mean", 1024.0), (-1e5, "sum", 1e-3)],
)
@pytest.mark.parametrize(("device", "backend"), IN_FLOAT32)
def test_float16_gradients_do_not_depend_on_the_unit_of_the_token_weights(
    device, backend, factor, reduction, upstream
):
    inputs = draw(64, 8, dtype=torch.float16), draw(11, 8, dtype=torch.float16, seed=2)
    token_weights = torch.linspace(0.5, 1, 64) * factor
    options = {"reduction": reduction, "token_weights": token_weights}
    assert_matches(device, backend, *inputs, draw_target(64), upstream, **options)


@pytest.mark.parametrize(("device", "backend"), IN_FLOAT32)
def test_a_loss_scale_above_the_range_of_float16_is_not_rounded_to_it(device, backend):
    hidden = draw(1, 8, dtype=torch.float16, scale=1e-3)
    weight = draw(11, 8, dtype=torch.float16, seed=2, scale=1e-3)
    assert_matches(device, backend, hidden, weight, draw_target(1), 65536.0, reduction="sum")


@pytest.mark.parametrize("token_weights", [torch.zeros(9), torch.zeros(9, dtype=torch.bool)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_float16_token_weights_of_zero_give_zero(token_weights, reduction):
    found = loss_and_gradients(
        lambda h, w: ml_kernels.linear_cross_entropy(
            h, w, draw_target(9), token_weights=token_weights, reduction=reduction
        ),
        draw(9, 8, dtype=torch.float16),
        draw(11, 8, dtype=torch.float16),
    )
    assert not any(t.any() for t in found)


@pytest.mark.parametrize("public", [True, False])
def test_the_gradients_can_be_taken_twice(public, monkeypatch):
    if not public:  # a torch that cannot tell whether the graph is kept
        monkeypatch.delattr(torch._C._autograd, "_get_current_graph_task_keep_graph")
    leaves = draw(9, 8).requires_grad_(), draw(11, 8, seed=2).requires_grad_()
    loss = ml_kernels.linear_cross_entropy(*leaves, draw_target(9))
    first = torch.autograd.grad(loss, leaves, torch.tensor(3.0), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(loss, leaves, torch.tensor(6.0))
    for one, same, twice in zip(first, kept, second, strict=True):
        assert torch.equal(one, same)
        assert torch.equal(2 * one, twice)


def test_the_inputs_are_left_alone():
    inputs = draw(9, 8).requires_grad_(), draw(11, 8).requires_grad_(), draw_target(9)
    before = [t.detach().clone() for t in inputs]
    ml_kernels.linear_cross_entropy(*inputs).backward()
    assert all(torch.equal(t.detach(), b) for t, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("trained", [(True, False), (False, True)])
def test_a_frozen_input_gets_no_gradient_and_the_other_the_same(trained):
    target = draw_target(9)
    leaves = [draw(n, 8, seed=n).requires_grad_() for n in (9, 11)]
    both = torch.autograd.grad(ml_kernels.linear_cross_entropy(*leaves, target), leaves)
    for leaf, train in zip(leaves, trained, strict=True):
        leaf.requires_grad_(train)
    ml_kernels.linear_cross_entropy(*leaves, target).backward()
    for leaf, train, expected in zip(leaves, trained, both, strict=True):
        assert torch.equal(leaf.grad, expected) if train else leaf.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_autocast_casts_as_the_linear_layer_of_torch(device, backend, dtype):
    hidden, weight = draw(9, 8, dtype=dtype).to(device), draw(11, 8, seed=2).to(device)
    target = draw_target(9).to(device)

    def ours(hidden, weight):
        return ml_kernels.linear_cross_entropy(hidden, weight, target, backend=backend)

    with torch.autocast(device, torch.bfloat16):
        found = loss_and_gradients(ours, hidden, weight)
    narrow = hidden.bfloat16().double(), weight.bfloat16().double()
    expected = loss_and_gradients(lambda h, w: F.cross_entropy(h @ w.t(), target), *narrow)
    assert [t.dtype for t in found] == [torch.float32, dtype, torch.float32]
    assert_close(found, [t.cpu() for t in expected], TOLERANCE[torch.bfloat16])
    with torch.autocast(device, torch.bfloat16):
        exact = loss_and_gradients(ours, hidden.double(), weight.double())
    assert [t.dtype for t in exact] == [torch.float64] * 3
    with pytest.raises(TypeError, match=r"weight is torch\.float32: must be torch\.bfloat16"):
        ours(hidden.bfloat16(), weight)


HIDDEN, VOCABULARY, TOKENS = 32, 2000, 400
LOGITS = 4 * TOKENS * VOCABULARY
OF_WEIGHT, OF_HIDDEN = 4 * VOCABULARY * HIDDEN, 4 * TOKENS * HIDDEN


def peak(backend="cpu", hidden_trained=True, weight_trained=True, grad=True):
    hidden, weight = draw(TOKENS, HIDDEN), draw(VOCABULARY, HIDDEN)
    hidden.requires_grad_(hidden_trained)
    weight.requires_grad_(weight_trained)
    target = draw_target(TOKENS, classes=VOCABULARY)

    def train():
        with torch.set_grad_enabled(grad):
            loss = ml_kernels.linear_cross_entropy(hidden, weight, target, backend=backend)
        if loss.requires_grad:
            (loss * 0.5).backward()

    return peak_bytes(train)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked_loss, "_CHUNK_ELEMENTS", 20 * VOCABULARY)
    monkeypatch.setattr(chunked_loss, "_CACHED_ELEMENTS", 10 * VOCABULARY)
    return 4 * 20 * VOCABULARY


@pytest.mark.usefixtures("small_chunks")
def test_the_logits_of_all_tokens_never_exist(small_chunks):
    gradients = OF_WEIGHT + OF_HIDDEN
    assert gradients < peak() < gradients + 1.5 * small_chunks < 0.2 * LOGITS
    assert peak("reference") > 2 * LOGITS


def test_what_is_not_wanted_is_not_computed(small_chunks):
    assert OF_WEIGHT < peak(hidden_trained=False) < OF_WEIGHT + 1.5 * small_chunks
    assert OF_HIDDEN < peak(weight_trained=False) < OF_HIDDEN + 1.5 * small_chunks
    assert peak(grad=False) < 1.5 * small_chunks
    assert peak(hidden_trained=False, weight_trained=False) < 1.5 * small_chunks


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "size"),
    [(8192, 128_000, 1024), (8192, 32_000, 1024), (65_536, 128_000, 1048), (512, 32_000, 262)],
)
def test_an_accelerator_takes_an_eighth_of_the_tokens_within_bounds(tokens, vocabulary, size):
    hidden, weight = (torch.empty(n, 8, device="meta") for n in (tokens, vocabulary))
    assert chunked_loss._linear_sizes(hidden, weight, None) == (size, size)


MEASURE = """
import resource, torch, ml_kernels
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def train(tokens):
    hidden, target = torch.randn(tokens, 64, requires_grad=True), torch.arange(tokens)
    ml_kernels.linear_cross_entropy(hidden, weight, target).mul(0.5).backward()
weight = torch.randn(32000, 64, requires_grad=True)
train(1)
weight.grad = None
before = peak()
train(1024)
print(peak() - before)
"""


def test_the_process_grows_by_a_fraction_of_the_logits():
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    output = subprocess.check_output([sys.executable, "-c", MEASURE], env=environment, timeout=60)
    logits, weight, chunk = 4 * 1024 * 32000, 4 * 32000 * 64, 4 * chunked_loss._CHUNK_ELEMENTS
    assert int(output) < 1.5 * (weight + chunk) < 0.5 * logits


def cut_loss_and_gradients(hidden, weight, target, **options):
    world = torch.distributed.group.WORLD
    rank, size = torch.distributed.get_rank(), weight.shape[0] // world.size()
    part = weight[rank * size : (rank + 1) * size]
    return loss_and_gradients(
        lambda h, w: ml_kernels.linear_cross_entropy(h, w, target, group=world, **options),
        hidden,
        part,
        upstream=3.0,
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_weight_cut_over_ranks_gives_the_same_loss_and_gradients(ranks, backend, monkeypatch):
    monkeypatch.setattr(chunked_loss, "_CHUNK_ELEMENTS", 5 * 12 // ranks)
    hidden, weight, target = draw(9, 2, 8), draw(12, 8, seed=2), draw_target(9, 2, classes=12)
    token_weights = torch.rand(9, 2)
    target[4, 1] = -100

    def compute():
        return cut_loss_and_gradients(
            hidden, weight, target, token_weights=token_weights, backend=backend
        )

    expected = loss_and_gradients(
        lambda h, w: formula(h, w, target, token_weights), hidden.double(), weight.double(), 3.0
    )
    results = run_ranks(compute, ranks)
    of_weight = torch.cat([result[2] for result in results])
    for loss, of_hidden, _ in results:
        assert_close((loss, of_hidden, of_weight), expected, TOLERANCE[torch.float32])


def test_a_cut_weight_in_float16_takes_token_weights_in_any_unit():
    hidden, weight = draw(40, 8, dtype=torch.float16), draw(12, 8, dtype=torch.float16, seed=2)
    target, token_weights = draw_target(40, classes=12), torch.linspace(0.5, 1, 40) * 1e5
    expected = loss_and_gradients(
        lambda h, w: formula(h, w, target, token_weights), hidden.double(), weight.double(), 3.0
    )
    results = run_ranks(
        lambda: cut_loss_and_gradients(hidden, weight, target, token_weights=token_weights), 2
    )
    of_weight = torch.cat([result[2] for result in results])
    assert_close((*results[0][:2], of_weight), expected, TOLERANCE[torch.float16])


def test_second_derivatives_of_a_cut_weight_are_refused():
    def compute():
        leaves = draw(4, 8).requires_grad_(), draw(6, 8).requires_grad_()
        loss = ml_kernels.linear_cross_entropy(
            *(*leaves, draw_target(4)), group=torch.distributed.group.WORLD, backend="reference"
        )
        for leaf in leaves:
            with pytest.raises(RuntimeError, match="differentiable once"):
                torch.autograd.grad(loss, leaf, create_graph=True, retain_graph=True)

    run_ranks(compute, 2)


def test_a_rank_outside_the_group_is_told_so():
    def compute():
        group = torch.distributed.new_group([0])
        if torch.distributed.get_rank() == 1:
            with pytest.raises(TypeError, match=r"linear_cross_entropy: group is .* belongs to"):
                ml_kernels.linear_cross_entropy(
                    draw(4, 8), draw(11, 8), draw_target(4), group=group
                )

    run_ranks(compute, 2)


def test_a_cut_weight_in_bfloat16_is_as_exact_as_a_whole_one():
    hidden, weight = draw(40, 8, dtype=torch.bfloat16), draw(12, 8, dtype=torch.bfloat16, seed=2)
    target = draw_target(40, classes=12)
    expected = loss_and_gradients(
        lambda h, w: F.cross_entropy(h @ w.t(), target), hidden.double(), weight.double(), 3.0
    )
    results = run_ranks(lambda: cut_loss_and_gradients(hidden, weight, target), 2)
    of_weight = torch.cat([result[2] for result in results])
    assert_close((*results[0][:2], of_weight), expected, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": draw(4, 7)}, ValueError, r"weight \(11, 8\): must be \(V, 7\)"),
        ({"weight": draw(11)}, ValueError, r"weight \(11,\): must be \(V, 8\)"),
        ({"weight": draw(11, 8).bfloat16()}, TypeError, "weight is torch.bfloat16: must be .*32"),
        ({"weight": draw(11, 8).to("meta")}, ValueError, "weight is on meta: must be on cpu"),
        ({"weight": draw(0, 8)}, ValueError, "vocabulary 0"),
        ({"hidden": draw(4, 8).long()}, TypeError, "hidden is torch.int64"),
        ({"hidden": torch.tensor(1.0)}, ValueError, r"hidden \(\): must be \(\.\.\., H\)"),
        ({"target": draw_target(3)}, ValueError, r"target \(3,\): must be \(4,\)"),
        ({"target": draw_target(4).int()}, TypeError, "target is torch.int32"),
        ({"target": torch.tensor([0, 1, 2, 11])}, ValueError, r"target 11: must be in \[0, 11\)"),
        ({"token_weights": torch.ones(3)}, ValueError, r"token_weights \(3,\): must be \(4,\)"),
        ({"token_weights": torch.ones(4, requires_grad=True)}, ValueError, "token_weights require"),
        ({"token_weights": torch.ones(4, device="meta")}, ValueError, "token_weights is on meta"),
        ({"token_weights": torch.ones(4).cfloat()}, TypeError, "token_weights is torch.complex64"),
        ({"reduction": "none"}, ValueError, "reduction none: must be mean or sum"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    given = {"hidden": draw(4, 8), "weight": draw(11, 8), "target": draw_target(4)} | changes
    with pytest.raises(error, match=f"linear_cross_entropy: {message}"):
        ml_kernels.linear_cross_entropy(**given)
