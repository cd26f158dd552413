from __future__ import annotations

import contextlib
import hashlib
import itertools
import warnings
from collections.abc import Iterator
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


def write_with_megatron(
    megatron, prefix: Path, documents: list[np.ndarray], lengths: list[list[int]] | None = None
) -> None:
    dtype = documents[0].dtype.type if documents else np.int32
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document, sizes in zip(documents, lengths or [[len(d)] for d in documents], strict=True):
        builder.add_document(document, sizes)
    builder.finalize(f"{prefix}.idx")


@contextlib.contextmanager
def altered(path: Path, place: int, change: int) -> Iterator[None]:
    """Flip bits of one byte of a file for the time of the context."""
    with path.open("r+b", buffering=0) as file:
        file.seek(place)
        before = file.read(1)
        file.seek(place)
        file.write(bytes([before[0] ^ change]))
        yield
        file.seek(place)
        file.write(before)


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


def of_several_sequences(dtype: str) -> tuple[list[np.ndarray], list[list[int]]]:
    """Documents of 0 to 3 sequences, of which some are empty, and the lengths of these."""
    random = np.random.default_rng(3)
    lengths = [random.integers(0, 9, count).tolist() for count in random.integers(0, 4, 50)]
    lengths[7:10] = [[], [0], [4, 0, 5]]
    documents = [random.integers(0, 60_000, sum(sizes)).astype(dtype) for sizes in lengths]
    return documents, lengths


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_documents_of_several_sequences_are_byte_for_byte_megatrons(megatron, tmp_path, dtype):
    documents, lengths = of_several_sequences(dtype)
    with FileSet() as files:
        writer = IndexedDatasetWriter(tmp_path / "ours", dtype, files)
        for start in range(0, len(documents), 7):
            part = lengths[start : start + 7]
            writer.add_documents(
                np.concatenate(documents[start : start + 7]),
                np.array([n for sizes in part for n in sizes]),
                np.array([len(sizes) for sizes in part]),
            )
        writer.write_index()
        files.publish()
    write_with_megatron(megatron, tmp_path / "theirs", documents, lengths)
    for suffix in ("bin", "idx"):
        theirs = (tmp_path / f"theirs.{suffix}").read_bytes()
        assert (tmp_path / f"ours.{suffix}").read_bytes() == theirs
    index = (tmp_path / "ours.idx").read_bytes()
    assert writer.idx_sha256 == hashlib.sha256(index).hexdigest()


def test_documents_of_several_sequences_written_by_megatron_are_read(megatron, tmp_path):
    documents, lengths = of_several_sequences("int32")
    write_with_megatron(megatron, tmp_path / "theirs", documents, lengths)
    dataset = IndexedDataset(tmp_path / "theirs")
    assert len(dataset) == len(documents)
    assert all(np.array_equal(dataset[n], document) for n, document in enumerate(documents))
    assert [dataset.lengths(n).tolist() for n in range(len(documents))] == lengths
    assert np.array_equal(dataset.tokens, np.concatenate(documents))
    for wrong in (-1, len(documents)):
        with pytest.raises(IndexError, match=f"document {wrong} of {len(documents)}"):
            dataset[wrong]


def test_items_written_one_by_one_and_joined_by_megatron_are_read(megatron, tmp_path):
    """As its tools write and merge: `add_item`, `end_document`, `add_index`."""
    for name, start in (("one", 0), ("two", 100)):
        builder = megatron.IndexedDatasetBuilder(f"{tmp_path / name}.bin", dtype=np.uint16)
        for length in (3, 4):
            builder.add_item(megatron.torch.arange(start, start + length))
        builder.end_document()
        builder.end_document()
        builder.finalize(f"{tmp_path / name}.idx")
    builder = megatron.IndexedDatasetBuilder(f"{tmp_path / 'both'}.bin", dtype=np.uint16)
    for name in ("one", "two"):
        builder.add_index(str(tmp_path / name))
    builder.finalize(f"{tmp_path / 'both'}.idx")
    dataset = IndexedDataset(tmp_path / "both")
    assert [dataset[n].tolist() for n in range(len(dataset))] == [
        [0, 1, 2, 0, 1, 2, 3],
        [],
        [100, 101, 102, 100, 101, 102, 103],
        [],
    ]
    assert [dataset.lengths(n).tolist() for n in range(len(dataset))] == [[3, 4], [], [3, 4], []]


