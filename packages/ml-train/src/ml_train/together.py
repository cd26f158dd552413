"""Ranks that decide together: what fails on one of them for the user's reasons, fails on all.

A rank that raised alone would leave the others waiting for it in the next collective.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ml_models.flags import UsageError
from ml_parallel.checkpoint import CheckpointError

T = TypeVar("T")

_FAILURES = (UsageError, CheckpointError, OSError)


def on_rank_0(decide: Callable[[], T]) -> T:
    """Return to all ranks what rank 0 decides, or raise on all what it raised for the user."""
    box: list[Any] = [_outcome(decide) if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(box, src=0)
    return _results(box)[0]


def on_every_rank(work: Callable[[], T]) -> list[T]:
    """Return what `work` returns on each rank, or raise on all what one raised for the user."""
    outcomes: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(outcomes, _outcome(work))
    return _results(outcomes)


def _outcome(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except _FAILURES as error:
        return None, error


def _results(outcomes: list[Any]) -> list[Any]:
    for _, error in outcomes:
        if error is not None:
            raise error
    return [result for result, _ in outcomes]
