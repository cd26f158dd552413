"""A small training job that runs in any layout, for the tests beside it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ml_models.architecture import Architecture
from ml_models.dropout import Dropout
from ml_parallel.topology import Topology
from ml_train.config import (
    Adam,
    CheckpointConfig,
    PretrainConfig,
    Training,
    Vocabulary,
    check_world,
)
from ml_train.launch import LaunchConfig
from ml_train.settings import DataConfig, LearningRate, LogConfig

SEQUENCE = 32
GLOBAL_BATCH = 8

UNTIED = Architecture(
    num_layers=4,
    hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=160,
    max_position_embeddings=64,
    vocab_size=131,  # odd, so that the padding depends on the tensor-parallel size
    swiglu=True,
    normalization="RMSNorm",
    add_bias_linear=False,
    untie_embeddings_and_output_weights=True,
)

TP2, PP2, DIST = (
    {"tensor_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2},
    {"use_distributed_optimizer": True},
)
VPP = {**PP2, "num_layers_per_virtual_pipeline_stage": 1}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS = {
    "tp2": (2, Topology(**TP2)),
    "tp2 sp": (2, Topology(**TP2, sequence_parallel=True)),
    "pp2": (2, Topology(**PP2)),
    "pp2 list": (2, Topology(**PP2, num_layer_list=(3, 1))),
    "pp2 vpp": (2, Topology(**VPP)),
    "dp2": (2, Topology()),
    "dp2 dist": (2, Topology(**DIST)),
    "dp4 dist overlap": (4, Topology(**DIST, **OVERLAP)),
    "dp4 dist 2 instances": (4, Topology(**DIST, num_distributed_optimizer_instances=2)),
    "pp4": (4, Topology(pipeline_model_parallel_size=4)),
    "tp2 sp mc2": (2, Topology(**TP2, sequence_parallel=True, use_mc2=True)),
    "tp2 pp2 sp": (4, Topology(**TP2, **PP2, sequence_parallel=True)),
    "tp2 dp2 sp dist": (4, Topology(**TP2, **DIST, sequence_parallel=True)),
    "tp2 pp2 vpp": (4, Topology(**TP2, **VPP)),
    "pp2 vpp dp2 dist overlap": (4, Topology(**VPP, **DIST, **OVERLAP)),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to train; the same data whatever the layout."""

    topology: Topology = field(default_factory=Topology)
    arch: Architecture = UNTIED
    dtype: torch.dtype = torch.float32
    dropout: Dropout = field(default_factory=Dropout)
    micro_batch_size: int = 1
    optimizer: Adam = field(default_factory=lambda: Adam(weight_decay=0.1))

    def config(self) -> PretrainConfig:
        """Return the flags of a run that trains this."""
        return PretrainConfig(
            model=self.arch,
            parallel=self.topology,
            dropout=self.dropout,
            training=Training(
                train_iters=100,
                seq_length=SEQUENCE,
                micro_batch_size=self.micro_batch_size,
                global_batch_size=GLOBAL_BATCH,
                bf16=self.dtype == torch.bfloat16,
                fp16=self.dtype == torch.float16,
                seed=1,
            ),
            vocabulary=Vocabulary(make_vocab_size_divisible_by=8),
            data=DataConfig(data_path=("made by Rank.batches",)),
            optimizer=self.optimizer,
            learning_rate=LearningRate(lr=1e-3),
            checkpoint=CheckpointConfig(),
            log=LogConfig(),
            launch=LaunchConfig(),
        )


