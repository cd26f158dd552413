"""Token files to micro-batches: megatron-core's GPT dataset, and which of its samples a rank takes.

Everything is a function of the files, the flags and the number of samples consumed so far. A
resumed run therefore continues with the sample it would have had, for any number of data-parallel
ranks, and every tensor-parallel rank reads the files by itself.

Which document and offset each sample begins at is kept in a directory beside the first corpus
(`ml_train.index_cache`) for the next start.

Shapes: B samples of a micro-batch, S tokens.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from ml_models.flags import UsageError
from ml_train.corpora import (
    Corpus,
    absolute,
    check_splits,
    common_tokenizer,
    read_corpora,
    split_bounds,
)
from ml_train.index_cache import IndexCache, open_cache
from ml_train.settings import Blend, DataConfig
from ml_train.together import on_rank_0

_BLENDED_SAMPLES = 4096
"""A small blend of many corpora can take a few samples more of one than megatron-core prepares,
which it refuses; preparing this many was always enough."""


class Samples(Protocol):
    """A sequence of samples: dictionaries of (S,) tensors."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class Datasets(NamedTuple):
    """The samples of each split; None for one that the run takes none of."""

    train: Samples
    valid: Samples | None
    test: Samples | None


def build_datasets(
    config: DataConfig, *, seq_length: int, seed: int, samples: tuple[int, int, int]
) -> Datasets:
    """Open the corpora, and cut them into shuffled samples; every rank calls it together.

    A corpus is gone through as often as it takes to give that many samples.

    Args:
        config: Which corpora.
        seq_length: Tokens in a sample.
        seed: Of the shuffling.
        samples: How many the run takes of training, validation and test over all its steps.

    Raises:
        UsageError: A corpus is missing, torn or too short; the same on every rank.
        OSError: The cache cannot be written.
    """
    plan = on_rank_0(lambda: _plan(config, seq_length, seed, samples))
    if not plan.cache.directory.is_dir():
        raise UsageError(
            f"{plan.cache.directory} is not visible on {socket.gethostname()}: --data-cache-path "
            "must name a directory that all nodes share"
        )
    try:
        with plan.cache.naming():
            datasets = _build(config, plan)
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            plan.cache.publish()
    except BaseException:
        if torch.distributed.get_rank() == 0:
            plan.cache.discard()
        raise
    return Datasets(*datasets)


