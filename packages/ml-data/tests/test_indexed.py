from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from ml_data.atomic import FileSet
from ml_data.indexed import IndexedDataset, IndexedDatasetWriter, token_dtype
from ml_models.flags import UsageError


@pytest.fixture(scope="session")
def megatron() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Transformer Engine and Apex, which nothing here needs
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


def random_documents(dtype: str, count: int = 200) -> list[np.ndarray]:
    random = np.random.default_rng(1)
    top = min(np.iinfo(dtype).max, 130_000)
    return [random.integers(0, top, random.integers(1, 50)).astype(dtype) for _ in range(count)]


def write(prefix: Path, documents: list[np.ndarray], batch: int = 7) -> IndexedDatasetWriter:
    with FileSet() as files:
        writer = IndexedDatasetWriter(prefix, documents[0].dtype, files)
        for start in range(0, len(documents), batch):
            part = documents[start : start + batch]
            writer.add_documents(np.concatenate(part), np.array([len(d) for d in part]))
        writer.write_index()
        files.publish()
    return writer


def write_with_megatron(megatron, prefix: Path, documents: list[np.ndarray], **lengths) -> None:
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=documents[0].dtype.type)
    for number, document in enumerate(documents):
        builder.add_document(document, lengths.get(f"of_{number}", [len(document)]))
    builder.finalize(f"{prefix}.idx")


@pytest.fixture
def dataset(tmp_path) -> Path:
    write(tmp_path / "data_text_document", random_documents("uint16"))
    return tmp_path / "data_text_document"


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_files_are_byte_for_byte_megatrons(megatron, tmp_path, dtype):
    documents = random_documents(dtype)
    writer = write(tmp_path / "ours", documents)
    write_with_megatron(megatron, tmp_path / "theirs", documents)
    for suffix in ("bin", "idx"):
        theirs = (tmp_path / f"theirs.{suffix}").read_bytes()
        assert (tmp_path / f"ours.{suffix}").read_bytes() == theirs
    content = (tmp_path / "ours.bin").read_bytes()
    assert writer.bin_bytes == len(content)
    assert writer.bin_sha256 == hashlib.sha256(content).hexdigest()


def test_megatron_reads_what_was_written(megatron, tmp_path):
    documents = random_documents("int32")
    write(tmp_path / "ours", documents)
    theirs = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert len(theirs) == len(documents)
    assert all(np.array_equal(theirs[n], document) for n, document in enumerate(documents))


def test_documents_of_several_sequences_written_by_megatron_are_read(megatron, tmp_path):
    documents = random_documents("int32", 5)
    lengths = [len(documents[2]) - 1, 1] if len(documents[2]) > 1 else [1]
    write_with_megatron(megatron, tmp_path / "theirs", documents, of_2=lengths)
    dataset = IndexedDataset(tmp_path / "theirs")
    assert len(dataset) == 5
    assert len(dataset.sequence_lengths) == 6
    assert all(np.array_equal(dataset[n], document) for n, document in enumerate(documents))
    assert np.array_equal(dataset.tokens, np.concatenate(documents))
    with pytest.raises(IndexError, match="document 5 of 5"):
        dataset[5]


@pytest.mark.parametrize("vocab_size", [100, 65499, 65500, 130_000])
def test_the_token_type_is_the_one_megatron_chooses(megatron, vocab_size):
    assert token_dtype(vocab_size) == megatron.DType.optimal_dtype(vocab_size)


def test_a_missing_dataset_is_named_with_the_nearest_one(dataset):
    with pytest.raises(
        UsageError, match=r"no dataset .*/data: .*/data.idx does not exist; did you"
    ) as e:
        IndexedDataset(dataset.with_name("data"))
    assert str(e.value).endswith(f"did you mean {dataset}?")
    with pytest.raises(UsageError, match=r"other\.idx does not exist$"):
        IndexedDataset(dataset.with_name("other"))


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_dataset_with_one_file_is_incomplete(dataset, suffix):
    Path(f"{dataset}.{suffix}").unlink()
    with pytest.raises(UsageError, match=f"incomplete: .*{suffix} does not exist"):
        IndexedDataset(dataset)


def test_torn_and_damaged_files_are_named(dataset):
    tokens, index = Path(f"{dataset}.bin"), Path(f"{dataset}.idx")
    whole = index.read_bytes()
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(UsageError, match=r"\.bin: torn, or of another dataset: \d+ bytes"):
        IndexedDataset(dataset)
    damage = {
        b"": "not a Megatron index",
        b"PK" + whole[2:]: "not a Megatron index",
        whole[:9] + b"\x02" + whole[10:]: "version 2",
        whole[:-8]: "torn: .* bytes",
        whole[:-8] + b"\x01" * 8: "damaged",
        whole[:34] + b"\xff" + whole[35:]: "damaged",
    }
    for content, reason in damage.items():
        index.write_bytes(content)
        with pytest.raises(UsageError, match=rf"\.idx: {reason}"):
            IndexedDataset(dataset)