class Rank:
    """One rank of a job, built as a run builds it; created inside run_ranks."""

    def __init__(self, job: Job) -> None:
        from ml_train.build import build

        self.job = job
        built = build(check_world(job.config(), torch.distributed.get_world_size()))
        self.state, self.shape, self.place = built.state, built.shape, built.place
        self.ddp, self.optimizer = built.chunks, built.optimizer

    def batches(self, iteration, poison=None):
        """Return one iterator of micro-batches per chunk, of the rank's part of a global batch."""
        tokens, mask = global_batch(self.job, iteration)
        if poison is not None:
            mask = torch.full_like(mask, poison)
        parts = (-1, self.place.dp_size, self.job.micro_batch_size)
        positions = torch.arange(SEQUENCE).expand(self.job.micro_batch_size, -1)
        batches = [
            {
                "tokens": tokens_part[:, :-1],
                "labels": tokens_part[:, 1:],
                "loss_mask": mask_part,
                "position_ids": positions,
            }
            for tokens_part, mask_part in zip(
                tokens.unflatten(0, parts)[:, self.place.dp_rank],
                mask.unflatten(0, parts)[:, self.place.dp_rank],
                strict=True,
            )
        ]
        return [iter(batches) for _ in self.ddp]

    def step(self, iteration, poison=None):
        from ml_train.step import seed_step, train_step

        seed_step(5, iteration, self.place)
        return train_step(
            self.ddp,
            self.optimizer,
            self.batches(iteration, poison),
            self.shape,
            stop_requested=lambda: False,
        )

    def evaluate(self, iteration):
        """Return the loss of the data of a step, without training on it."""
        from ml_train.step import evaluate, mean_loss, parameters_in_place

        with parameters_in_place(self.ddp):
            batches = self.batches(iteration)
            totals = evaluate(self.ddp, batches, self.shape, stop_requested=lambda: False)
        return mean_loss([totals])

    def shards(self, values):
        """Return [(global name, tp rank, start, stop, values(shard))] of what this rank updates."""
        from ml_parallel.optimizer import optimizer_shards

        names = self.state.global_names()
        return [
            (
                names[id(s.parameter)],
                self.place.tp_rank,
                s.start,
                s.stop,
                values(s).detach().float().reshape(-1).numpy().copy(),
            )
            for s in optimizer_shards(self.optimizer)
        ]


def global_batch(job, iteration):
    """Return tokens (B, S + 1) and the mask of the loss (B, S), uneven over the samples.

    Each token follows from the one before: a model learns that, and its loss falls.
    """
    generator = torch.Generator().manual_seed(100 + iteration)
    first = torch.randint(0, job.arch.vocab_size, (GLOBAL_BATCH, 1), generator=generator)
    tokens = (first + 7 * torch.arange(SEQUENCE + 1)) % job.arch.vocab_size
    kept = torch.rand(GLOBAL_BATCH, 1, generator=generator)
    mask = torch.rand(GLOBAL_BATCH, SEQUENCE, generator=generator) < kept
    return tokens, mask.float()


def assemble(ranks, arch, tp_size):
    """Join what `Rank.shards` returned on every rank to whole tensors by name."""
    from ml_models.weights import (
        EMBEDDING,
        OUTPUT_LAYER,
        padded_vocab_size,
        parameters,
        shard_runs,
    )

    rows = padded_vocab_size(
        arch.vocab_size, make_vocab_size_divisible_by=8, tensor_model_parallel_size=tp_size
    )
    table = {p.name: p for p in parameters(arch) if not p.float32}  # what has a gradient
    whole = {name: torch.full(p.shape, torch.nan) for name, p in table.items()}
    locals_ = {}
    for name, tp_rank, start, stop, values in (entry for rank in ranks for entry in rank):
        parameter = table.get(name) or table[EMBEDDING if name == OUTPUT_LAYER else name]
        shape, _ = shard_runs(parameter, tp_size=tp_size, tp_rank=tp_rank, padded_vocab_size=rows)
        local = locals_.setdefault(
            (parameter.name, tp_rank), torch.full((torch.Size(shape).numel(),), torch.nan)
        )
        local[start:stop] = torch.from_numpy(values)
    for (name, tp_rank), flat in locals_.items():
        parameter = table[name]
        shape, runs = shard_runs(
            parameter, tp_size=tp_size, tp_rank=tp_rank, padded_vocab_size=rows
        )
        dim = parameter.split.dim if parameter.split else 0
        for run in runs:
            part = flat.view(shape).narrow(dim, run.local_start, run.length)
            whole[name].narrow(dim, run.global_start, run.length).copy_(part)
    assert not any(tensor.isnan().any() for tensor in whole.values())
    return whole