class TokenBatches:
    """The micro-batches of one data-parallel rank.

    Sample i of the data belongs to the same global batch for every micro-batch size and number of
    ranks: of the samples after those consumed, each micro-batch takes `micro_batch_size` for every
    rank in turn, as Megatron's sequential sampler does.
    """

    def __init__(
        self,
        dataset: Samples,
        *,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.dataset = dataset
        self.micro_batch_size = micro_batch_size
        self.data_parallel_rank = data_parallel_rank
        self.data_parallel_size = data_parallel_size
        self.vocab_size = vocab_size
        self.device = device

    def step(
        self, consumed_samples: int, num_microbatches: int
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the micro-batches of one step.

        Args:
            consumed_samples: Samples that all ranks together took before.
            num_microbatches: How many to yield.

        Yields:
            On the device: `tokens`, `labels` and `position_ids`, (B, S) int64, and `loss_mask`,
            (B, S) float32.

        Raises:
            UsageError: A token is not in the vocabulary.
        """
        for number in range(num_microbatches):
            turn = number * self.data_parallel_size + self.data_parallel_rank
            first = consumed_samples + turn * self.micro_batch_size
            indices = range(first, first + self.micro_batch_size)
            samples = [self.dataset[index] for index in indices]
            batch = {name: torch.stack([sample[name] for sample in samples]) for name in _TENSORS}
            self._check_vocabulary(batch, indices)
            yield {
                name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()
            }

    def _check_vocabulary(self, batch: dict[str, torch.Tensor], indices: Sequence[int]) -> None:
        for tokens in (batch["tokens"], batch["labels"]):
            outside = (tokens < 0) | (tokens >= self.vocab_size)
            if outside.any():
                row, column = outside.nonzero()[0].tolist()
                raise UsageError(
                    f"{_corpus_of(self.dataset, indices[row])}.bin: holds token "
                    f"{int(tokens[row, column])}, which is not in a vocabulary of "
                    f"{self.vocab_size}: the data was made with another tokenizer, or "
                    "--vocab-size is wrong"
                )


_TENSORS = ("tokens", "labels", "loss_mask", "position_ids")


@dataclass(frozen=True)
class _Tokenizer:
    """What megatron-core's datasets ask a tokenizer."""

    eod: int | None
    pad: int = -1
    """No token: samples are never padded here, and megatron-core replaces every pad it finds by 0
    and leaves it out of the loss, though it may be the end-of-document token."""
    vocab_size: int | None = None
    unique_identifiers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Plan:
    """What rank 0 found out, for all ranks."""

    cache: IndexCache
    seq_length: int
    seed: int
    samples: tuple[int, int, int]
    eod: int | None
    blends: tuple[Blend | None, ...]
    bounds: list[tuple[float, float] | None]


def _plan(config: DataConfig, seq_length: int, seed: int, samples: tuple[int, int, int]) -> _Plan:
    corpora = read_corpora(config)
    info = common_tokenizer(corpora)
    if config.eod_mask_loss and (info is None or info.eod is None):
        raise UsageError(
            "--eod-mask-loss: nothing says which token ends a document; data made by ml-data does"
        )
    check_splits(config, corpora, seq_length=seq_length, samples=samples)
    by_prefix = {corpus.prefix: corpus for corpus in corpora}
    used = [
        bounds if wanted else None
        for bounds, wanted in zip(split_bounds(config), samples, strict=True)
    ]
    blends = tuple(
        _weighted(blend, by_prefix) if blend and bounds else None
        for blend, bounds in zip(config.blends, used, strict=True)
    )
    everything = {
        "megatron-core": version("megatron-core"),
        "corpora": {corpus.prefix: corpus.fingerprint() for corpus in corpora},
        "shared": bool(config.data_path),
        "blends": blends,
        "bounds": used,
        "seq_length": seq_length,
        "seed": seed,
        "samples": samples,
    }
    key = hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:32]
    root = config.data_cache_path or Path(f"{corpora[0].prefix}.cache")
    cache = open_cache(root.absolute(), key)
    return _Plan(cache, seq_length, seed, samples, info.eod if info else None, blends, used)


def _weighted(blend: Blend, corpora: dict[str, Corpus]) -> Blend:
    """Give each corpus a weight, unless it is the only one.

    megatron-core would go through corpora without weights only once.
    """
    prefixes = tuple(map(absolute, blend.prefixes))
    if len(prefixes) == 1:
        return Blend(prefixes, None)
    sizes = tuple(float(corpora[prefix].tokens) for prefix in prefixes)
    return Blend(prefixes, blend.weights or sizes)


def _build(config: DataConfig, plan: _Plan) -> list[Any]:
    tokenizer = _Tokenizer(eod=plan.eod)
    blends = [(list(blend.prefixes), blend.weights) if blend else None for blend in plan.blends]
    engine = GPTDatasetConfig(
        random_seed=plan.seed,
        sequence_length=plan.seq_length,
        path_to_cache=str(plan.cache.directory),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=config.eod_mask_loss,
        create_attention_mask=False,  # the model's attention is causal without one
        **({"blend": blends[0], "split": "1"} if config.data_path else {"blend_per_split": blends}),
    )
    if config.data_path:
        # megatron-core looks for samples even in splits that nothing is taken of.
        engine.split_matrix = plan.bounds
    sizes = [
        max(wanted, _BLENDED_SAMPLES) if blend and blend.weights else wanted
        for blend, wanted in zip(plan.blends, plan.samples, strict=True)
    ]
    datasets: list[Any] = BlendedMegatronDatasetBuilder(
        GPTDataset, sizes, lambda: True, engine
    ).build()
    return datasets


def _corpus_of(dataset: Any, index: int) -> str:
    """Return the prefix of the corpus that a sample is from."""
    if isinstance(dataset, BlendedDataset):
        dataset = dataset.datasets[dataset.dataset_index[index]]
    return str(dataset.dataset_path)
