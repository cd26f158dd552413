"""The learning rate of each step: megatron-core's scheduler, placed anew at every step.

The rate is a function of how many updates came before, so no checkpoint has to hold a scheduler.
Megatron's convention: the first step uses the beginning of the warm-up, and each update is one
increment; a step that is skipped is none. The last step of a run without such steps is one short
of the lowest rate. (The log of Megatron shows in the line of step k, from 1, the rate after k
increments: the rate of the step to come.)

Megatron counts increments in samples. Here they are updates: the ratios that decide a rate are the
same, so the rates are equal but for the last bit in a warm-up.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Protocol

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from ml_train.settings import LearningRate

_OVERRIDES = ("max_lr", "min_lr")


class HasParamGroups(Protocol):
    """What of an optimizer the schedule touches; torch's and Megatron's have it."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """One dictionary for each group of parameters."""
        ...


class _NoParameters:
    """An optimizer for a scheduler that is only asked, so that nothing else changes."""

    param_groups: tuple[dict[str, Any], ...] = ()


def learning_rate(config: LearningRate, *, updates: int, train_iters: int) -> float:
    """Return the rate of the step that so many updates came before."""
    return _rate(config, updates, train_iters, {})


def set_learning_rate(
    optimizer: HasParamGroups, config: LearningRate, *, updates: int, train_iters: int
) -> float:
    """Give all parameters the rate of the step that so many updates came before, and return it.

    A group with a `max_lr` or `min_lr` of its own follows the same course between those.
    """
    for group in optimizer.param_groups:
        own = {name: group[name] for name in _OVERRIDES if group.get(name) is not None}
        group["lr"] = _rate(config, updates, train_iters, own)
    return learning_rate(config, updates=updates, train_iters=train_iters)


def _rate(
    config: LearningRate, updates: int, train_iters: int, group: Mapping[str, float]
) -> float:
    scheduler = _scheduler(config, train_iters)
    scheduler.num_steps = updates
    return float(scheduler.get_lr(group))


@functools.lru_cache(maxsize=8)
def _scheduler(config: LearningRate, train_iters: int) -> OptimizerParamScheduler:
    config.check(train_iters)
    decay_iters = config.decay_iters(train_iters)
    return OptimizerParamScheduler(
        _NoParameters(),
        init_lr=config.lr_warmup_init,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_iters(train_iters),
        lr_decay_steps=decay_iters,
        lr_decay_style=config.lr_decay_style,
        wsd_decay_steps=config.lr_wsd_decay_iters,
        lr_wsd_decay_style=config.lr_wsd_decay_style,
        # The weight decay is constant, and the optimizer's own (ml_parallel.optimizer).
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=decay_iters,
        wd_incr_style="constant",
    )
