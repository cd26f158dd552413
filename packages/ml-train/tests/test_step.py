"""Every layout computes what one process computes."""

from __future__ import annotations

import dataclasses
import math
from functools import cache

import pytest
import torch
from training_job import LAYOUTS, UNTIED, Job, Rank, assemble

from ml_models.dropout import Dropout
from ml_parallel.testing import run_ranks
from ml_parallel.topology import Topology
from ml_train.config import Adam

TIED = dataclasses.replace(UNTIED, untie_embeddings_and_output_weights=False, add_qkv_bias=True)
STEPS = 10


def curve(job):
    rank = Rank(job)
    return [dataclasses.astuple(rank.step(i)) for i in range(STEPS)]


def gradients(job):
    from ml_train.step import _run_schedule, seed_step

    rank = Rank(job)
    seed_step(5, 0, rank.place)
    _run_schedule(rank.ddp, rank.batches(0), rank.shape, forward_only=False)
    return rank.shards(lambda s: s.parameter.main_grad.reshape(-1)[s.start : s.stop])


@cache
def single_curve(arch=UNTIED):
    return run_ranks(curve, 1, Job(arch=arch))[0]


@cache
def single_gradients(arch=UNTIED):
    return assemble(run_ranks(gradients, 1, Job(arch=arch)), arch, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ten_steps_follow_the_single_process(layout):
    world_size, topology = LAYOUTS[layout]
    expected = single_curve()
    assert expected[-1][0] < expected[0][0] - 0.2  # it learns something
    for rank_curve in run_ranks(curve, world_size, Job(topology=topology)):
        for found, reference in zip(rank_curve, expected, strict=True):
            assert found[:2] == pytest.approx(reference[:2], rel=1e-4)
            assert found[2]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_agree_with_the_single_process(layout):
    world_size, topology = LAYOUTS[layout]
    ranks = run_ranks(gradients, world_size, Job(topology=topology, micro_batch_size=2))
    found = assemble(ranks, UNTIED, topology.tensor_model_parallel_size)
    for name, expected in single_gradients().items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("layout", ["one process", "tp2", "pp2", "pp2 vpp", "dp2 dist"])
@pytest.mark.parametrize("arch", [UNTIED, TIED], ids=["untied", "tied"])
def test_gradients_in_bfloat16_are_those_of_float32_but_for_rounding(arch, layout):
    """An embedding that is the output layer as well is counted once, not twice."""
    world_size, topology = LAYOUTS.get(layout, (1, Topology()))
    job = Job(arch=arch, topology=topology, dtype=torch.bfloat16)
    found = assemble(
        run_ranks(gradients, world_size, job), arch, topology.tensor_model_parallel_size
    )
    for name, expected in single_gradients(arch).items():
        error = torch.linalg.vector_norm(found[name] - expected)
        assert error < 0.05 * torch.linalg.vector_norm(expected), name


def evaluations(job):
    """Return the loss of new data before and after a step, and that step's and the next one's."""
    rank = Rank(job)
    before = rank.evaluate(7)
    first = rank.step(0).loss
    after = rank.evaluate(7)
    return before, first, after, rank.step(1).loss


@pytest.mark.parametrize(
    "layout", ["tp2 pp2 sp", "pp2 vpp", "dp4 dist overlap", "pp2 vpp dp2 dist overlap"]
)
def test_an_evaluation_agrees_with_the_single_process_and_leaves_no_trace(layout):
    world_size, topology = LAYOUTS[layout]
    (expected,) = run_ranks(evaluations, 1, Job())
    assert expected[1::2] == pytest.approx([entry[0] for entry in single_curve()[:2]], rel=1e-6)
    assert expected[2] != pytest.approx(expected[0], rel=1e-4)
    for found in run_ranks(evaluations, world_size, Job(topology=topology)):
        assert found == pytest.approx(expected, rel=1e-5)


def test_an_evaluation_drops_nothing_out():
    with_dropout = Job(dropout=Dropout(hidden_dropout=0.2, attention_dropout=0.2))
    (found,), (expected,) = (run_ranks(evaluations, 1, job) for job in (with_dropout, Job()))
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1] != pytest.approx(expected[1], rel=1e-4)


