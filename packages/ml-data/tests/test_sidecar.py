from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from ml_data.description import to_json
from ml_data.sidecar import CorpusInfo, read_sidecar, sidecar_path, unigram_entropy
from ml_models.flags import UsageError

INFO = CorpusInfo(
    tokenizer="tokenizer.json",
    tokenizer_kind="tokenizers",
    tokenizer_identity="tokenizers-0",
    vocab_size=4,
    bos=None,
    eod=1,
    pad=1,
    append_eod=True,
    key="text",
    documents=1,
    empty_documents=0,
    too_long_documents=0,
    seq_length=None,
    tokens=3,
    text_bytes=5,
    unigram_entropy=0.5,
    dtype="uint16",
    bin_bytes=6,
    bin_sha256="0",
    created_by="ml-data 1.0.0",
)


def test_what_is_written_is_read(tmp_path):
    prefix = tmp_path / "data.v1_text_document"
    assert read_sidecar(prefix) is None
    sidecar_path(prefix).write_text(to_json(INFO))
    assert sidecar_path(prefix).name == "data.v1_text_document.json"
    assert read_sidecar(prefix) == INFO


def test_entries_of_later_versions_are_passed_over(tmp_path):
    later = dataclasses.asdict(INFO) | {"of_the_future": 1}
    sidecar_path(tmp_path / "data").write_text(json.dumps(later))
    assert read_sidecar(tmp_path / "data") == INFO


def test_a_description_of_another_run_is_refused(tmp_path):
    sidecar_path(tmp_path / "data").write_text(to_json(INFO))
    (tmp_path / "data.bin").write_bytes(b"8 bytes.")
    with pytest.raises(UsageError, match=r"data\.json: not of the same run .* 6 bytes, not 8"):
        read_sidecar(tmp_path / "data")


@pytest.mark.parametrize("content", ["{", "[]", "{}", "null"])
def test_another_json_file_is_refused(tmp_path, content):
    sidecar_path(tmp_path / "data").write_text(content)
    with pytest.raises(UsageError, match=r"data\.json: not the description of a dataset"):
        read_sidecar(tmp_path / "data")


@pytest.mark.parametrize(
    ("field", "value"),
    [("vocab_size", "4"), ("tokenizer", 7), ("append_eod", 1), ("level", "page"), ("eod", 1.5)],
)
def test_a_value_of_another_type_is_refused(tmp_path, field, value):
    altered = dataclasses.asdict(INFO) | {field: value}
    sidecar_path(tmp_path / "data").write_text(json.dumps(altered))
    with pytest.raises(UsageError, match=f"not the description of a dataset .{field} cannot be"):
        read_sidecar(tmp_path / "data")


def test_the_entropy_is_that_of_the_frequencies():
    assert unigram_entropy(np.array([5, 5, 0, 5, 5])) == pytest.approx(math.log(4))
    assert str(unigram_entropy(np.array([0, 7]))) == "0.0"
    half, quarter = math.log(2) / 2, math.log(4) / 4
    assert unigram_entropy(np.array([2, 1, 1])) == pytest.approx(half + 2 * quarter)
