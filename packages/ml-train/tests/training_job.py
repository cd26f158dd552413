"""A small training job that runs in any layout, for the tests beside it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ml_models.architecture import Architecture
from ml_models.dropout import Dropout
from ml_parallel.stages import stage_layers
from ml_parallel.topology import Topology

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
    clip_grad: float = 1.0


class Rank:
    """One rank of a job, built as ml_train builds it; created inside run_ranks."""

    def __init__(self, job: Job) -> None:
        from megatron.core.optimizer import OptimizerConfig

        from ml_models.gpt import build_model, transformer_config
        from ml_models.initialize import initialize
        from ml_models.weights import padded_vocab_size
        from ml_parallel.groups import initialize_groups
        from ml_parallel.optimizer import build_optimizer, distribute
        from ml_train.state import TrainingState
        from ml_train.step import prepare_config

        arch, topology = job.arch, job.topology
        self.job = job
        self.place = initialize_groups(
            topology, num_chunks=len(stage_layers(arch.num_layers, topology)[0])
        )
        config = transformer_config(arch, topology, params_dtype=job.dtype, dropout=job.dropout)
        rows = padded_vocab_size(
            arch.vocab_size,
            make_vocab_size_divisible_by=8,
            tensor_model_parallel_size=self.place.tp_size,
        )
        chunks = build_model(arch, topology, config, padded_vocab_size=rows, seq_length=SEQUENCE)
        initialize(
            chunks,
            arch,
            seed=1,
            tp_rank=self.place.tp_rank,
            tp_size=self.place.tp_size,
            padded_vocab_size=rows,
        )
        self.ddp = distribute([chunk.module for chunk in chunks], config, topology)
        half = job.dtype != torch.float32
        self.optimizer = build_optimizer(
            self.ddp,
            OptimizerConfig(
                optimizer="adam",
                lr=1e-3,
                weight_decay=0.1,
                clip_grad=job.clip_grad,
                bf16=job.dtype == torch.bfloat16,
                fp16=job.dtype == torch.float16,
                params_dtype=job.dtype if half else torch.float32,
                initial_loss_scale=2.0**16,
                min_loss_scale=1.0,
                use_distributed_optimizer=topology.use_distributed_optimizer,
            ),
        )
        prepare_config(config, self.optimizer, self.ddp, self.shape)
        self.state = TrainingState(
            arch=arch,
            topology=topology,
            place=self.place,
            padded_vocab_size=rows,
            params_dtype=str(job.dtype).removeprefix("torch."),
            global_batch_size=GLOBAL_BATCH,
            chunks=chunks,
            wrapped=self.ddp,
            optimizer=self.optimizer,
        )

    @property
    def shape(self):
        from ml_train.step import BatchShape

        size = self.job.micro_batch_size
        return BatchShape(size, SEQUENCE, GLOBAL_BATCH // (size * self.place.dp_size))

    def batches(self, iteration, poison=None):
        """Return one iterator of micro-batches per chunk, of the rank's part of a global batch."""
        generator = torch.Generator().manual_seed(100 + iteration)
        size = (GLOBAL_BATCH, SEQUENCE + 1)
        tokens = torch.randint(0, self.job.arch.vocab_size, size, generator=generator)
        mine = tokens.view(-1, self.place.dp_size, self.job.micro_batch_size, SEQUENCE + 1)
        mine = mine[:, self.place.dp_rank]
        mask = torch.ones(self.job.micro_batch_size, SEQUENCE)
        if poison is not None:
            mask = mask * poison
        positions = torch.arange(SEQUENCE).expand(self.job.micro_batch_size, -1)
        batches = [
            {
                "tokens": part[:, :-1],
                "labels": part[:, 1:],
                "loss_mask": mask,
                "position_ids": positions,
            }
            for part in mine
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
    table = {p.name: p for p in parameters(arch)}
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
