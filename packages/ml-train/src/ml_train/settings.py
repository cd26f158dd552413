"""The flags of the data, the learning rate and the log; nothing here needs torch or numpy.

Each class checks what its fields alone can say. What needs the files is in `ml_train.corpora`, the
work itself in `ml_train.data`, `ml_train.schedule` and `ml_train.metrics`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple


class Blend(NamedTuple):
    """Corpora that one stream of samples is drawn from."""

    prefixes: tuple[str, ...]
    """Each corpus is PREFIX.bin and PREFIX.idx."""
    weights: tuple[float, ...] | None
    """Share of each corpus in the samples, of any sum; None = by the number of its tokens, or, of
    instructions, of its samples."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data."""

    data_path: tuple[str, ...] = ()
    """Corpora for all splits: prefixes of .bin and .idx files, each after its weight or all without
    (0.3 A 0.7 B, or A B); without weights they are drawn from by size."""
    split: tuple[float, ...] = (969.0, 30.0, 1.0)
    """Shares of each corpus's documents for training, validation and test; with --data-path. What
    is test is left out of the others, and kept for a test of yours."""
    train_data_path: tuple[str, ...] = ()
    """Corpora for training, instead of --data-path."""
    valid_data_path: tuple[str, ...] = ()
    """Corpora for validation, with --train-data-path."""
    test_data_path: tuple[str, ...] = ()
    """Corpora for test, with --train-data-path; their loss is shown after the last step."""
    data_cache_path: Path | None = None
    """Directory, shared by all nodes, to keep the order of the samples in; default beside the first
    corpus."""
    eod_mask_loss: bool = False
    """Leave the prediction of what follows an end-of-document token out of the loss."""
    is_instruction_dataset: bool = False
    """The data are of `ml-data instruct`: samples are conversations, and the loss sees answers."""
    variable_seq_lengths: bool = False
    """With --is-instruction-dataset: a micro-batch is as long as its longest sample, up to a
    multiple of 8, instead of --seq-length."""

    def __post_init__(self) -> None:
        single = (self.train_data_path, self.valid_data_path, self.test_data_path)
        if self.data_path and any(single):
            raise ValueError("--data-path excludes --train-data-path and its kin: give one of them")
        if not self.data_path and not self.train_data_path:
            raise ValueError("missing --data-path (or --train-data-path): what to train on")
        if self.variable_seq_lengths and not self.is_instruction_dataset:
            raise ValueError(
                "--variable-seq-lengths needs --is-instruction-dataset: samples of pre-training "
                "data are all --seq-length long"
            )
        if self.eod_mask_loss and self.is_instruction_dataset:
            raise ValueError(
                "--eod-mask-loss is for pre-training data: --is-instruction-dataset says itself "
                "what the loss sees"
            )
        if self.data_cache_path is not None:
            check_directory("--data-cache-path", self.data_cache_path)
        _check_split(self.split)
        _ = self.blends  # their words are checked as they are read

    @property
    def blends(self) -> tuple[Blend | None, Blend | None, Blend | None]:
        """The corpora of training, validation and test; None where there are none."""
        if self.data_path:
            blend = _blend("--data-path", self.data_path)
            return blend, blend, blend
        return (
            _blend("--train-data-path", self.train_data_path),
            _blend("--valid-data-path", self.valid_data_path),
            _blend("--test-data-path", self.test_data_path),
        )

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Every corpus once, in the order it is first named."""
        blends = (blend for blend in self.blends if blend)
        return tuple(dict.fromkeys(prefix for blend in blends for prefix in blend.prefixes))

    @property
    def shares(self) -> tuple[float, float, float]:
        """The part of every corpus's documents that training, validation and test take."""
        if not self.data_path:
            return 1.0, 1.0, 1.0
        shares = [*self.split, 0.0, 0.0][:3]
        return shares[0] / sum(shares), shares[1] / sum(shares), shares[2] / sum(shares)


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """Learning rate."""

    lr: float
    """Highest learning rate."""
    min_lr: float = 0.0
    """Lowest learning rate after the warm-up."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    """How the rate falls after the warm-up; WSD (warm-up, stable, decay) only at the end."""
    lr_decay_iters: int | None = None
    """Step at which the rate reaches --min-lr, of those not skipped; default --train-iters."""
    lr_warmup_iters: int = 0
    """Steps in which the rate rises to --lr, without those that are skipped for a NaN or Inf."""
    lr_warmup_fraction: float | None = None
    """The same as a part of --lr-decay-iters."""
    lr_warmup_init: float = 0.0
    """Learning rate of the first step of the warm-up."""
    lr_wsd_decay_iters: int | None = None
    """With WSD: number of last steps in which the rate falls."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """With WSD: how it falls."""

    def __post_init__(self) -> None:
        if not 0.0 < self.lr < math.inf:
            raise ValueError(f"--lr {self.lr:g}: must be greater than 0")
        for flag, value in (("--min-lr", self.min_lr), ("--lr-warmup-init", self.lr_warmup_init)):
            if not 0.0 <= value <= self.lr:
                raise ValueError(f"{flag} {value:g}: must be from 0 to --lr {self.lr:g}")
        self._check_warmup()
        if self.lr_decay_iters is not None and self.lr_decay_iters < 1:
            raise ValueError(f"--lr-decay-iters {self.lr_decay_iters}: must be at least 1")
        if self.lr_decay_style == "WSD" and self.lr_wsd_decay_iters is None:
            raise ValueError("--lr-decay-style WSD needs --lr-wsd-decay-iters")
        if self.lr_wsd_decay_iters is not None:
            given = f"--lr-wsd-decay-iters {self.lr_wsd_decay_iters}"
            if self.lr_wsd_decay_iters < 1:
                raise ValueError(f"{given}: must be at least 1")
            if self.lr_decay_style != "WSD":
                raise ValueError(f"{given}: means nothing without --lr-decay-style WSD")

    def _check_warmup(self) -> None:
        if self.lr_warmup_iters < 0:
            raise ValueError(f"--lr-warmup-iters {self.lr_warmup_iters}: must be at least 0")
        if self.lr_warmup_fraction is None:
            return
        if self.lr_warmup_iters:
            raise ValueError("--lr-warmup-fraction and --lr-warmup-iters exclude each other")
        if not 0.0 <= self.lr_warmup_fraction < 1.0:
            raise ValueError(
                f"--lr-warmup-fraction {self.lr_warmup_fraction:g}: must be at least 0 and less "
                "than 1"
            )

    def check(self, train_iters: int) -> None:
        """Check the schedule against the length of the run.

        Raises:
            ValueError: The warm-up, or WSD's decay, does not fit in.
        """
        decay, warmup = self.decay_iters(train_iters), self.warmup_iters(train_iters)
        whole = f"--lr-decay-iters {decay}" if self.lr_decay_iters else f"--train-iters {decay}"
        if warmup >= decay:
            raise ValueError(f"--lr-warmup-iters {warmup:g}: must be less than {whole}")
        if self.lr_decay_style == "WSD" and (self.lr_wsd_decay_iters or 0) > decay - warmup:
            raise ValueError(
                f"--lr-wsd-decay-iters {self.lr_wsd_decay_iters}: must be at most {whole} minus "
                f"the warm-up, {decay - warmup:g}"
            )

    def decay_iters(self, train_iters: int) -> int:
        """Return the step at which the lowest rate is reached."""
        return train_iters if self.lr_decay_iters is None else self.lr_decay_iters

    def warmup_iters(self, train_iters: int) -> float:
        """Return the number of warm-up steps; from a fraction it need not be whole."""
        if self.lr_warmup_fraction is None:
            return self.lr_warmup_iters
        return self.lr_warmup_fraction * self.decay_iters(train_iters)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Log."""

    log_interval: int = 1
    """Steps between two lines of the log, each over the steps since the one before."""
    log_throughput: bool = False
    """Add the TFLOP/s of a device to the lines."""
    tensorboard_dir: Path | None = None
    """Directory to write TensorBoard scalars to."""
    metrics_file: Path | None = None
    """File of metrics, one JSON object a line for every step; default metrics.jsonl in --save."""

    def __post_init__(self) -> None:
        if self.log_interval < 1:
            raise ValueError(f"--log-interval {self.log_interval}: must be at least 1")
        if self.tensorboard_dir is not None:
            check_directory("--tensorboard-dir", self.tensorboard_dir)
        if self.metrics_file is not None:
            check_file("--metrics-file", self.metrics_file)

    def metrics_path(self, save: Path | None) -> Path | None:
        """Return the file of metrics of a run with these checkpoints, if it has one."""
        if self.metrics_file is None and save is not None:
            return save / "metrics.jsonl"
        return self.metrics_file


