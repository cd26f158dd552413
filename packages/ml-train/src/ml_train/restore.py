"""Read a training checkpoint in whatever parallel layout it was written.

One idea: `ml_models.weights.shard_runs` says where a rank's shard of a tensor lies in the whole
tensor, for the layout that wrote and for the one that reads; copy where the two overlap. The same
code resumes in the same layout, where the overlap is everything.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import pickle
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from ml_models.architecture import Architecture
from ml_models.flags import UsageError
from ml_models.weights import (
    EMBEDDING,
    OUTPUT_LAYER,
    Parameter,
    expert_range,
    local_name,
    parameters,
    shard_runs,
)
from ml_parallel.checkpoint import MODEL_FILE, rank_directory
from ml_parallel.optimizer import STATES, OptimizerShard, optimizer_shards
from ml_parallel.stages import stage_layers
from ml_parallel.topology import Topology
from ml_train.state import MAIN, OURS, Progress, TrainingState

logger = logging.getLogger(__name__)

T = TypeVar("T")
Fragments = list[dict[str, dict[str, Any]]]

_FUSED_NORM = ".layer_norm_"  # of Transformer Engine, which fuses a norm with the layer after it
_LEGACY = "language_model"  # Megatron-Legacy keeps the whole model below this name
_TORCH_DIST = ".metadata"  # what torch.distributed.checkpoint writes beside its files


class _OtherFormatError(UsageError):
    """The checkpoint is sound, but has to be rewritten first."""


def restore(
    directory: Path, state: TrainingState, *, optimizer: bool = True, progress: bool = True
) -> Progress:
    """Copy a checkpoint into the model and the optimizer of `state`.

    A checkpoint without optimizer shards, as `ml-convert` writes it, gives the weights only: the
    run starts at step 0 from them.

    Args:
        directory: The checkpoint.
        state: What to fill.
        optimizer: Take the optimizer's state, too.
        progress: Continue after the step it was taken at, rather than start at step 0.

    Raises:
        UsageError: The checkpoint is of another model, incomplete, or cannot be read.
    """
    source = _open(directory)
    _check_same_model(directory, source.arch, state.arch)
    table = {p.name: p for p in parameters(source.arch)}
    shards = {id(shard.parameter): shard for shard in optimizer_shards(state.optimizer)}
    for chunk in state.chunks:
        for name, tensor in chunk.tensors():
            whole_name = chunk.global_name(name)
            # Tied embeddings have one entry, whichever stage keeps a copy as its output layer.
            tied = whole_name == OUTPUT_LAYER and whole_name not in table
            parameter = table[EMBEDDING if tied else whole_name]
            shard = shards.get(id(tensor))
            _restore_parameter(tensor, shard, parameter, source, state, moments=optimizer)
    return _restore_run(source, state) if progress else Progress()


def check_model(directory: Path, wanted: Architecture) -> None:
    """Check that a checkpoint can be read into a model, as far as one file says.

    Raises:
        UsageError: It is of another model or format; what else may be wrong is for `restore`.
    """
    try:
        source = _open(directory)
    except _OtherFormatError:
        raise
    except UsageError:
        return
    _check_same_model(directory, source.arch, wanted)


def is_ours(directory: Path) -> bool:
    """Tell whether a checkpoint was written by ml-train, which never leaves out the manifest."""
    try:
        return bool(getattr(_open(directory).common["args"], OURS, None))
    except UsageError:
        return False  # `restore` says what is wrong


def _open(directory: Path) -> _Source:
    try:
        return _Source(directory)
    except UsageError:
        raise
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"{directory}: not a checkpoint of ml-train ({error!r})") from error


@torch.no_grad()
def _restore_parameter(
    tensor: torch.Tensor,
    shard: OptimizerShard | None,
    parameter: Parameter,
    source: _Source,
    state: TrainingState,
    *,
    moments: bool,
) -> None:
    # Of what this rank does not update, too: its copy must be that of the ranks that do, which
    # round the float32 weights to what this run computes in.
    key = MAIN if source.has_main and not parameter.float32 else None
    weight = _assemble(parameter, source, state, partial(source.read, parameter, key))
    tensor.copy_(weight)
    if shard is None:
        return
    if tensor.dtype != torch.float32:
        shard.main.view(-1).copy_(weight.view(-1)[shard.start : shard.stop])
    if source.has_optimizer and moments:
        for moment in STATES:
            whole = _assemble(parameter, source, state, partial(source.read, parameter, moment))
            shard.state[moment].view(-1).copy_(whole.view(-1)[shard.start : shard.stop])
        shard.state["step"].fill_(source.common["step"])


def _restore_run(source: _Source, state: TrainingState) -> Progress:
    if not source.has_optimizer:
        logger.warning("%s holds weights only: starting from step 0", source.directory)
        return Progress()
    scalers = [saved for saved in source.common["grad_scaler"] if saved is not None]
    for inner in state.optimizer.chained_optimizers:
        if scalers and getattr(inner, "grad_scaler", None):
            inner.grad_scaler.load_state_dict(scalers[0])  # they have one scale
    return Progress(
        iteration=int(source.common["iteration"]),
        consumed_samples=int(source.args["consumed_train_samples"]),
        consumed_tokens=int(source.args.get("consumed_train_tokens", 0)),
        skipped_iterations=int(source.args["skipped_iterations"]),
        nan_iterations=int(source.args["nan_iterations"]),
    )


def _assemble(
    parameter: Parameter,
    source: _Source,
    state: TrainingState,
    read: Callable[[int, tuple[int, ...]], torch.Tensor],
) -> torch.Tensor:
    """Put together this rank's shard of a tensor from the shards of the ranks that wrote it."""
    dim = parameter.split.dim if parameter.split else 0
    shape, wanted = shard_runs(
        parameter,
        tp_size=state.place.tp_size,
        tp_rank=state.place.tp_rank,
        padded_vocab_size=state.padded_vocab_size,
    )
    whole = torch.zeros(shape)
    writers = source.topology.tensor_model_parallel_size
    for tp_rank in range(writers if parameter.split else 1):
        source_shape, offered = shard_runs(
            parameter,
            tp_size=writers,
            tp_rank=tp_rank,
            padded_vocab_size=source.padded_vocab_size,
        )
        overlaps = [
            (start + a.local_start - a.global_start, start + b.local_start - b.global_start, length)
            for a in wanted
            for b in offered
            for start, length in [_overlap(a.global_start, a.length, b.global_start, b.length)]
            if length > 0
        ]
        if overlaps:
            tensor = read(tp_rank, source_shape)
            for target, origin, length in overlaps:
                whole.narrow(dim, target, length).copy_(tensor.narrow(dim, origin, length))
    return whole