@pytest.mark.parametrize("layout", ["tp2", "pp2", "tp2 pp2 sp", "pp2 vpp dp2 dist overlap"])
def test_tied_embeddings_and_biases_agree_with_the_single_process(layout):
    world_size, topology = LAYOUTS[layout]
    job = Job(topology=topology, arch=TIED)
    losses = [entry[:2] for entry in run_ranks(curve, world_size, job)[0]]
    for found, expected in zip(losses, single_curve(TIED), strict=True):
        assert found == pytest.approx(expected[:2], rel=1e-4)


@pytest.mark.parametrize("layout", ["dp2 dist", "tp2 pp2 sp"])
def test_bfloat16_stays_near_the_single_process_in_float32(layout):
    world_size, topology = LAYOUTS[layout]
    found = run_ranks(curve, world_size, Job(topology=topology, dtype=torch.bfloat16))[0]
    for (loss, *_), (expected, *_) in zip(found, single_curve(), strict=True):
        assert loss == pytest.approx(expected, rel=5e-3)


def scaled_curve(job):
    rank = Rank(job)
    steps = []
    for i in range(2 * STEPS):
        scale = float(rank.optimizer.get_loss_scale())
        result = rank.step(i)
        steps.append((scale, result.loss, result.updated))
    return steps


def scales_for(updated, scale, window):
    """Yield the scale of each step: halved after an overflow, doubled after a window without."""
    in_a_row = 0
    for was_updated in updated:
        yield scale
        in_a_row = in_a_row + 1 if was_updated else 0
        if not was_updated:
            scale /= 2
        elif in_a_row % window == 0:
            scale *= 2


def test_float16_trains_with_a_loss_scale_that_adapts():
    adam = Adam(initial_loss_scale=2.0**24, hysteresis=1, loss_scale_window=3)
    scales, losses, updated = zip(
        *run_ranks(scaled_curve, 2, Job(dtype=torch.float16, optimizer=adam))[0], strict=True
    )
    first = updated.index(True)
    assert 0 < first < STEPS  # the first scale is too large by far
    assert sum(updated) > STEPS
    assert scales == tuple(scales_for(updated, 2.0**24, 3))
    assert len(set(scales[first:])) > 1
    # Skipped steps did not touch the weights: the first loss is that of new ones on its data.
    (expected,) = run_ranks(untrained_loss, 1, Job(), first)
    assert losses[first] == pytest.approx(expected, rel=5e-3)
    assert losses[-1] < losses[first] - 0.2


def untrained_loss(job, iteration):
    return Rank(job).evaluate(iteration)


def weights_around_poison(job, poison):
    rank = Rank(job)
    rank.step(0)
    before = rank.shards(lambda s: s.main)
    result = rank.step(1, poison=poison if rank.place.dp_rank == 1 else None)
    after = rank.shards(lambda s: s.main)
    same = all((a[-1] == b[-1]).all() for a, b in zip(before, after, strict=True))
    recovered = rank.step(2)
    return result.updated, result.finite, same, recovered.updated and math.isfinite(recovered.loss)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("layout", ["dp2", "tp2 dp2 sp dist"])
def test_a_nan_on_one_rank_updates_no_weight_on_any(layout, poison):
    world_size, topology = LAYOUTS[layout]
    results = run_ranks(weights_around_poison, world_size, Job(topology=topology), poison)
    assert results == [(False, False, True, True)] * world_size


def dropped(job, iteration):
    from ml_train.step import seed_step, train_step

    rank = Rank(job)
    seed_step(5, iteration, rank.place)
    batches = rank.batches(0)
    return train_step(
        rank.ddp, rank.optimizer, batches, rank.shape, stop_requested=lambda: False
    ).loss


def test_dropout_masks_follow_from_the_step_alone():
    job = Job(dropout=Dropout(hidden_dropout=0.2, attention_dropout=0.2))
    first, again, other_step = (run_ranks(dropped, 2, job, step)[0] for step in (3, 3, 4))
    assert first == again
    assert first != pytest.approx(other_step, rel=1e-6)
    assert first != pytest.approx(single_curve()[0][0], rel=1e-6)
