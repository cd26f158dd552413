"""The rates are those of Megatron's scheduler stepped through a run, and of the formulas."""

from __future__ import annotations

import math

import pytest
import torch

from ml_parallel import platform
from ml_train.settings import LearningRate

platform.import_engine()

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # noqa: E402

from ml_train.schedule import learning_rate, set_learning_rate  # noqa: E402

TRAIN_ITERS = 50
SCHEDULES = {
    "constant": LearningRate(lr=3e-4, lr_decay_style="constant"),
    "constant after a warm-up": LearningRate(
        lr=3e-4, lr_decay_style="constant", lr_warmup_iters=7, lr_warmup_init=1e-6
    ),
    "linear": LearningRate(lr=1e-3, min_lr=1e-5, lr_decay_style="linear", lr_warmup_iters=6),
    "cosine": LearningRate(
        lr=1e-3, min_lr=1e-4, lr_decay_style="cosine", lr_warmup_iters=6, lr_decay_iters=40
    ),
    "cosine with a fraction": LearningRate(
        lr=1e-3, lr_decay_style="cosine", lr_warmup_fraction=0.07
    ),
    "inverse square root": LearningRate(
        lr=1e-3, min_lr=5e-4, lr_decay_style="inverse-square-root", lr_warmup_iters=5
    ),
    "WSD": LearningRate(lr=1e-3, lr_decay_style="WSD", lr_warmup_iters=5, lr_wsd_decay_iters=10),
    "WSD by its root": LearningRate(
        lr=1e-3, lr_decay_style="WSD", lr_wsd_decay_iters=10, lr_wsd_decay_style="minus_sqrt"
    ),
}


def rates(config: LearningRate, steps: int = TRAIN_ITERS) -> list[float]:
    return [learning_rate(config, updates=k, train_iters=TRAIN_ITERS) for k in range(steps)]


def megatrons_rates(config: LearningRate, batch: int) -> list[float]:
    """Train as Megatron does: each step uses the group's rate, then `batch` samples are counted."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=123.0)
    fraction = config.lr_warmup_fraction
    decay = (config.lr_decay_iters or TRAIN_ITERS) * batch
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=config.lr_warmup_init,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.lr_warmup_iters * batch if fraction is None else fraction * decay,
        lr_decay_steps=decay,
        lr_decay_style=config.lr_decay_style,
        wsd_decay_steps=(config.lr_wsd_decay_iters or 0) * batch,
        lr_wsd_decay_style=config.lr_wsd_decay_style,
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=decay,
        wd_incr_style="constant",
    )
    used = []
    for _ in range(TRAIN_ITERS):
        used.append(optimizer.param_groups[0]["lr"])
        scheduler.step(batch)
    return used


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_step_has_the_rate_of_megatrons_to_the_bit(name: str) -> None:
    assert rates(SCHEDULES[name]) == megatrons_rates(SCHEDULES[name], batch=1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_counting_samples_instead_of_steps_changes_no_more_than_the_last_bit(name: str) -> None:
    expected = megatrons_rates(SCHEDULES[name], batch=24)
    assert rates(SCHEDULES[name]) == pytest.approx(expected, rel=1e-15, abs=1e-20)


def test_the_cosine_is_the_published_one() -> None:
    config = LearningRate(lr=1.0, min_lr=0.1, lr_decay_style="cosine", lr_warmup_iters=10)
    at = {k: learning_rate(config, updates=k, train_iters=110) for k in (0, 5, 10, 35, 60, 110)}
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))
    assert at == pytest.approx({0: 0.0, 5: 0.5, 10: 1.0, 35: quarter, 60: 0.55, 110: 0.1})


def test_the_linear_decay_ends_at_the_lowest_rate_and_stays_there() -> None:
    config = LearningRate(lr=1.0, min_lr=0.2, lr_decay_iters=40)
    at = {k: learning_rate(config, updates=k, train_iters=100) for k in (0, 10, 40, 41, 99)}
    assert at == pytest.approx({0: 1.0, 10: 0.8, 40: 0.2, 41: 0.2, 99: 0.2})


def test_steps_may_be_asked_for_in_any_order() -> None:
    forth = rates(SCHEDULES["cosine"])
    other = SCHEDULES["linear"]
    back = []
    for updates in reversed(range(TRAIN_ITERS)):
        learning_rate(other, updates=3, train_iters=TRAIN_ITERS)
        config = SCHEDULES["cosine"]
        back.append(learning_rate(config, updates=updates, train_iters=TRAIN_ITERS))
    assert back[::-1] == forth


def test_setting_it_changes_the_rate_and_nothing_else_of_a_group() -> None:
    parameters = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    groups = [{"params": [parameters[0]]}, {"params": [parameters[1]], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=123.0, weight_decay=0.1)
    config = SCHEDULES["linear"]
    rate = set_learning_rate(optimizer, config, updates=9, train_iters=TRAIN_ITERS)
    assert rate == learning_rate(config, updates=9, train_iters=TRAIN_ITERS)
    assert [group["lr"] for group in optimizer.param_groups] == [rate, rate]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_a_group_with_limits_of_its_own_moves_between_them() -> None:
    parameters = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    groups = [
        {"params": [parameters[0]], "max_lr": 10.0, "min_lr": 5.0},
        {"params": [parameters[1]], "max_lr": None, "min_lr": None},  # as Megatron leaves them
    ]
    optimizer = torch.optim.SGD(groups, lr=123.0)
    config = LearningRate(lr=1.0, min_lr=0.0)
    rate = set_learning_rate(optimizer, config, updates=25, train_iters=TRAIN_ITERS)
    assert rate == 0.5
    assert [group["lr"] for group in optimizer.param_groups] == [7.5, 0.5]


def test_a_schedule_that_does_not_fit_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match="--lr-warmup-iters 99: must be less than --train-iters"):
        learning_rate(LearningRate(lr=1, lr_warmup_iters=99), updates=0, train_iters=TRAIN_ITERS)