def _overlap(start: int, length: int, other: int, other_length: int) -> tuple[int, int]:
    low = max(start, other)
    return low, min(start + length, other + other_length) - low


class _Source:
    """A checkpoint directory, opened in the layout that wrote it; tensors are memory-mapped."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        folders = sorted(directory.glob("mp_rank_*"))
        if not folders and (directory / _TORCH_DIST).is_file():
            raise _other_format(directory, "is of the format torch_dist")
        if not folders:
            raise UsageError(f"{directory}: holds no mp_rank_* directory")
        self.common: dict[str, Any] = _load(folders[0] / MODEL_FILE)
        _check_names(directory, self.common.get("model", self.common.get("model0", {})))
        self.args: Mapping[str, Any] = vars(self.common["args"])
        self.arch = _from_args(Architecture, self.args)
        self.topology = _from_args(Topology, self.args)
        self.padded_vocab_size = int(self.args["padded_vocab_size"])
        self.stages = stage_layers(self.arch.num_layers, self.topology)
        ep_size = self.topology.expert_model_parallel_size
        self.experts_per_rank = len(expert_range(self.arch, ep_rank=0, ep_size=ep_size))
        self._models: dict[Path, dict[str, Any]] = {}
        self._optimizers: dict[Path, Fragments] = {}
        self.has_optimizer = any(folders[0].glob("optimizer_shard_*.pt"))
        self.has_main = self.has_optimizer and self.args["params_dtype"] != "float32"

    def read(
        self, parameter: Parameter, key: str | None, tp_rank: int, shape: tuple[int, ...]
    ) -> torch.Tensor:
        """Return a rank's shard of the weights (`key` None) or of an optimizer tensor."""
        stage, chunk = self._position(parameter)
        ep_rank = None if parameter.expert is None else parameter.expert // self.experts_per_rank
        folders = self._folders(tp_rank, stage, ep_rank)
        folder = folders[0]
        name = local_name(
            parameter.name,
            first_layer=self._first_layer(stage, chunk),
            first_expert=(ep_rank or 0) * self.experts_per_rank,
        )
        if key is None:
            tensor = self._weight(folder, chunk, name)
        else:
            tensor = self._flat(folders, parameter.name, key)
        if tensor.numel() != torch.Size(shape).numel():
            what = f"{name} has" if key is None else f"the optimizer_shard_*.pt of {name} have"
            raise UsageError(
                f"{folder}: {what} {tensor.numel()} elements, {torch.Size(shape).numel()} expected"
            )
        return tensor.view(shape)

    def _folders(self, tp_rank: int, stage: int, ep_rank: int | None) -> list[Path]:
        """Return the directories of a rank; None = of all its expert-parallel ranks."""
        size = self.topology.expert_model_parallel_size
        return [
            self.directory
            / rank_directory(
                tp_rank=tp_rank,
                pp_rank=stage,
                pp_size=len(self.stages),
                ep_rank=rank,
                ep_size=size,
            )
            for rank in (range(size) if ep_rank is None else (ep_rank,))
        ]

    def _position(self, parameter: Parameter) -> tuple[int, int]:
        if parameter.name.startswith("embedding."):
            return 0, 0
        for stage, chunks in enumerate(self.stages):
            for chunk, layers in enumerate(chunks):
                if parameter.layer in layers:
                    return stage, chunk
        return len(self.stages) - 1, len(self.stages[-1]) - 1

    def _first_layer(self, stage: int, chunk: int) -> int:
        layers = self.stages[stage][chunk]
        return layers.start if layers else 0

    def _model(self, folder: Path, chunk: int) -> dict[str, torch.Tensor]:
        if folder not in self._models:
            self._models[folder] = _load(folder / MODEL_FILE)
        several = len(self.stages[0]) > 1
        return self._models[folder][f"model{chunk}" if several else "model"]

    def _weight(self, folder: Path, chunk: int, name: str) -> torch.Tensor:
        model = self._model(folder, chunk)
        if name in model:
            return model[name]
        raise UsageError(f"{folder / MODEL_FILE}: holds no {name}")

    def _flat(self, folders: list[Path], name: str, key: str) -> torch.Tensor:
        """Join what the data-parallel ranks hold of a flattened optimizer tensor."""
        found = [shard[name] for f in folders for shard in self._shards(f) if name in shard]
        # Without a distributed optimizer every expert-parallel rank holds the whole of a tensor.
        parts = {tuple(part["range"]): part for part in found}
        if not parts or any(key not in part for part in found):
            raise UsageError(f"{folders[0]}: its optimizer_shard_*.pt hold no {key} of {name}")
        return torch.cat([parts[elements][key] for elements in sorted(parts)])

    def _shards(self, folder: Path) -> Fragments:
        if folder not in self._optimizers:
            files = sorted(folder.glob("optimizer_shard_*.pt"))
            self._optimizers[folder] = [_load(path) for path in files]
        return self._optimizers[folder]


