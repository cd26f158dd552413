"""Samples, their order and their cache, on real token files and real gloo ranks.

The tokens of a corpus count up through its documents, so a token tells where it is from.
"""

from __future__ import annotations

import resource
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from token_files import describe, write_corpus

from ml_models.flags import UsageError
from ml_parallel import platform, testing
from ml_train.settings import DataConfig

platform.import_engine()

from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # noqa: E402

from ml_train import data  # noqa: E402
from ml_train.batches import Datasets, TokenBatches  # noqa: E402
from ml_train.data import build_datasets  # noqa: E402

S = 8
CPU = torch.device("cpu")


def build(config: DataConfig, samples: tuple[int, int, int] = (24, 0, 0), **given: Any) -> Datasets:
    return build_datasets(config, **{"seq_length": S, "seed": 1, "samples": samples, **given})


def on_one_rank(function: Any, *args: Any) -> Any:
    return testing.run_ranks(function, 1, *args)[0]


def tokens_of(samples: Any) -> np.ndarray:
    return np.array([samples[index]["tokens"].tolist() for index in range(len(samples))])


def read(config: DataConfig, *args: Any, **given: Any) -> list[Any]:
    """Build on one rank; return the tokens (samples, S) of each split."""

    def work() -> list[Any]:
        splits = build(config, *args, **given)
        return [None if split is None else tokens_of(split) for split in splits]

    return on_one_rank(work)