@dataclass(frozen=True, kw_only=True)
class IgnoredFlags:
    """Accepted from scripts of Megatron, and ignored."""

    distributed_backend: str | None = None
    """The device decides: nccl, hccl or gloo."""
    load_rng: bool = True
    """Random numbers follow from --seed and the step; there is no state of theirs to load."""
    masked_softmax_fusion: bool = True
    """The attention kernel has its own softmax, always fused."""
    attention_softmax_in_fp32: bool = True
    """It always is."""
    gradient_accumulation_fusion: bool = False
    """Gradients are accumulated in float32, by no kernel of Apex."""
    use_mcore_models: bool = False
    """There is one implementation of models, that of Megatron-Core."""
    use_flash_attn: bool = False
    """The fastest attention for the device is always taken."""
    use_fused_rmsnorm: bool = False
    """The same of norms."""
    use_fused_swiglu: bool = False
    """The same of gated MLPs."""
    use_fused_rotary_pos_emb: bool = False
    """The same of rotary positions."""
    moe_token_dispatcher_type: str | None = None
    """Tokens always go to their experts by an all-to-all."""
    moe_grouped_gemm: bool = False
    """Experts compute one after the other, and have weights of their own in checkpoints."""
    moe_permutation_async_comm: bool = False
    """Tokens are put in order before they are sent."""

    @property
    def given(self) -> tuple[str, ...]:
        """The flags that ask for something else than what is done."""
        off = (field for field in fields(self) if getattr(self, field.name) != field.default)
        return tuple(
            f"--{'' if getattr(self, field.name) else 'no-'}{field.name.replace('_', '-')}"
            for field in off
        )