def test_a_dataset_without_documents_is_one(megatron, tmp_path):
    write_with_megatron(megatron, tmp_path / "theirs", [], [])
    dataset = IndexedDataset(tmp_path / "theirs")
    assert (len(dataset), len(dataset.tokens), dataset.dtype) == (0, 0, np.int32)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.float32, np.float64])
def test_numbers_that_are_no_ids_of_tokens_are_refused(megatron, tmp_path, dtype):
    """An altered type would be one of these: all that are read differ in size."""
    builder = megatron.IndexedDatasetBuilder(f"{tmp_path / 'data'}.bin", dtype=dtype)
    builder.add_document([1, 2], [2])
    builder.finalize(f"{tmp_path / 'data'}.idx")
    with pytest.raises(UsageError, match=f"holds {dtype.__name__}, which are no ids"):
        IndexedDataset(tmp_path / "data")


def test_a_multimodal_dataset_is_refused(megatron, tmp_path):
    builder = megatron.IndexedDatasetBuilder(f"{tmp_path / 'data'}.bin", multimodal=True)
    builder.add_document([1, 2], [2], [1])
    builder.finalize(f"{tmp_path / 'data'}.idx")
    with pytest.raises(UsageError, match="of a multimodal dataset"):
        IndexedDataset(tmp_path / "data")


def test_a_large_index_is_checked_to_its_end(tmp_path):
    """Beyond the million entries that are looked at together."""
    count = (1 << 20) + 10
    with FileSet() as files:
        writer = IndexedDatasetWriter(tmp_path / "data", np.uint16, files)
        writer.add_documents(np.zeros(count, np.uint16), np.ones(count, np.int32))
        writer.write_index()
        files.publish()
    assert len(IndexedDataset(tmp_path / "data")) == count
    index = Path(f"{tmp_path / 'data'}.idx")
    parts = {34: 4, 34 + 4 * count: 8, 34 + 12 * count: 8}
    for (start, size), entry in itertools.product(parts.items(), (0, count - 11, count - 10, -1)):
        for byte, change in ((0, 64), (2, 16)):
            place = start + size * (entry % count) + byte
            with altered(index, place, change), pytest.raises(UsageError, match=r"damaged|torn"):
                IndexedDataset(tmp_path / "data")
    IndexedDataset(tmp_path / "data")


def test_lengths_below_zero_are_damage_even_where_the_offsets_follow(dataset):
    index = Path(f"{dataset}.idx")
    whole = index.read_bytes()
    count = len(IndexedDataset(dataset).sequence_lengths)
    lengths = np.frombuffer(whole, "<i4", count, 34).copy()
    lengths[:2] = -5, lengths[0] + lengths[1] + 5
    offsets = np.cumsum(lengths) * 2 - lengths * 2
    index.write_bytes(
        whole[:34] + lengths.tobytes() + offsets.astype("<i8").tobytes() + whole[34 + 12 * count :]
    )
    with pytest.raises(UsageError, match="damaged: its offsets do not follow"):
        IndexedDataset(dataset)


def test_what_does_not_fit_is_not_written(tmp_path):
    with FileSet() as files:
        writer = IndexedDatasetWriter(tmp_path / "data", np.uint16, files)
        for token in (-1, 65536):
            with pytest.raises(ValueError, match=f"token {token} does not fit uint16"):
                writer.add_documents(np.array([5, token]), np.array([2]))
        with pytest.raises(ValueError, match="2 tokens, 1 lengths and 1 documents contradict"):
            writer.add_documents(np.array([5, 5]), np.array([1]))
        with pytest.raises(ValueError, match="contradict"):
            writer.add_documents(np.array([5, 5]), np.array([1, 1]), np.array([1]))


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
    with pytest.raises(UsageError, match=f"did you mean {dataset}[?]$"):
        IndexedDataset(f"{dataset}.bin")


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
