"""Token files to samples of equal length, for pre-training: megatron-core's GPT dataset.

Everything is a function of the files, the flags and the number of samples consumed so far. A
resumed run therefore continues with the sample it would have had, for any number of data-parallel
ranks, and every tensor-parallel rank reads the files by itself.

Which document and offset each sample begins at is kept in a directory beside the first corpus
(`ml_train.index_cache`) for the next start.

Shapes: S tokens of a sample.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from ml_models.flags import UsageError
from ml_train.batches import Batch, Datasets
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

_TENSORS = ("tokens", "labels", "loss_mask", "position_ids")


class CorpusSamples:
    """The samples that megatron-core cuts a corpus, or a blend of several, into."""

    in_one_row = False

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        """Return how many there are: at least those of the run."""
        return len(self._dataset)

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        """Return a sample: (S,) tensors."""
        sample: dict[str, torch.Tensor] = self._dataset[position]
        return sample

    def batch(self, positions: Sequence[int]) -> Batch:
        """Return the samples at these positions of the run."""
        samples = [self[position] for position in positions]
        return {name: torch.stack([sample[name] for sample in samples]) for name in _TENSORS}

    def source(self, position: int) -> str:
        """Return the file that a sample is from."""
        dataset = self._dataset
        if isinstance(dataset, BlendedDataset):
            dataset = dataset.datasets[dataset.dataset_index[position]]
        return f"{dataset.dataset_path}.bin"


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
    train, valid, test = (None if d is None else CorpusSamples(d) for d in datasets)
    assert train is not None, "a run has training data"
    return Datasets(train, valid, test)


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
