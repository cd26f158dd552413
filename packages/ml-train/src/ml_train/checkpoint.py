"""Training checkpoints: Megatron's directories, readable in any parallel layout.

    iter_0000010/mp_rank_TT[_PPP][_EEE]/
        model_optim_rng.pt                  weights and args, as Megatron writes them
        optimizer_shard_DDD.pt              moments (and float32 weights) by parameter
    iter_0000010/manifest.json              written last; ml_parallel.checkpoint

TT, PPP and EEE are the tensor-, pipeline- and expert-parallel rank. A directory EEE holds its
experts and everything that is no expert. An optimizer shard names, for each parameter, the elements
`[start, stop)` it holds, so no rank needs another one to save, and any rank can find what it needs
to load (`ml_train.restore`); what is no expert may lie in the shards of any EEE.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import logging
import os
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from ml_models import registry
from ml_models.architecture import Architecture
from ml_models.flags import UsageError
from ml_parallel import checkpoint, durable
from ml_parallel.checkpoint import (
    MANIFEST,
    MODEL_FILE,
    CheckpointError,
    FileEntry,
    Manifest,
    read_manifest,
)
from ml_parallel.optimizer import STATES, optimizer_shards
from ml_train.config import CheckpointConfig
from ml_train.identity import differences
from ml_train.restore import check_model, is_ours, restore
from ml_train.state import MAIN, OURS, Progress, TrainingState, shard_file
from ml_train.step import parameters_in_place
from ml_train.together import on_every_rank, on_rank_0

T = TypeVar("T")

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def claimed(root: Path | None) -> Iterator[None]:
    """Make sure that this run can write to `--save`, and that no other one does meanwhile.

    Every rank must call this, with None where nothing is saved.

    Raises:
        UsageError: Another run writes there, or nobody can.
    """
    with contextlib.ExitStack() as held:
        if root is not None:
            on_rank_0(lambda: _claim(root, held))
        yield


def _claim(root: Path, held: contextlib.ExitStack) -> None:
    try:
        held.enter_context(checkpoint.claimed(root))
    except CheckpointError as error:
        raise UsageError(f"--save {error}; name another directory") from None
    except OSError as error:
        raise UsageError(
            f"--save {root}: cannot be written to ({error.strerror}: {error.filename}); name "
            "another directory"
        ) from None


def save(root: Path, state: TrainingState, progress: Progress, *, keep: int | None) -> Path:
    """Write a checkpoint; every rank must call this, and all return or raise together.

    Returns:
        The directory of the checkpoint.

    Raises:
        OSError: A rank could not write; what was the latest checkpoint still is.
    """
    leader = torch.distributed.get_rank() == 0
    temporary = on_rank_0(lambda: _writing(lambda: checkpoint.begin(root, progress.iteration)))
    try:
        with parameters_in_place(state.wrapped):
            written = on_every_rank(
                lambda: _writing(lambda: _write_files(temporary, state, progress))
            )
        final = on_rank_0(lambda: _writing(lambda: _commit(temporary, written, state, progress)))
    except OSError:
        if leader:
            checkpoint.discard(temporary)
        raise
    if leader and keep is not None:
        try:
            checkpoint.prune(root, keep)
        except OSError as error:
            logger.warning("cannot remove old checkpoints of %s: %s", root, error)
    return final


def check(config: CheckpointConfig, model: Architecture) -> None:
    """Check, before anything is built, that what the run begins with is of this model.

    Every rank must call this. Whether files are damaged is for `resume` to find.

    Raises:
        UsageError: The checkpoint is of another model, or of a format that is not read here.
    """
    on_rank_0(lambda: _check(config, model))


def _check(config: CheckpointConfig, model: Architecture) -> None:
    root = config.source
    if root is None:
        return
    found = checkpoint.candidates(root)
    if root == config.load and config.ckpt_step is not None:
        found = [root / checkpoint.iteration_directory(config.ckpt_step)]
    for directory in filter(Path.is_dir, found[:1]):
        check_model(directory, model)


def resume(config: CheckpointConfig, state: TrainingState) -> Progress | None:
    """Bring the model and the optimizer to where the run begins or continues; on every rank.

    Returns:
        How far the run had come, or None if it begins with nothing.

    Raises:
        UsageError: As `load`.
    """
    root = on_rank_0(lambda: config.source)  # one answer, though file systems may lag
    if root is None:
        return None
    if root != config.load:
        _say("--save %s holds checkpoints: continuing from them, not from --load", root)
        return load(root, state)
    found = load(
        root,
        state,
        iteration=config.ckpt_step,
        optimizer=config.load_optim and not config.finetune,
        progress=not config.finetune,
    )
    if found is None:
        _say("--load %s holds no checkpoint yet: starting anew", root)
    return found


def load(
    root: Path,
    state: TrainingState,
    *,
    iteration: int | None = None,
    optimizer: bool = True,
    progress: bool = True,
) -> Progress | None:
    """Read the newest sound checkpoint below `root` into the model and the optimizer.

    Damaged checkpoints are reported and skipped. The parallel layout may differ from the one that
    wrote it. Every rank must call this.

    Args:
        root: Directory of checkpoints.
        state: What to fill.
        iteration: Read this checkpoint, and no other.
        optimizer: As `ml_train.restore.restore` has it.
        progress: Likewise.

    Returns:
        How far the run had come, or None when there is no checkpoint at all.

    Raises:
        UsageError: The checkpoint is of another model, or all of them are damaged.
    """
    directory, skipped = on_rank_0(lambda: _find(root, iteration))
    if directory is None:
        if skipped:
            raise UsageError(f"{root}: no checkpoint is intact; {'; '.join(skipped)}")
        return None
    for line in skipped:
        _say("skipped a damaged checkpoint: %s", line)
    done = on_every_rank(lambda: restore(directory, state, optimizer=optimizer, progress=progress))
    if done[0].iteration:
        _say_changes(on_rank_0(lambda: read_manifest(directory)), state)
    return done[0]


def _say_changes(manifest: Manifest | None, state: TrainingState) -> None:
    """Say which flags are not those that the run had so far."""
    saved = manifest.metadata if manifest else {}
    # Before `run` was kept, the size of the batch stood alone.
    found = differences(saved.get("run", saved), state.run)
    if found:
        changes = "; ".join(f"{flag} was {old} and is {new}" for flag, old, new in found)
        _say("the run goes on with other flags than it had: %s", changes)


def _find(root: Path, iteration: int | None) -> tuple[Path | None, list[str]]:
    """Return the checkpoint to read, and what is wrong with those passed over."""
    skipped: list[str] = []
    if iteration is None:
        found = checkpoint.latest(
            root,
            lambda path, why: skipped.append(f"{path}: {why}"),
            check_unlisted=_check_unlisted,
        )
        return found, skipped
    path = root / checkpoint.iteration_directory(iteration)
    try:
        if not checkpoint.verify(path):
            _check_unlisted(path)
    except CheckpointError as error:
        raise UsageError(f"--ckpt-step {iteration}: {error}") from None
    return path, skipped


def _check_unlisted(path: Path) -> None:
    if is_ours(path):
        raise CheckpointError(f"{path / MANIFEST} is missing")


def _say(text: str, *values: object) -> None:
    if torch.distributed.get_rank() == 0:
        logger.warning(text, *values)


# Writing


def _writing(work: Callable[[], T]) -> T:
    """Return what `work` returns; let what it raises say what for, and on which rank."""
    try:
        return work()
    except (OSError, CheckpointError) as error:
        reason = str(error)
        if isinstance(error, OSError):
            reason = ": ".join(str(part) for part in (error.strerror, error.filename) if part)
        rank = torch.distributed.get_rank()
        raise OSError(errno.EIO, f"cannot write the checkpoint (rank {rank}): {reason}") from error


def _write_files(temporary: Path, state: TrainingState, progress: Progress) -> list[FileEntry]:
    place = state.place
    folder = temporary / checkpoint.rank_directory(
        tp_rank=place.tp_rank,
        pp_rank=place.pp_rank,
        pp_size=place.pp_size,
        ep_rank=place.ep_rank,
        ep_size=place.ep_size,
    )
    folder.mkdir(exist_ok=True)
    entries = []
    is_first = place.expert_dp_rank == 0
    if is_first:
        entries.append(_write(folder / MODEL_FILE, _model_state(state, progress)))
    if place.instance == 0 and (state.topology.use_distributed_optimizer or is_first):
        entries.append(_write(folder / shard_file(place.optimizer_rank), _optimizer_state(state)))
    return entries


def _write(path: Path, content: object) -> FileEntry:
    try:
        with durable.naming(path), path.open("wb") as file:
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
        run=state.run,
        progress=dataclasses.asdict(progress),
        versions={name: version(name) for name in ("ml-train", "megatron-core", "torch")},
    )


def _model_state(state: TrainingState, progress: Progress) -> dict[str, Any]:
    weights = [{name: _owned(tensor) for name, tensor in chunk.tensors()} for chunk in state.chunks]
    names = ["model"] if len(weights) == 1 else [f"model{i}" for i in range(len(weights))]
    return {
        "args": _args(state, progress),
        "checkpoint_version": 3.0,
        "iteration": progress.iteration,
        **dict(zip(names, weights, strict=True)),
        # They have one scale; how many there are depends on the layout.
        "grad_scaler": [
            inner.grad_scaler.state_dict() if getattr(inner, "grad_scaler", None) else None
            for inner in state.optimizer.chained_optimizers
        ],
        "step": _step_count(state),
    }


def _args(state: TrainingState, progress: Progress) -> argparse.Namespace:
    family = registry.family_of(state.arch)
    return argparse.Namespace(
        **dataclasses.asdict(state.arch),
        **dataclasses.asdict(state.topology),
        padded_vocab_size=state.padded_vocab_size,
        params_dtype=state.params_dtype,
        bf16=state.params_dtype == "bfloat16",
        fp16=state.params_dtype == "float16",
        model_family=family.name if family else None,
        global_batch_size=state.global_batch_size,
        iteration=progress.iteration,
        consumed_train_samples=progress.consumed_samples,
        consumed_train_tokens=progress.consumed_tokens,
        skipped_train_samples=0,
        skipped_iterations=progress.skipped_iterations,
        nan_iterations=progress.nan_iterations,
        **{OURS: version("ml-train")},
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
