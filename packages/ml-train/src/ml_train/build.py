"""Build the model and the optimizer of one rank, with random initial weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig

from ml_models.gpt import build_model, transformer_config
from ml_models.initialize import initialize
from ml_parallel.groups import Place, initialize_groups
from ml_parallel.optimizer import build_optimizer, distribute
from ml_parallel.stages import stage_layers
from ml_train.config import PretrainConfig, embedding_rows
from ml_train.identity import of_run
from ml_train.state import TrainingState
from ml_train.step import BatchShape, prepare_config, seed_step


@dataclass(frozen=True)
class Built:
    """What one rank trains."""

    state: TrainingState
    shape: BatchShape
    global_batch_size: int

    @property
    def chunks(self) -> Sequence[DistributedDataParallel]:
        """The model chunks, wrapped for data parallelism."""
        return self.state.wrapped

    @property
    def optimizer(self) -> MegatronOptimizer:
        """The optimizer over all chunks."""
        return self.state.optimizer

    @property
    def place(self) -> Place:
        """Where this rank stands."""
        return self.state.place


def build(config: PretrainConfig) -> Built:
    """Create the process groups, the model and the optimizer; every rank calls it together."""
    training, topology, arch = config.training, config.parallel, config.model
    place = initialize_groups(
        topology,
        num_chunks=len(stage_layers(arch.num_layers, topology)[0]),
        timeout_minutes=training.distributed_timeout_minutes,
    )
    dtype: torch.dtype = getattr(torch, training.dtype)
    engine = transformer_config(arch, topology, params_dtype=dtype, dropout=config.dropout)
    # Stages of a pipeline then tell each other the shape of what they send.
    engine.variable_seq_lengths = config.data.variable_seq_lengths
    rows = embedding_rows(config)
    chunks = build_model(
        arch, topology, engine, padded_vocab_size=rows, seq_length=training.seq_length
    )
    initialize(
        chunks,
        arch,
        seed=training.seed,
        tp_rank=place.tp_rank,
        tp_size=place.tp_size,
        padded_vocab_size=rows,
    )
    wrapped = distribute([chunk.module for chunk in chunks], engine, topology)
    optimizer = build_optimizer(wrapped, _optimizer_config(config, dtype))
    shape, batch = _batch_shape(config, place)
    prepare_config(engine, optimizer, wrapped, shape)
    # With --sequence-parallel megatron-core wants a random state even where nothing is random, as
    # in an evaluation that comes before the first step.
    seed_step(training.seed, 0, place)
    state = TrainingState(
        arch=arch,
        topology=topology,
        place=place,
        padded_vocab_size=rows,
        params_dtype=training.dtype,
        global_batch_size=batch,
        run=of_run(config),
        chunks=chunks,
        wrapped=wrapped,
        optimizer=optimizer,
    )
    return Built(state, shape, batch)


def _batch_shape(config: PretrainConfig, place: Place) -> tuple[BatchShape, int]:
    training = config.training
    batch = training.global_batch_size
    assert batch is not None, "check_world fills it in"
    count = batch // (training.micro_batch_size * place.dp_size)
    return BatchShape(training.micro_batch_size, training.seq_length, count), batch


def _optimizer_config(config: PretrainConfig, dtype: torch.dtype) -> OptimizerConfig:
    adam = config.optimizer
    return OptimizerConfig(
        optimizer="adam",
        lr=config.learning_rate.lr,
        min_lr=config.learning_rate.min_lr,
        weight_decay=adam.weight_decay,
        adam_beta1=adam.adam_beta1,
        adam_beta2=adam.adam_beta2,
        adam_eps=adam.adam_eps,
        clip_grad=adam.clip_grad,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        params_dtype=dtype,
        initial_loss_scale=adam.initial_loss_scale,
        min_loss_scale=adam.min_loss_scale,
        loss_scale_window=adam.loss_scale_window,
        hysteresis=adam.hysteresis,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
