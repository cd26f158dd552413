"""Checkpoints of a small job, written, changed, and gone on from."""

from __future__ import annotations

import argparse
import logging

import torch
from training_job import LAYOUTS, Job, Rank

from ml_models.flags import UsageError
from ml_parallel.checkpoint import MANIFEST
from ml_parallel.testing import run_ranks


def every_tensor(rank):
    """Return weights and moments of the rank's shards, by kind."""
    moments = {key: (lambda s, key=key: s.state[key]) for key in ("exp_avg", "exp_avg_sq")}
    return {kind: rank.shards(read) for kind, read in {"main": lambda s: s.main, **moments}.items()}


def train(job, steps, root=None, start=None, stop=None):
    """Run steps [start, stop) after loading from root, if start is given; save at stop."""
    from ml_train import checkpoint
    from ml_train.state import Progress

    rank = Rank(job)
    first = 0
    if start is not None:
        progress = checkpoint.load(root, rank.state)
        assert progress == Progress(
            iteration=start, consumed_samples=8 * start, consumed_tokens=99 * start
        )
        first = start
    before = every_tensor(rank)
    losses = [rank.step(i).loss for i in range(first, stop or steps)]
    if stop is not None:
        checkpoint.save(
            root,
            rank.state,
            Progress(iteration=stop, consumed_samples=8 * stop, consumed_tokens=99 * stop),
            keep=None,
        )
    return losses, before, every_tensor(rank)


def write_two_checkpoints(root):
    """Save steps 2 and 4 of a run on two ranks; return its job, and where."""
    job = Job(topology=LAYOUTS["dp2 dist"][1])
    run_ranks(train, 2, job, 2, root, None, 2)
    run_ranks(train, 2, job, 4, root, 2, 4)
    return job, root


class Lines(logging.Handler):
    """What is said."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def resumed(job, flags):
    """Return how far a run with these flags is when it begins, with what, and what it says."""
    from ml_train import checkpoint

    said, rank = Lines(), Rank(job)
    logging.getLogger("ml_train").addHandler(said)
    try:
        found = checkpoint.resume(flags, rank.state)
    except UsageError as error:
        return None, None, [str(error)]
    return found and found.iteration, every_tensor(rank), said.lines


def without_optimizer(root):
    """Leave of a checkpoint what one from elsewhere has: weights, and no manifest."""
    for path in [*root.rglob("optimizer_shard_*.pt"), *root.rglob(MANIFEST)]:
        path.unlink()
    for path in root.rglob("model_optim_rng.pt"):
        edit(path, lambda content: delattr(content["args"], "ml_train_version"))


def edit(path, change):
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
