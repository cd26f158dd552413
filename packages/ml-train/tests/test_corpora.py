"""Corpora that cannot be trained on are refused before anything is built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from token_files import describe, made_up, write_corpus, write_rows

from ml_models.flags import UsageError
from ml_parallel import platform
from ml_train.corpora import (
    check_splits,
    common_tokenizer,
    read_corpora,
    read_descriptions,
    split_bounds,
)
from ml_train.settings import DataConfig


def refused(*prefixes: str) -> str:
    with pytest.raises(UsageError) as caught:
        read_corpora(DataConfig(data_path=prefixes))
    return str(caught.value)


def refused_split(config: DataConfig, *, seq_length: int = 8, samples: tuple = (4, 4, 4)) -> str:
    with pytest.raises(UsageError) as caught:
        check_splits(config, read_corpora(config), seq_length=seq_length, samples=samples)
    return str(caught.value)


def test_reading_them_needs_no_torch() -> None:
    script = "import sys, ml_train.corpora; sys.exit(str({'torch', 'megatron'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr == "set()\n"


def test_a_missing_corpus_is_named_with_what_lies_near(tmp_path: Path) -> None:
    near = write_corpus(tmp_path / "wiki_text_document", [5])
    message = refused(str(tmp_path / "wiki"))
    assert message == (
        f"no dataset {tmp_path}/wiki: {tmp_path}/wiki.idx does not exist; did you mean {near}?"
    )


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_half_is_named(tmp_path: Path, suffix: str) -> None:
    prefix = write_corpus(tmp_path / "wiki", [5])
    Path(prefix + suffix).unlink()
    assert refused(prefix).endswith(f"{prefix}{suffix} does not exist")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_file_instead_of_a_prefix_is_explained(tmp_path: Path, suffix: str) -> None:
    prefix = write_corpus(tmp_path / "wiki", [5])
    assert refused(prefix + suffix) == (
        f"{prefix}{suffix}: give the path of a corpus without its {suffix}"
    )


def test_instruction_data_are_recognised(tmp_path: Path) -> None:
    write_rows(tmp_path / "alpaca", [made_up([5])])
    config = DataConfig(data_path=(f"{tmp_path}/alpaca",))
    for read in (read_corpora, read_descriptions):
        with pytest.raises(UsageError) as caught:
            read(config)
        assert str(caught.value) == (
            f"{tmp_path}/alpaca: is instruction data: give --is-instruction-dataset"
        )


@pytest.mark.parametrize("size", [0, 5, 20, 40])
def test_a_torn_index_is_named(tmp_path: Path, size: int) -> None:
    prefix = write_corpus(tmp_path / "wiki", [5, 6])
    os.truncate(f"{prefix}.idx", size)
    assert refused(prefix).startswith(f"{prefix}.idx: ")


def test_torn_tokens_are_named(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "wiki", [5, 6])
    os.truncate(f"{prefix}.bin", 40)
    assert refused(prefix).startswith(f"{prefix}.bin: torn")


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_a_corpus_without_tokens_is_refused(tmp_path: Path, lengths: list[int]) -> None:
    prefix = write_corpus(tmp_path / "wiki", lengths)
    assert refused(prefix) == f"{prefix}.bin: holds no tokens"


def test_the_tokenizer_is_the_one_that_all_descriptions_name(tmp_path: Path) -> None:
    paths = [write_corpus(tmp_path / name, [5]) for name in "abc"]
    describe(paths[1], tokenizer="t1")
    corpora = read_corpora(DataConfig(data_path=tuple(paths)))
    assert [corpus.tokens for corpus in corpora] == [5, 5, 5]
    assert common_tokenizer(corpora[:1]) is None
    assert common_tokenizer(corpora) == corpora[1].info
    describe(paths[2], tokenizer="t2", tokenizer_identity="b")
    with pytest.raises(UsageError) as caught:
        common_tokenizer(read_corpora(DataConfig(data_path=tuple(paths))))
    assert str(caught.value) == (
        f"the data was made with different tokenizers: {paths[1]} with t1, {paths[2]} with t2"
    )


def test_descriptions_are_read_without_the_index(tmp_path: Path) -> None:
    paths = [describe(write_corpus(tmp_path / name, [3]), vocab_size=9) for name in "ab"]
    config = DataConfig(data_path=tuple(paths))
    info = common_tokenizer(read_corpora(config))
    assert info is not None
    for path in paths:
        Path(f"{path}.idx").write_bytes(b"torn")  # another process will say so
    assert common_tokenizer(read_descriptions(config)) == info
    Path(f"{paths[1]}.idx").unlink()
    with pytest.raises(UsageError, match=f"incomplete: {paths[1]}.idx does not exist"):
        read_descriptions(config)


@pytest.mark.parametrize("split", [(969, 30, 1), (90, 10), (1,), (1, 0, 1), (0.3, 0.3, 0.4)])
def test_splits_begin_and_end_where_megatrons_do(split: tuple[float, ...]) -> None:
    platform.import_engine()
    from megatron.core.datasets import blended_megatron_dataset_config as engine

    words = ",".join(map(str, split))
    expected = engine.convert_split_vector_to_split_matrix(engine.parse_and_normalize_split(words))
    assert split_bounds(DataConfig(data_path=("a",), split=split)) == expected


def test_a_split_without_documents_is_refused_if_samples_are_taken_of_it(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "wiki", [20] * 10)
    config = DataConfig(data_path=(prefix,))
    assert refused_split(config) == (
        f"{prefix} has 0 tokens in 0 documents for validation (--split 969,30,1 of its 10 "
        "documents); a sample takes 9: --seq-length 8 and the token after it. Give more or shorter "
        "documents, or another split, or do without validation"
    )
    check_splits(config, read_corpora(config), seq_length=8, samples=(4, 0, 0))
    one = DataConfig(data_path=(prefix,), split=(1,))
    check_splits(one, read_corpora(one), seq_length=8, samples=(4, 4, 4))


def test_a_corpus_shorter_than_a_sample_is_refused(tmp_path: Path) -> None:
    long, short = write_corpus(tmp_path / "a", [9]), write_corpus(tmp_path / "b", [4, 4])
    config = DataConfig(train_data_path=(long,), valid_data_path=("1", long, "1", short))
    assert refused_split(config) == (
        f"{short} has 8 tokens in 2 documents for validation; a sample takes 9: --seq-length 8 and "
        "the token after it. Give more or shorter documents, or another split, or do without "
        "validation"
    )
    check_splits(config, read_corpora(config), seq_length=7, samples=(4, 4, 4))


def test_the_fingerprint_is_of_the_lengths(tmp_path: Path) -> None:
    prefixes = (
        write_corpus(tmp_path / "a", [5, 6]),
        write_corpus(tmp_path / "b", [5, 6], first=3),
        write_corpus(tmp_path / "c", [6, 5]),
    )
    a, b, c = [corpus.fingerprint() for corpus in read_corpora(DataConfig(data_path=prefixes))]
    assert a == b
    assert a != c