def files(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """40 documents, 1220 tokens."""
    return write_corpus(tmp_path / "wiki", [11 + document for document in range(40)])


# Samples


def test_an_epoch_gives_every_token_once_and_labels_follow_tokens(corpus: str) -> None:
    def work() -> list[dict[str, list[int]]]:
        train = build(DataConfig(data_path=(corpus,), split=(1,))).train
        assert set(train[0]) == {"tokens", "labels", "loss_mask", "position_ids"}
        assert [train[0][name].shape for name in train[0]] == [(S,)] * 4
        return [{name: value.tolist() for name, value in train[i].items()} for i in range(152)]

    samples = on_one_rank(work)
    tokens = [token for sample in samples for token in sample["tokens"]]
    assert len(samples) == (1220 - 1) // S
    assert len(set(tokens)) == len(tokens)
    assert tokens != sorted(tokens)
    ends = np.cumsum([11 + document for document in range(40)]) - 1
    for sample in samples:
        assert sample["labels"][:-1] == sample["tokens"][1:]
        assert sample["loss_mask"] == [1.0] * S
        assert sample["position_ids"] == list(range(S))
        pairs = zip(sample["tokens"], sample["labels"], strict=True)
        assert all(label == token + 1 or token in ends for token, label in pairs)


def test_more_samples_than_an_epoch_has_go_through_the_corpus_again(corpus: str) -> None:
    tokens = read(DataConfig(data_path=(corpus,), split=(1,)), (152 * 3, 0, 0))[0][: 152 * 3]
    counts = Counter(tokens.ravel().tolist())
    assert len(tokens) == 152 * 3
    assert set(counts) == set(range(1220))
    assert set(counts.values()) <= {2, 3}


def test_a_seed_is_an_order(corpus: str) -> None:
    config = DataConfig(data_path=(corpus,))
    first, again, other = (read(config, seed=seed)[0].tolist() for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_splits_share_no_document_and_only_those_asked_for_are_read(corpus: str) -> None:
    config = DataConfig(data_path=(corpus,), split=(80, 10, 10))
    train, valid, test = read(config, (24, 4, 4))
    assert not set(train.ravel()) & set(valid.ravel())
    assert not set(valid.ravel()) & set(test.ravel())
    only = read(config, (24, 0, 4))
    assert only[1] is None
    np.testing.assert_array_equal(only[0], train)
    np.testing.assert_array_equal(only[2], test)


def test_each_split_can_have_a_corpus_of_its_own(corpus: str, tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other", [50], first=50_000)
    config = DataConfig(train_data_path=(corpus,), valid_data_path=(other,))
    train, valid, test = read(config, (24, 4, 4))
    assert train.max() < 1220
    assert valid.min() >= 50_000
    assert test is None


def test_a_blend_draws_by_weight(corpus: str, tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other", [50], first=50_000)
    config = DataConfig(data_path=("1", corpus, "3", other), split=(1,))
    tokens = read(config, (400, 0, 0))[0][:400]
    assert (tokens.min(axis=1) >= 50_000).sum() == 300


def test_a_blend_without_weights_draws_by_size_for_as_long_as_it_takes(
    corpus: str, tmp_path: Path
) -> None:
    other = write_corpus(tmp_path / "other", [610, 610], first=50_000)
    shared = DataConfig(data_path=(corpus, other), split=(1,))
    single = DataConfig(train_data_path=(corpus, other))
    for config in (shared, single):
        tokens = read(config, (800, 0, 0))[0][:800]  # more than two epochs
        assert len(tokens) == 800
        assert (tokens.min(axis=1) >= 50_000).sum() == 400


def test_a_few_samples_of_many_corpora_can_be_drawn(tmp_path: Path) -> None:
    words: list[str] = []
    for number in range(30):
        words += [str(1 / (number + 1) ** 3), write_corpus(tmp_path / f"c{number}", [10])]
    tokens = read(DataConfig(data_path=tuple(words), split=(1,)), (8, 0, 0))[0]
    assert len(tokens) >= 8


def test_files_of_megatrons_own_tools_are_read(tmp_path: Path) -> None:
    prefix = str(tmp_path / "theirs")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for start in range(0, 300, 30):
        builder.add_document(np.arange(start, start + 30), [30])
    builder.finalize(f"{prefix}.idx")
    tokens = read(DataConfig(data_path=(prefix,), split=(1,)))[0]
    assert set(tokens.ravel()) <= set(range(300))


def test_what_follows_a_document_is_left_out_of_the_loss_if_asked(corpus: str) -> None:
    describe(corpus, eod=21)  # the last token of the second document

    def work(eod_mask_loss: bool) -> set[int]:
        config = DataConfig(data_path=(corpus,), split=(1,), eod_mask_loss=eod_mask_loss)
        train = build(config).train
        return {
            token
            for sample in (train[index] for index in range(len(train)))
            for token in sample["tokens"][sample["loss_mask"] == 0].tolist()
        }

    assert on_one_rank(work, True) == {22 - 1}
    # Without the flag all tokens count, though the description says that 21 is also the pad.
    describe(corpus, eod=21, pad=21)
    assert on_one_rank(work, False) == set()


def test_leaving_it_out_needs_to_know_the_token(corpus: str) -> None:
    with pytest.raises(testing.RankFailedError, match="--eod-mask-loss: nothing says which token"):
        read(DataConfig(data_path=(corpus,), eod_mask_loss=True))


# Micro-batches


def batches(dataset: Any, rank: int, size: int, micro: int) -> TokenBatches:
    return TokenBatches(
        dataset,
        micro_batch_size=micro,
        data_parallel_rank=rank,
        data_parallel_size=size,
        vocab_size=100_000,
        device=CPU,
    )


def test_a_batch_is_tensors_of_the_device(corpus: str) -> None:
    def work() -> None:
        train = build(DataConfig(data_path=(corpus,))).train
        (batch,) = batches(train, 0, 1, micro=3).step(6, 1)
        assert {name: (value.shape, value.dtype) for name, value in batch.items()} == {
            "tokens": ((3, S), torch.int64),
            "labels": ((3, S), torch.int64),
            "loss_mask": ((3, S), torch.float32),
            "position_ids": ((3, S), torch.int64),
        }
        torch.testing.assert_close(batch["labels"][1], train[7]["labels"])

    on_one_rank(work)


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 4), (2, 2), (4, 1), (4, 3)])
def test_a_global_batch_is_the_same_samples_for_every_layout(
    corpus: str, world: int, micro: int
) -> None:
    config = DataConfig(data_path=(corpus,))
    expected = read(config)[0]

    def work() -> list[list[list[int]]]:
        rank = torch.distributed.get_rank()
        mine = batches(build(config).train, rank, world, micro)
        steps = [mine.step(consumed, 12 // (world * micro)) for consumed in (0, 12)]
        return [[row.tolist() for batch in step for row in batch["tokens"]] for step in steps]

    ranks = testing.run_ranks(work, world)
    for number, consumed in enumerate((0, 12)):
        rows = sorted(row for rank in ranks for row in rank[number])
        assert rows == sorted(expected[consumed : consumed + 12].tolist())


def test_ranks_take_turns_of_a_micro_batch_as_megatrons_sampler_gives_them(corpus: str) -> None:
    config = DataConfig(data_path=(corpus,))
    order = read(config)[0].tolist()

    def work() -> list[int]:
        rank = torch.distributed.get_rank()
        step = batches(build(config).train, rank, 2, micro=2).step(4, 2)
        return [order.index(row.tolist()) for batch in step for row in batch["tokens"]]

    assert testing.run_ranks(work, 2) == [[4, 5, 8, 9], [6, 7, 10, 11]]


def test_a_token_outside_of_the_vocabulary_names_its_corpus(corpus: str, tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other", [50], first=50_000)

    def work(words: tuple[str, ...], vocab_size: int) -> str:
        train = build(DataConfig(data_path=words, split=(1,))).train
        given = TokenBatches(
            train,
            micro_batch_size=24,
            data_parallel_rank=0,
            data_parallel_size=1,
            vocab_size=vocab_size,
            device=CPU,
        )
        with pytest.raises(UsageError) as caught:
            list(given.step(0, 1))
        return str(caught.value)

    message = on_one_rank(work, (corpus, other), 50_000)
    start = f"{other}.bin: holds token 500"
    assert message.startswith(start)
    assert message.endswith(
        "which is not in a vocabulary of 50000: the data was made with another tokenizer, or "
        "--vocab-size is wrong"
    )
    assert on_one_rank(work, (corpus,), 4).startswith(f"{corpus}.bin: holds token ")
    negative = write_corpus(tmp_path / "negative", [50], first=-30)
    assert on_one_rank(work, (negative,), 99).startswith(f"{negative}.bin: holds token -")


def test_only_a_label_outside_of_the_vocabulary_is_found_too(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", [S + 1])

    def work() -> None:
        train = build(DataConfig(data_path=(prefix,), split=(1,)), (1, 0, 0)).train
        given = batches(train, 0, 1, micro=1)
        given.vocab_size = S + 1
        list(given.step(0, 1))
        given.vocab_size = S
        with pytest.raises(UsageError, match=f"holds token {S},"):
            list(given.step(0, 1))

    on_one_rank(work)


# Ranks and the cache


def test_every_rank_has_the_same_samples_whether_cached_or_not(corpus: str, tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other", [50], first=50_000)
    config = DataConfig(data_path=("1", corpus, "2", other), split=(1,))

    def work() -> list[Any]:
        train = build(config).train
        return [train[index]["tokens"].tolist() for index in range(24)]

    first = testing.run_ranks(work, 4)
    before = files(tmp_path)
    second = testing.run_ranks(work, 3)
    assert files(tmp_path) == before
    assert all(rank == first[0] for rank in first + second)


def test_the_cache_lies_beside_the_first_corpus_or_where_it_is_told(
    corpus: str, tmp_path: Path
) -> None:
    read(DataConfig(data_path=(corpus,)))
    (beside,) = Path(f"{corpus}.cache").iterdir()
    assert {path.suffix for path in beside.iterdir()} == {".npy", ".txt"}
    read(DataConfig(data_path=(corpus,), data_cache_path=tmp_path / "told"))
    (told,) = (tmp_path / "told").iterdir()
    assert told.name == beside.name


def test_a_relative_path_is_the_same_corpus(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read(DataConfig(data_path=(corpus,)))
    before = files(tmp_path)
    monkeypatch.chdir(tmp_path)
    read(DataConfig(data_path=("wiki",)))
    assert files(tmp_path) == before


def test_a_changed_corpus_of_the_same_name_and_size_is_noticed(corpus: str) -> None:
    config = DataConfig(data_path=(corpus,), split=(1,))
    read(config)
    write_corpus(Path(corpus), [50 - document for document in range(40)])
    tokens = read(config)[0]
    ends = np.cumsum([50 - document for document in range(40)]) - 1
    steps = np.diff(tokens, axis=1) == 1
    assert np.isin(tokens[:, :-1][~steps], ends).all()


def test_a_full_disk_is_one_message_and_leaves_nothing(corpus: str) -> None:
    def work() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        with pytest.raises(OSError, match="cannot keep the order of the samples") as caught:
            build(DataConfig(data_path=(corpus,)), (1000, 0, 0))
        return str(caught.value)

    message = on_one_rank(work)
    assert "--data-cache-path names another directory" in message
    assert list(Path(f"{corpus}.cache").iterdir()) == []


def test_all_ranks_say_what_one_found_wrong(corpus: str, tmp_path: Path) -> None:
    cases = (
        DataConfig(data_path=(f"{corpus}x",)),
        DataConfig(data_path=(corpus,), data_cache_path=tmp_path / "file"),
    )
    (tmp_path / "file").touch()  # since the flags were looked at

    def work() -> list[str]:
        messages = []
        for config in cases:
            with pytest.raises(UsageError) as caught:
                build(config)
            messages.append(str(caught.value))
        return messages

    first, *others = testing.run_ranks(work, 3)
    assert first[0].startswith(f"no dataset {corpus}x: ")
    assert first[1].startswith(f"cannot keep the order of the samples in {tmp_path}/file (")
    assert others == [first, first]


def test_an_empty_split_is_a_message_instead_of_an_endless_search(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "one", [100])

    def work() -> None:
        with pytest.raises(UsageError, match="has 0 tokens in 0 documents for validation"):
            build(DataConfig(data_path=(prefix,)), (4, 4, 0))
        assert build(DataConfig(data_path=(prefix,)), (4, 0, 0)).valid is None

    testing.run_ranks(work, 1, timeout=30)


def test_a_cache_that_a_node_cannot_see_is_a_message(
    corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another node's disk is played by a directory that vanishes when rank 0 has made it."""
    decide = data.on_rank_0

    def vanish(plan: Any) -> Any:
        found = decide(plan)
        if torch.distributed.get_rank() == 0:
            found.cache.directory.rename(f"{found.cache.directory}.elsewhere")
        torch.distributed.barrier()
        return found

    monkeypatch.setattr(data, "on_rank_0", vanish)

    def work() -> None:
        with pytest.raises(UsageError, match="must name a directory that all nodes share"):
            build(DataConfig(data_path=(corpus,)))

    testing.run_ranks(work, 2)
