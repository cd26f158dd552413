"""A torn or altered index is an error, or changes nothing about the tokens: never garbage.

The oracle knows the file format from nowhere but its own few lines, and what it holds by content.
"""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ml_data.atomic import FileSet
from ml_data.indexed import IndexedDataset, IndexedDatasetWriter
from ml_models.flags import UsageError

HEADER = 34

examples = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def mutated(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw one mutation of a file: an overwritten, removed, repeated or inserted range, an end."""
    kind = draw(st.sampled_from(["set", "set", "set", "add", "cut", "remove", "insert", "number"]))
    start = draw(st.integers(0, len(content) - 1))
    length = draw(st.integers(1, 16))
    noise = draw(st.binary(min_size=length, max_size=length))
    match kind:
        case "set":
            return content[:start] + noise + content[start + length :]
        case "add":
            byte = (content[start] + draw(st.integers(1, 255))) % 256
            return content[:start] + bytes([byte]) + content[start + 1 :]
        case "cut":
            return content[:start]
        case "remove":
            return content[:start] + content[start + length :]
        case "insert":
            return content[:start] + noise + content[start:]
    number = draw(st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32, 2**61, 2**63 - 1, 2**64 - 1]))
    field = HEADER - 16 + 8 * draw(st.integers(0, 1))  # how many of what there is
    return content[:field] + struct.pack("<Q", number) + content[field + 8 :]


@pytest.fixture(scope="module", params=["uint16", "int32"])
def dataset(request, tmp_path_factory) -> Path:
    """Documents of 0 to 3 sequences of 0 to 5 tokens."""
    prefix = tmp_path_factory.mktemp("fuzz") / "data"
    random = np.random.default_rng(5)
    sequences = random.integers(0, 4, 40)
    lengths = random.integers(0, 6, sequences.sum())
    tokens = random.integers(0, 60_000, lengths.sum())
    with FileSet() as files:
        writer = IndexedDatasetWriter(prefix, request.param, files)
        writer.add_documents(tokens, lengths, sequences)
        writer.write_index()
        files.publish()
    np.save(f"{prefix}.npy", tokens)
    return prefix


def beside(prefix: Path, index: bytes) -> Path:
    """Return a dataset of the same tokens with another index."""
    other = prefix.with_name("altered")
    if not Path(f"{other}.bin").exists():
        Path(f"{other}.bin").hardlink_to(f"{prefix}.bin")
    Path(f"{other}.idx").unlink(missing_ok=True)
    Path(f"{other}.idx").write_bytes(index)
    return other


@examples
@given(data=st.data())
def test_an_altered_index_is_an_error_or_gives_the_same_tokens(dataset, data):
    whole = Path(f"{dataset}.idx").read_bytes()
    altered = data.draw(mutated(whole))
    try:
        opened = IndexedDataset(beside(dataset, altered))
    except UsageError:
        return
    tokens = np.load(f"{dataset}.npy")
    assert np.array_equal(opened.tokens, tokens)
    documents = [opened[number] for number in range(len(opened))]
    assert np.array_equal(np.concatenate(documents), tokens)
    assert sum(opened.lengths(number).sum() for number in range(len(opened))) == len(tokens)
    boundaries = HEADER + 12 * len(opened.sequence_lengths)
    assert altered[:boundaries] == whole[:boundaries]  # all but where documents begin is certain


@examples
@given(content=st.binary(max_size=200), magic=st.booleans())
def test_any_bytes_are_no_index(dataset, content, magic):
    with pytest.raises(UsageError):
        IndexedDataset(beside(dataset, b"MMIDIDX\x00\x00" * magic + content))


@pytest.mark.parametrize("size", [2**20, 2**32, 2**60])
def test_a_header_that_promises_more_than_the_file_has_allocates_nothing(dataset, size):
    whole = Path(f"{dataset}.idx").read_bytes()
    altered = whole[: HEADER - 16] + struct.pack("<QQ", size, size) + whole[HEADER:]
    prefix = beside(dataset, altered)
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match=rf"torn: {len(whole)} bytes, its header describes"):
            IndexedDataset(prefix)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_where_documents_begin_is_certain_by_the_hash_of_the_index(dataset):
    """Structure alone cannot show it: `inspect` compares the hash that the description has."""
    whole = Path(f"{dataset}.idx").read_bytes()
    opened = IndexedDataset(dataset)
    before, after = opened.document_indices[5:7].tolist()
    place = HEADER + 12 * len(opened.sequence_lengths) + 8 * 6
    assert whole[place : place + 8] == struct.pack("<q", after)
    for number in range(-1, len(opened.sequence_lengths) + 1):
        altered = whole[:place] + struct.pack("<q", number) + whole[place + 8 :]
        allowed = before <= number <= opened.document_indices[7]
        if allowed:
            IndexedDataset(beside(dataset, altered))
        else:
            with pytest.raises(UsageError, match="damaged: its documents are not all"):
                IndexedDataset(beside(dataset, altered))
