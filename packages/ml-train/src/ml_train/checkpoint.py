"""Training checkpoints: Megatron's directories, readable in any parallel layout.

    iter_0000010/mp_rank_TT[_PPP]/model_optim_rng.pt      weights and args, as Megatron writes them
    iter_0000010/mp_rank_TT[_PPP]/optimizer_shard_DDD.pt  moments (and float32 weights) by parameter
    iter_0000010/manifest.json                            written last; ml_parallel.checkpoint

An optimizer shard names, for each parameter, the elements `[start, stop)` it holds, so no rank
needs another one to save, and any rank can find what it needs to load (`ml_train.restore`).
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import logging
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ml_models.flags import UsageError
from ml_parallel import checkpoint
from ml_parallel.checkpoint import MODEL_FILE, CheckpointError, FileEntry
from ml_parallel.optimizer import STATES, optimizer_shards
from ml_train.restore import restore
from ml_train.state import MAIN, Progress, TrainingState, shard_file
from ml_train.step import parameters_in_place

logger = logging.getLogger(__name__)


def save(root: Path, state: TrainingState, progress: Progress, *, keep: int | None) -> Path:
    """Write a checkpoint; every rank must call this, and all return or raise together.

    Returns:
        The directory of the checkpoint.

    Raises:
        OSError: A rank could not write; what was the latest checkpoint still is.
    """
    leader = torch.distributed.get_rank() == 0
    begun = _together(lambda: checkpoint.begin(root, progress.iteration) if leader else None)
    temporary = next(path for path in begun if path is not None)
    try:
        with parameters_in_place(state.wrapped):
            written = _together(lambda: _write_files(temporary, state, progress))
        done = _together(lambda: _commit(temporary, written, state, progress) if leader else None)
    except OSError:
        if leader:
            checkpoint.discard(temporary)
        raise
    if leader and keep is not None:
        try:
            checkpoint.prune(root, keep)
        except OSError as error:
            logger.warning("cannot remove old checkpoints of %s: %s", root, error)
    return next(path for path in done if path is not None)


def load(root: Path, state: TrainingState) -> Progress | None:
    """Read the newest sound checkpoint below `root` into the model and the optimizer.

    Damaged checkpoints are reported and skipped. The parallel layout may differ from the one that
    wrote it. Every rank must call this.

    Returns:
        How far the run had come, or None when there is no checkpoint at all.

    Raises:
        UsageError: The checkpoint is of another model, or all of them are damaged.
    """
    skipped: list[str] = []

    def find() -> Path | None:
        return checkpoint.latest(root, lambda path, why: skipped.append(f"{path}: {why}"))

    leader = torch.distributed.get_rank() == 0
    found: list[Any] = [(find(), skipped) if leader else None]
    torch.distributed.broadcast_object_list(found, src=0)
    directory, skipped = found[0]
    if leader:
        for line in skipped:
            logger.warning("skipped a damaged checkpoint: %s", line)
    if directory is None:
        if skipped:
            raise UsageError(f"--load {root}: no checkpoint is intact; {'; '.join(skipped)}")
        return None
    return restore(directory, state)


# Writing


def _together(work: Callable[[], Any]) -> list[Any]:
    """Run `work` on every rank and return all results; raise on every rank if one could not."""
    try:
        outcome: tuple[Any, str | None] = (work(), None)
    except OSError as error:
        outcome = (None, f"{error.strerror or error}: {error.filename or ''}".rstrip(": "))
    except CheckpointError as error:
        outcome = (None, str(error))
    outcomes: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(outcomes, outcome)
    for rank, (_, failure) in enumerate(outcomes):
        if failure is not None:
            raise OSError(errno.EIO, f"cannot write the checkpoint (rank {rank}): {failure}")
    return [result for result, _ in outcomes]


def _write_files(temporary: Path, state: TrainingState, progress: Progress) -> list[FileEntry]:
    place = state.place
    folder = temporary / checkpoint.rank_directory(
        tp_rank=place.tp_rank, pp_rank=place.pp_rank, pp_size=place.pp_size
    )
    folder.mkdir(exist_ok=True)
    entries = []
    if place.dp_rank == 0:
        entries.append(_write(folder / MODEL_FILE, _model_state(state, progress)))
    if place.instance == 0 and (state.topology.use_distributed_optimizer or place.dp_rank == 0):
        entries.append(_write(folder / shard_file(place.optimizer_rank), _optimizer_state(state)))
    return entries


def _write(path: Path, content: object) -> FileEntry:
    try:
        with path.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        # torch's zip writer reports a failed write without its cause.
        raise OSError(errno.EIO, _why_unwritable(path), str(path)) from error
    return checkpoint.record(path)


def _why_unwritable(path: Path) -> str:
    status = os.statvfs(path.parent)
    free = status.f_bavail * status.f_frsize
    return f"write failed with {free / 2**20:.0f} MiB free on the disk (or a limit on file size)"


def _commit(
    temporary: Path, written: list[list[FileEntry]], state: TrainingState, progress: Progress
) -> Path:
    return checkpoint.commit(
        temporary,
        [entry for entries in written for entry in entries],
        architecture=dataclasses.asdict(state.arch),
        topology=dataclasses.asdict(state.topology),
        world_size=torch.distributed.get_world_size(),
        global_batch_size=state.global_batch_size,
        progress=dataclasses.asdict(progress),
        versions={name: version(name) for name in ("ml-train", "megatron-core", "torch")},
    )


def _model_state(state: TrainingState, progress: Progress) -> dict[str, Any]:
    weights = [
        {name: _owned(tensor) for name, tensor in chunk.module.named_parameters()}
        for chunk in state.chunks
    ]
    names = ["model"] if len(weights) == 1 else [f"model{i}" for i in range(len(weights))]
    return {
        "args": _args(state, progress),
        "checkpoint_version": 3.0,
        "iteration": progress.iteration,
        **dict(zip(names, weights, strict=True)),
        "grad_scaler": [
            inner.grad_scaler.state_dict() if getattr(inner, "grad_scaler", None) else None
            for inner in state.optimizer.chained_optimizers
        ],
        "step": _step_count(state),
    }


def _args(state: TrainingState, progress: Progress) -> argparse.Namespace:
    return argparse.Namespace(
        **dataclasses.asdict(state.arch),
        **dataclasses.asdict(state.topology),
        padded_vocab_size=state.padded_vocab_size,
        params_dtype=state.params_dtype,
        bf16=state.params_dtype == "bfloat16",
        fp16=state.params_dtype == "float16",
        model_family="llama",
        global_batch_size=state.global_batch_size,
        iteration=progress.iteration,
        consumed_train_samples=progress.consumed_samples,
        skipped_train_samples=0,
        skipped_iterations=progress.skipped_iterations,
        nan_iterations=progress.nan_iterations,
    )


def _optimizer_state(state: TrainingState) -> dict[str, dict[str, Any]]:
    names = state.global_names()
    shards = {}
    for shard in optimizer_shards(state.optimizer):
        content = {name: _owned(shard.state[name]).reshape(-1) for name in STATES}
        if shard.parameter.dtype != torch.float32:
            content[MAIN] = _owned(shard.main).reshape(-1)
        shards[names[id(shard.parameter)]] = {"range": (shard.start, shard.stop), **content}
    return shards


def _step_count(state: TrainingState) -> float:
    """Return how many updates the optimizer has made; it is the same for every parameter."""
    return max(
        (float(shard.state["step"]) for shard in optimizer_shards(state.optimizer)), default=0.0
    )


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` on the CPU, alone in its storage: torch.save writes whole storages."""
    tensor = tensor.detach().cpu()
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone()