def _load(path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"{path}: not readable ({reason})") from error
        except FileNotFoundError:
            raise UsageError(f"{path}: missing") from None


def _other_format(directory: Path, what: str) -> _OtherFormatError:
    return _OtherFormatError(
        f"{directory}: {what}; rewrite it with ml-convert --load-dir {directory.parent} "
        "--save-dir DIRECTORY --save-format mcore, and load that"
    )


def _check_names(directory: Path, model: Mapping[str, Any]) -> None:
    if _LEGACY in model:
        raise _other_format(directory, "is of the format legacy")
    if any(_FUSED_NORM in name for name in model):
        raise _other_format(directory, "its norms have Transformer Engine's names")


def _from_args(kind: type[T], args: Mapping[str, Any]) -> T:
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    return kind(**{field.name: _typed(field, args) for field in fields if field.name in args})


def _typed(field: dataclasses.Field[Any], args: Mapping[str, Any]) -> Any:
    """Read an argument; where ours is some numbers, Megatron's may be a list, or one number."""
    value = args[field.name]
    if "tuple" not in str(field.type) or value is None:
        return value
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _check_same_model(directory: Path, saved: Architecture, wanted: Architecture) -> None:
    ignored = ("init_method_std", "max_position_embeddings")
    different = [
        f"--{field.name.replace('_', '-')} is {getattr(saved, field.name)} there, "
        f"{getattr(wanted, field.name)} here"
        for field in dataclasses.fields(Architecture)
        if field.compare
        and field.name not in ignored
        and getattr(saved, field.name) != getattr(wanted, field.name)
    ]
    if different:
        raise UsageError(f"{directory}: it is of another model: {'; '.join(different)}")
