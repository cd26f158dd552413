"""What a pre-training run is: one small config per concern, and the rules that join them.

Each class checks its own fields; a rule between two of them is one function here, so that every
impossible run is refused before any work starts. Nothing here needs torch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path

from ml_data.tokenizer import TokenizerType, load_tokenizer
from ml_kernels.device import DeviceChoice
from ml_models.architecture import Architecture
from ml_models.dropout import Dropout
from ml_models.flags import UsageError
from ml_models.weights import check_tensor_parallel, expert_range, padded_vocab_size
from ml_parallel.checkpoint import (
    CheckpointError,
    candidates,
    iteration_directory,
    read_manifest,
)
from ml_parallel.stages import stage_layers
from ml_parallel.topology import Topology
from ml_train.corpora import TokensInfo
from ml_train.launch import LaunchConfig
from ml_train.settings import DataConfig, IgnoredFlags, LearningRate, LogConfig


@dataclass(frozen=True, kw_only=True)
class Training:
    """Training run."""

    train_iters: int
    """Number of optimizer steps of the whole run."""
    seq_length: int
    """Tokens in a sample."""
    micro_batch_size: int = 1
    """Samples that one rank computes at a time."""
    global_batch_size: int | None = None
    """Samples of one optimizer step over all ranks; a multiple of micro batch size * data-parallel
    size accumulates gradients. Default that of the checkpoint in --load, else that product."""
    bf16: bool = False
    """Compute in bfloat16; weights, gradients and optimizer state are kept in float32 as well."""
    fp16: bool = False
    """Compute in float16 with dynamic loss scaling; float32 as with --bf16."""
    seed: int = 1234
    """Of the initial weights, the order of the data, and dropout."""
    eval_interval: int = 1000
    """Steps between two evaluations on the validation data; one follows the last step, too."""
    eval_iters: int = 0
    """Global batches of one evaluation; 0 = do not evaluate."""
    max_skipped_iterations: int = 20
    """Consecutive steps skipped for a NaN or Inf after which the run gives up."""
    device: DeviceChoice = "auto"
    """Where to train; auto prefers an NPU, then a GPU, then the CPU."""
    distributed_timeout_minutes: int = 45
    """How long a rank waits for another one in a collective."""

    def __post_init__(self) -> None:
        for name in ("train_iters", "seq_length", "micro_batch_size", "eval_interval"):
            _at_least(1, name, getattr(self, name))
        for name in ("max_skipped_iterations", "distributed_timeout_minutes"):
            _at_least(1, name, getattr(self, name))
        _at_least(0, "eval_iters", self.eval_iters)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed {self.seed}: must be from 0 to {2**32 - 1}")
        if self.global_batch_size is not None:
            _at_least(1, "global_batch_size", self.global_batch_size)
        if self.bf16 and self.fp16:
            raise ValueError("--bf16 and --fp16 exclude each other: give one of them, or neither")

    @property
    def dtype(self) -> str:
        """The name of the dtype to compute in."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Optimizer."""

    weight_decay: float = 0.01
    """Decoupled weight decay (AdamW) of matrices; biases and norms have none."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Largest gradient norm; longer gradients are shortened to it. 0 = off."""
    initial_loss_scale: float = 65536.0
    """With --fp16: first loss scale."""
    min_loss_scale: float = 1.0
    """With --fp16: smallest loss scale."""
    loss_scale_window: int = 1000
    """With --fp16: steps without overflow after which the scale doubles."""
    hysteresis: int = 2
    """With --fp16: overflows after which the scale halves."""

    def __post_init__(self) -> None:
        for name in ("adam_beta1", "adam_beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(
                    f"{flag(name)} {getattr(self, name)}: must be at least 0 and less than 1"
                )
        for name in ("weight_decay", "clip_grad"):
            _at_least(0, name, getattr(self, name))
        for name in ("adam_eps", "min_loss_scale", "initial_loss_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{flag(name)} {getattr(self, name)}: must be greater than 0")
        for name in ("loss_scale_window", "hysteresis"):
            _at_least(1, name, getattr(self, name))
        if self.initial_loss_scale < self.min_loss_scale:
            raise ValueError(
                f"--initial-loss-scale {self.initial_loss_scale}: must be at least "
                f"--min-loss-scale {self.min_loss_scale}"
            )


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Vocabulary."""

    tokenizer_name_or_path: Path | None = field(
        default=None, metadata={"aliases": ("--tokenizer-model",)}
    )
    """Tokenizer the data was made with; only its size is looked at. Default: what the data says."""
    tokenizer_type: TokenizerType | None = None
    """How to read it; by default what is there decides."""
    make_vocab_size_divisible_by: int = 128
    """The embedding table is padded to a multiple of this times the tensor-parallel size."""
    padded_vocab_size: int | None = None
    """Rows of the embedding table; default from --make-vocab-size-divisible-by."""

    def __post_init__(self) -> None:
        _at_least(1, "make_vocab_size_divisible_by", self.make_vocab_size_divisible_by)
        if self.tokenizer_type is not None and self.tokenizer_name_or_path is None:
            raise ValueError(
                f"--tokenizer-type {self.tokenizer_type}: means nothing without "
                "--tokenizer-name-or-path"
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints."""

    save: Path | None = None
    """Directory to write checkpoints to."""
    load: Path | None = None
    """Directory to resume from, if it holds a checkpoint; often the same as --save. If it is
    another one, the run begins there, and continues from --save once that holds a checkpoint."""
    ckpt_step: int | None = None
    """Which step of --load to begin with; default the latest. --save must be another one then."""
    finetune: bool = False
    """Take the weights of --load only, and begin at step 0."""
    load_optim: bool = True
    """Take the optimizer's state from --load, too; --no-load-optim begins with an empty one."""
    save_interval: int | None = None
    """Steps between two checkpoints; the last step and an interrupted run always save."""
    keep_last: int | None = None
    """How many checkpoints to keep; default all. None is removed while steps are being skipped."""

    def __post_init__(self) -> None:
        for name in ("save_interval", "keep_last"):
            if getattr(self, name) is not None:
                _at_least(1, name, getattr(self, name))
                if self.save is None:
                    raise ValueError(f"{flag(name)} needs --save, the directory to write to")
        self._check_directories()
        self._check_choice()

    @property
    def source(self) -> Path | None:
        """Where the run continues: its own checkpoints if there are any, else --load."""
        apart = self.load is not None and not self._loads_its_own
        return self.save if apart and self.save and candidates(self.save) else self.load

    @property
    def _loads_its_own(self) -> bool:
        return bool(self.load and self.save and self.load.resolve() == self.save.resolve())

    def _check_directories(self) -> None:
        for name, path in (("save", self.save), ("load", self.load)):
            if path is not None and path.exists() and not path.is_dir():
                raise ValueError(f"--{name} {path}: is not a directory")
        source = self.source
        if source is not None and not self._loads_its_own and not candidates(source):
            raise ValueError(f"--load {source}: holds no checkpoint")
        if self.save is not None and self.load is None and candidates(self.save):
            raise ValueError(
                f"--save {self.save}: holds the checkpoints of a run; continue it with "
                f"--load {self.save}, or name another directory"
            )

    def _check_step(self) -> None:
        if self.ckpt_step is None or self.load is None or self.source != self.load:
            return
        _at_least(0, "ckpt_step", self.ckpt_step)
        names = [path.name for path in candidates(self.load)]
        if iteration_directory(self.ckpt_step) not in names:
            raise ValueError(
                f"--ckpt-step {self.ckpt_step}: --load {self.load} holds "
                f"{', '.join(sorted(names)) or 'no checkpoint'}"
            )

    def _check_choice(self) -> None:
        for name, given in (
            ("--ckpt-step", self.ckpt_step is not None),
            ("--finetune", self.finetune),
            ("--no-load-optim", not self.load_optim),
        ):
            if given and self.load is None:
                raise ValueError(f"{name} needs --load, the checkpoints to read")
        self._check_step()
        if self.ckpt_step is not None and self._loads_its_own:
            raise ValueError(
                f"--ckpt-step {self.ckpt_step} would begin there each time the command is run, and "
                f"--load {self.load} would lose what came after: --save must name another directory"
            )
        if self.finetune and self._loads_its_own:
            raise ValueError(
                f"--finetune begins a new run from --load {self.load}: --save must name another "
                "directory"
            )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pre-train a model."""

    model: Architecture
    parallel: Topology
    dropout: Dropout
    training: Training
    vocabulary: Vocabulary
    data: DataConfig
    optimizer: Adam
    learning_rate: LearningRate
    checkpoint: CheckpointConfig
    log: LogConfig
    launch: LaunchConfig
    ignored: IgnoredFlags = field(default_factory=IgnoredFlags)

    def __post_init__(self) -> None:
        _check_supported(self)
        _check_sequence(self)
        _check_evaluation(self)
        self.learning_rate.check(self.training.train_iters)
        check_tensor_parallel(self.model, self.parallel.tensor_model_parallel_size)
        stage_layers(self.model.num_layers, self.parallel)
        if self.parallel.sequence_parallel:
            _check_sequence_parallel(self)


def check_world(config: PretrainConfig, world_size: int) -> PretrainConfig:
    """Check the run against the number of ranks, and fill in what follows from it.

    Raises:
        UsageError: The ranks do not fit the layout, or the batch does not fit the ranks.
    """
    try:
        config.parallel.validate(world_size)
    except ValueError as error:
        raise UsageError(str(error)) from error
    training = config.training
    dp_size = config.parallel.data_parallel_size(world_size)
    step = training.micro_batch_size * dp_size
    batch = training.global_batch_size or _saved_batch(config.checkpoint.source) or step
    if batch % step:
        below = max(step, batch // step * step)
        raise UsageError(
            f"--global-batch-size {batch}: must be a multiple of --micro-batch-size "
            f"{training.micro_batch_size} times the data-parallel size {dp_size} "
            f"(nearest: {below} or {below + step})"
        )
    _check_microbatches(config, batch // step)
    return dataclasses.replace(
        config, training=dataclasses.replace(training, global_batch_size=batch)
    )


def with_vocabulary(config: PretrainConfig, corpus: TokensInfo | None) -> PretrainConfig:
    """Check the vocabulary of the model against that of the data; take it from there if not given.

    Args:
        config: The run.
        corpus: What `ml-data` noted of the data, if it made it.

    Raises:
        UsageError: The model has too few tokens, or nothing says how many there are.
    """
    sizes = {}
    if corpus is not None:
        sizes["the data's tokenizer"] = corpus.vocab_size
    path = config.vocabulary.tokenizer_name_or_path
    if path is not None:
        sizes[f"--tokenizer-name-or-path {path}"] = load_tokenizer(
            path, config.vocabulary.tokenizer_type
        ).vocab_size
    wanted = config.model.vocab_size or max(sizes.values(), default=0)
    if not wanted:
        raise UsageError(
            "missing --vocab-size: the data does not say which tokenizer it was made with; "
            "give it or --tokenizer-name-or-path"
        )
    for source, size in sizes.items():
        if size > wanted:
            raise UsageError(
                f"--vocab-size {wanted}: {source} has {size} tokens; give at least {size}, or "
                "leave it out"
            )
    model = dataclasses.replace(config.model, vocab_size=wanted)
    config = dataclasses.replace(config, model=model)
    embedding_rows(config)
    return config


def embedding_rows(config: PretrainConfig) -> int:
    """Return the rows of the embedding table, padding included.

    Raises:
        UsageError: --padded-vocab-size does not fit.
    """
    true, tp = config.model.vocab_size, config.parallel.tensor_model_parallel_size
    rows = config.vocabulary.padded_vocab_size
    if rows is None:
        return padded_vocab_size(
            true,
            make_vocab_size_divisible_by=config.vocabulary.make_vocab_size_divisible_by,
            tensor_model_parallel_size=tp,
        )
    if rows < true or rows % tp:
        least = -(-true // tp) * tp
        raise UsageError(
            f"--padded-vocab-size {rows}: must be at least the {true} tokens of the vocabulary "
            f"and a multiple of --tensor-model-parallel-size {tp} (smallest: {least})"
        )
    return rows


def flag(name: str) -> str:
    """Return the flag of a field."""
    return "--" + name.replace("_", "-")


def _at_least(least: int, name: str, value: float) -> None:
    if not least <= value < math.inf:
        raise ValueError(f"{flag(name)} {value}: must be at least {least}")


def _check_supported(config: PretrainConfig) -> None:
    if config.parallel.context_parallel_size > 1:
        raise ValueError(
            f"--context-parallel-size {config.parallel.context_parallel_size}: pre-training cuts "
            "samples over tensor-parallel ranks only (--sequence-parallel); leave it at 1"
        )
    _check_experts(config.model, config.parallel)


def _check_experts(model: Architecture, parallel: Topology) -> None:
    size = parallel.expert_model_parallel_size
    if model.num_experts is None:
        if size > 1:
            raise ValueError(
                f"--expert-model-parallel-size {size}: this model has no experts; leave it at 1"
            )
        return
    expert_range(model, ep_rank=0, ep_size=size)
    scores_first = model.moe_router_pre_softmax or model.moe_router_score_function == "sigmoid"
    if model.moe_router_topk == 1 and (model.norm_topk_prob or not scores_first):
        raise ValueError(
            "--moe-router-topk 1: the weight of a single expert is always 1, and the router would "
            "learn nothing from the loss; give --moe-router-pre-softmax, and no --norm-topk-prob"
        )
    tp = parallel.tensor_model_parallel_size
    if tp > 1 and not parallel.sequence_parallel:
        raise ValueError(
            f"--tensor-model-parallel-size {tp}: training a model with --num-experts "
            f"{model.num_experts} also needs --sequence-parallel, or every rank would send the "
            "same tokens to the experts"
        )


def _check_evaluation(config: PretrainConfig) -> None:
    data = config.data
    for name in ("valid_data_path", "test_data_path"):
        if getattr(data, name) and not config.training.eval_iters:
            raise ValueError(f"{flag(name)} needs --eval-iters, the batches of an evaluation")
    has_validation = data.shares[1] > 0 if data.data_path else bool(data.valid_data_path)
    if config.training.eval_iters and not has_validation:
        raise ValueError(
            f"--eval-iters {config.training.eval_iters}: there is no validation data; give --split "
            "a second share, or --valid-data-path"
        )


def _saved_batch(load: Path | None) -> int | None:
    """Return the global batch size of the newest checkpoint, so that other ranks continue alike."""
    for path in candidates(load) if load is not None else []:
        try:
            manifest = read_manifest(path)
        except (CheckpointError, OSError):
            continue
        size = manifest.metadata.get("global_batch_size") if manifest else None
        return size if isinstance(size, int) else None
    return None


def _check_sequence(config: PretrainConfig) -> None:
    length, longest = config.training.seq_length, config.model.max_position_embeddings
    if length > longest:
        raise ValueError(
            f"--seq-length {length}: must be at most --max-position-embeddings {longest}"
        )


def _check_sequence_parallel(config: PretrainConfig) -> None:
    length, tp = config.training.seq_length, config.parallel.tensor_model_parallel_size
    if length % tp:
        below = length // tp * tp
        raise ValueError(
            f"--seq-length {length}: with --sequence-parallel it must be divisible by "
            f"--tensor-model-parallel-size {tp} (nearest: {below} or {below + tp})"
        )


def _check_microbatches(config: PretrainConfig, count: int) -> None:
    stages = stage_layers(config.model.num_layers, config.parallel)
    if len(stages[0]) > 1 and count % len(stages):
        raise UsageError(
            f"--num-layers-per-virtual-pipeline-stage: the number of micro-batches of a step "
            f"({count}) must be a multiple of --pipeline-model-parallel-size {len(stages)}; "
            f"change --global-batch-size"
        )
