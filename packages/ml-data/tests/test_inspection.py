from __future__ import annotations

from pathlib import Path

import pytest

from ml_data.cli import main


@pytest.fixture
def prefix(bpe, jsonl, tmp_path) -> Path:
    where = ["--input", str(jsonl), "--output-prefix", str(tmp_path / "data")]
    assert main(["pretrain", *where, "--tokenizer-name-or-path", str(bpe), "--append-eod"]) == 0
    return tmp_path / "data_text_document"


def test_it_shows_sizes_and_description(prefix, texts, capsys):
    assert main(["inspect", "--data-path", str(prefix)]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["documents"] == str(len(texts))
    assert shown["dtype"] == "uint16"
    assert shown["vocab_size"] == "2000"
    assert shown["append_eod"] == "True"
    assert "first" not in shown


def test_with_a_tokenizer_it_shows_the_beginning_of_the_text(prefix, bpe, texts, capsys):
    argv = ["inspect", "--data-path", str(prefix), "--tokenizer-name-or-path", str(bpe)]
    assert main(argv) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("first document")
    assert repr(texts[0][:200])[1:-1] in last


def test_another_tokenizer_is_refused(prefix, sentencepiece_model, capsys):
    argv = ["inspect", "--data-path", str(prefix), "--tokenizer-name-or-path"]
    assert main([*argv, str(sentencepiece_model)]) == 2
    assert "the dataset is of another one: " in capsys.readouterr().err


def test_a_dataset_of_another_program_has_no_description(prefix, sentencepiece_model, capsys):
    Path(f"{prefix}.json").unlink()
    assert main(["inspect", "--data-path", str(prefix)]) == 0
    assert "none (not written by ml-data)" in capsys.readouterr().out
    argv = ["inspect", "--data-path", str(prefix), "--tokenizer-name-or-path"]
    assert main([*argv, str(sentencepiece_model)]) == 2
    assert "has no token 1" in capsys.readouterr().err


def test_a_torn_dataset_is_reported(prefix, capsys):
    Path(f"{prefix}.bin").write_bytes(b"")
    assert main(["inspect", "--data-path", str(prefix)]) == 2
    assert "data_text_document.bin: torn" in capsys.readouterr().err