def check_directory(flag: str, path: Path) -> None:
    """Refuse a path that cannot become a directory, as something else is in its place.

    Raises:
        ValueError: It or what it lies in is no directory.
    """
    _check_place(flag, path, path)


def check_file(flag: str, path: Path) -> None:
    """Refuse a path that cannot become a file.

    Raises:
        ValueError: It is a directory, or what it lies in is none.
    """
    if path.is_dir():
        raise ValueError(f"{flag} {path}: is a directory; name a file")
    _check_place(flag, path, path.parent)


def _check_place(flag: str, path: Path, directory: Path) -> None:
    found = next(place for place in (directory, *directory.parents) if place.exists())
    if not found.is_dir():
        raise ValueError(f"{flag} {path}: {found} is not a directory; name another place")


def _check_split(split: Sequence[float]) -> None:
    words = f"--split {','.join(f'{share:g}' for share in split)}"
    if not 1 <= len(split) <= 3:
        raise ValueError(
            f"{words}: give one to three numbers: the shares of training, validation and test"
        )
    if not all(0.0 <= share < math.inf for share in split):
        raise ValueError(f"{words}: a share must be at least 0")
    if not split[0] > 0.0:
        raise ValueError(f"{words}: the first share, that of training, must be greater than 0")


def _blend(flag: str, words: Sequence[str]) -> Blend | None:
    """Read `weight prefix weight prefix ...` or `prefix prefix ...`."""
    if not words:
        return None
    numbers = [_number(word) for word in words]
    if all(number is None for number in numbers):
        return Blend(tuple(words), None)
    weights = tuple(number for number in numbers[::2] if number is not None)
    prefixes = tuple(words[1::2])
    alternate = len(numbers[::2]) == len(weights) == len(prefixes)
    if not alternate or any(number is not None for number in numbers[1::2]):
        raise ValueError(
            f"{flag} {' '.join(words)}: give each prefix after its weight (0.3 A 0.7 B), or "
            "prefixes only"
        )
    for weight in weights:
        if not 0.0 < weight < math.inf:
            raise ValueError(f"{flag} {' '.join(words)}: weight {weight:g} must be greater than 0")
    return Blend(prefixes, weights)


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
