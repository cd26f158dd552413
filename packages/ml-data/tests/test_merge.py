from __future__ import annotations

import hashlib
import json
import resource
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from ml_data import merge as merging
from ml_data.atomic import FileSet
from ml_data.cli import main
from ml_data.description import to_json
from ml_data.indexed import IndexedDataset, IndexedDatasetWriter
from ml_data.instruction.sample_info import FileInfo, SampleInfo, info_path, read_sample_info
from ml_data.sidecar import read_sidecar


def merge(directory: Path, prefix: Path, *flags: str) -> int:
    return main(["merge", "--input", str(directory), "--output-prefix", str(prefix), *flags])


def prepare(source: Path, prefix: Path, tokenizer: Path, *flags: str) -> None:
    where = ["--input", str(source), "--output-prefix", str(prefix)]
    assert main(["pretrain", *where, "--tokenizer-name-or-path", str(tokenizer), *flags]) == 0


def write(prefix: Path, documents: list[list[list[int]]], dtype: str = "int32") -> None:
    """Write documents of sequences, as somebody else may have done: without a description."""
    sequences = [sequence for document in documents for sequence in document]
    with FileSet() as files:
        writer = IndexedDatasetWriter(prefix, dtype, files)
        lengths, numbers = (np.array([*map(len, parts)], int) for parts in (sequences, documents))
        writer.add_documents(np.array([t for s in sequences for t in s], dtype), lengths, numbers)
        writer.write_index()
        files.publish()


def md5s(directory: Path, name: str) -> dict[str, str]:
    paths = (directory / f"{name}.{suffix}" for suffix in ("bin", "idx", "json"))
    return {path.suffix: hashlib.md5(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture
def parts(texts, tmp_path) -> Path:
    """A corpus in three files, and the whole of it."""
    pieces = [piece for text in texts for piece in text.split("\n\n")]
    cuts = [0, 100, 101, len(pieces)]
    directory = tmp_path / "texts"
    directory.mkdir()
    whole = ""
    for number, (start, stop) in enumerate(pairwise(cuts)):
        lines = [json.dumps({"text": t, "title": t[:9]}) + "\n" for t in pieces[start:stop]]
        (directory / f"{number}.jsonl").write_text("".join(lines))
        whole += "".join(lines)
    (tmp_path / "whole.jsonl").write_text(whole)
    return directory


@pytest.mark.parametrize("flags", [("--append-eod",), ("--split-sentences", "--token-dtype=int32")])
def test_merging_equals_preparing_everything_in_one_go(bpe, parts, tmp_path, monkeypatch, flags):
    monkeypatch.setattr(merging, "_BLOCK_TOKENS", 500)  # many blocks
    level = "sentence" if "--split-sentences" in flags else "document"
    keys = ("--json-keys", "text", "title")
    for number in range(3):
        prepare(parts / f"{number}.jsonl", tmp_path / "done" / f"p{number}", bpe, *keys, *flags)
    prepare(tmp_path / "whole.jsonl", tmp_path / "whole", bpe, *keys, *flags)

    names = [f"{key}_{level}" for key in ("text", "title")]
    assert merge(tmp_path / "done", tmp_path / "merged", "--keys", *names) == 0

    for name in names:
        assert md5s(tmp_path, f"merged_{name}") == md5s(tmp_path, f"whole_{name}")
        read_sidecar(tmp_path / f"merged_{name}")


def test_a_column_with_a_longer_name_is_another_key(bpe, tmp_path, capsys):
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps({"text": "short", "full_text": "a longer text"}) + "\n")
    keys = ("--json-keys", "text", "full_text")
    prepare(source, tmp_path / "done" / "a", bpe, *keys)
    assert merge(tmp_path / "done", tmp_path / "all") == 0
    for name in ("text_document", "full_text_document"):
        assert merge(tmp_path / "done", tmp_path / "all", "--keys", name) == 0
        assert md5s(tmp_path, f"all_{name}") == md5s(tmp_path / "done", f"a_{name}")
    for path in (tmp_path / "done").glob("a_text_document.*"):
        path.unlink()
    assert merge(tmp_path / "done", tmp_path / "all") == 2
    assert "; a_full_text_document is of full_text_document" in capsys.readouterr().err


def test_names_that_may_be_of_two_keys_are_refused_until_both_are_given(tmp_path, capsys):
    for number, name in enumerate(["a", "b", "a_full", "b_full", "a_2"]):
        write(tmp_path / "in" / f"{name}_text_document", [[[number]]])
    assert merge(tmp_path / "in", tmp_path / "all") == 2
    expected = "a_full_text_document may be of the key full_text_document, as a_text_document is"
    assert expected in capsys.readouterr().err
    keys = ("--keys", "text_document", "full_text_document")
    assert merge(tmp_path / "in", tmp_path / "all", *keys) == 0
    joined = [IndexedDataset(f"{tmp_path}/all_{key}").tokens.tolist() for key in keys[1:]]
    assert joined == [[4, 0, 1], [2, 3]]


def test_samples_may_have_names_that_begin_alike(tmp_path):
    for name in ("alpaca", "alpaca_en"):
        write_samples(tmp_path / "in" / name, [[1, 2]])
    assert merge(tmp_path / "in", tmp_path / "all", "--keys", *KEYS) == 0
    assert read_sample_info(tmp_path / "all").samples == 2


def test_datasets_without_a_description_are_merged_without_one(tmp_path):
    write(tmp_path / "in" / "a_x_document", [[[1, 2]], [[3], [4, 5]]])
    write(tmp_path / "in" / "b_x_document", [[[6]], []])
    assert merge(tmp_path / "in", tmp_path / "in" / "all", "--keys", "x_document") == 0
    merged = IndexedDataset(tmp_path / "in" / "all_x_document")
    assert [merged[n].tolist() for n in range(len(merged))] == [[1, 2], [3, 4, 5], [6], []]
    assert merged.sequence_lengths.tolist() == [2, 1, 2, 1]
    assert read_sidecar(tmp_path / "in" / "all_x_document") is None


def test_no_description_of_an_earlier_run_stays(bpe, parts, tmp_path):
    prepare(parts / "1.jsonl", tmp_path / "all", bpe)
    write_samples(tmp_path / "all", [[1, 2]])
    write(tmp_path / "in" / "a_text_document", [[[1]]])
    write_samples(tmp_path / "in" / "a", [[1]])
    info_path(tmp_path / "in" / "a").unlink()
    assert merge(tmp_path / "in", tmp_path / "all") == 0
    assert read_sidecar(tmp_path / "all_text_document") is None
    assert read_sample_info(tmp_path / "all") is not None  # of what was not merged
    assert merge(tmp_path / "in", tmp_path / "all", "--keys", *KEYS) == 0
    assert read_sample_info(tmp_path / "all") is None


def test_a_second_run_does_not_read_the_first(tmp_path):
    write(tmp_path / "a_text_document", [[[1]]])
    for _ in range(2):
        assert merge(tmp_path, tmp_path / "all") == 0
        assert len(IndexedDataset(tmp_path / "all_text_document")) == 1


def test_parts_come_in_the_order_of_their_names(tmp_path):
    for number, name in enumerate("hbgcfdea"):
        write(tmp_path / "in" / f"{name}_text_document", [[[number]]])
    assert merge(tmp_path / "in", tmp_path / "all") == 0
    assert IndexedDataset(tmp_path / "all_text_document").tokens.tolist() == [
        7,
        1,
        3,
        5,
        6,
        4,
        2,
        0,
    ]


# Instruction data.

KEYS = ("packed_input_ids_document", "packed_labels_document")


def write_samples(prefix: Path, samples: list[list[int]], **changes: object) -> None:
    for key in KEYS:
        labels = [[-100, *sample[1:]] if "labels" in key else sample for sample in samples]
        write(Path(f"{prefix}_{key}"), [[label] for label in labels])
    file = FileInfo(bin_bytes=4 * sum(map(len, samples)), bin_sha256="", idx_sha256="")
    values = {
        "kind": "instruction", "tokenizer": "t", "tokenizer_kind": "tokenizers",
        "tokenizer_identity": "t-0", "vocab_size": 9, "bos": None, "eod": 1, "pad": 1,
        "template": "default", "handlers": ("A",), "append_eod": False, "seq_length": 8,
        "packed": False, "samples": len(samples), "rows": len(samples), "cut": 1,
        "tokens": sum(map(len, samples)), "learned_tokens": 2, "longest": max(map(len, samples)),
        "records": len(samples) + 1, "skipped": {"empty": 1}, "failed": 0,
        "files": {"input_ids": file, "labels": file}, "created_by": "",
    } | changes  # fmt: skip
    info_path(prefix).write_text(to_json(SampleInfo(**values)))


def test_instruction_data_are_merged_with_their_description(tmp_path):
    write_samples(tmp_path / "in" / "a", [[1, 2, 3], [4, 5]])
    write_samples(tmp_path / "in" / "b", [[6, 7, 8, 9]], handlers=("A", "B"))
    assert merge(tmp_path / "in", tmp_path / "all", "--keys", *KEYS) == 0
    labels = IndexedDataset(tmp_path / "all_packed_labels_document")
    assert [labels[n].tolist() for n in range(3)] == [[-100, 2, 3], [-100, 5], [-100, 7, 8, 9]]
    info = read_sample_info(tmp_path / "all")
    assert (info.samples, info.rows, info.tokens, info.longest) == (3, 3, 9, 4)
    assert (info.records, info.skipped, info.handlers) == (5, {"empty": 2}, ("A", "B"))
    written = (tmp_path / "all_packed_labels_document.bin").read_bytes()
    assert info.files["labels"].bin_sha256 == hashlib.sha256(written).hexdigest()


def test_instruction_data_must_have_all_keys_of_all_parts(tmp_path, capsys):
    write_samples(tmp_path / "in" / "a", [[1, 2]])
    write_samples(tmp_path / "in" / "b", [[1, 2]])
    for suffix in ("bin", "idx"):
        (tmp_path / "in" / f"b_packed_labels_document.{suffix}").unlink()
    assert merge(tmp_path / "in", tmp_path / "all", "--keys", *KEYS) == 2
    assert f"of {tmp_path}/in/b only one is there" in capsys.readouterr().err


def test_instruction_data_are_not_merged_to_where_preferences_are(tmp_path, capsys):
    write_samples(tmp_path / "in" / "a", [[1, 2]])
    write(tmp_path / "all_packed_chosen_input_ids_document", [[[1]]])
    assert merge(tmp_path / "in", tmp_path / "all", "--keys", *KEYS) == 2
    assert f"--output-prefix {tmp_path}/all: preference data are there" in capsys.readouterr().err


def test_instruction_data_of_different_templates_are_refused(tmp_path, capsys):
    write_samples(tmp_path / "in" / "a", [[1, 2]])
    write_samples(tmp_path / "in" / "b", [[1, 2]], template="qwen")
    assert merge(tmp_path / "in", tmp_path / "all", "--keys", *KEYS) == 2
    assert "in/b: template is qwen, that of" in capsys.readouterr().err


# What cannot be merged.


def test_parts_of_other_types_are_refused(tmp_path, capsys):
    write(tmp_path / "in" / "a_text_document", [[[1]]], "uint16")
    write(tmp_path / "in" / "b_text_document", [[[1]]], "int32")
    assert merge(tmp_path / "in", tmp_path / "all") == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}/in/b_text_document: its tokens are int32, those of" in error
    assert not list(tmp_path.glob("*all*"))


def test_parts_of_other_tokenizers_are_refused(bpe, sentencepiece_model, parts, tmp_path, capsys):
    for name, tokenizer in (("a", bpe), ("b", sentencepiece_model)):
        prepare(parts / "1.jsonl", tmp_path / "done" / name, tokenizer)
    assert merge(tmp_path / "done", tmp_path / "all") == 2
    error = capsys.readouterr().err
    assert "done/b_text_document: tokenizer_identity is sentencepiece-" in error
    assert not list(tmp_path.glob("*all*"))


def test_parts_that_end_documents_with_other_tokens_are_refused(bpe, parts, tmp_path, capsys):
    other = shutil.copytree(bpe, tmp_path / "other")
    config = json.loads((bpe / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<pad>"}))
    for name, tokenizer in (("a", bpe), ("b", other)):
        prepare(parts / "1.jsonl", tmp_path / "done" / name, tokenizer, "--append-eod")
    assert merge(tmp_path / "done", tmp_path / "all") == 2
    assert "done/b_text_document: eod is 2, that of" in capsys.readouterr().err


@pytest.mark.parametrize("token", [-5, 2000])
def test_a_part_with_tokens_that_are_none_is_refused(bpe, parts, tmp_path, capsys, token):
    for name in ("a", "b"):
        prepare(parts / "1.jsonl", tmp_path / "done" / name, bpe, "--token-dtype=int32")
    tokens = np.memmap(tmp_path / "done" / "b_text_document.bin", "<i4", "r+")
    tokens[0] = token
    tokens.flush()
    assert merge(tmp_path / "done", tmp_path / "all") == 2
    assert f"b_text_document.bin: damaged: it holds {token}, " in capsys.readouterr().err
    assert not list(tmp_path.glob("*all*"))


def test_a_part_whose_tokens_were_changed_is_refused(bpe, parts, tmp_path, capsys):
    for name in ("a", "b"):
        prepare(parts / "1.jsonl", tmp_path / "done" / name, bpe)
    tokens = np.memmap(tmp_path / "done" / "b_text_document.bin", "<u2", "r+")
    tokens[0] ^= 1
    tokens.flush()
    assert merge(tmp_path / "done", tmp_path / "all") == 2
    assert "b_text_document.bin: damaged: its tokens are not those" in capsys.readouterr().err
    assert not list(tmp_path.glob("*all*"))


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_part_of_which_a_file_is_missing_is_refused(tmp_path, capsys, suffix):
    write(tmp_path / "in" / "a_text_document", [[[1]]])
    write(tmp_path / "in" / "b_text_document", [[[1]]])
    (tmp_path / "in" / f"b_text_document.{suffix}").unlink()
    assert merge(tmp_path / "in", tmp_path / "all") == 2
    assert f"b_text_document.{suffix} does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--keys", "title_document"], "has no *_title_document; it has a_text_document"),
        (["--keys", ""], "--keys needs at least one value"),
        (["--keys", "text", "text"], "--keys 'text': a key is given once"),
        (["--input", "nowhere"], "--input nowhere: no such directory"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, flags, message):
    write(tmp_path / "in" / "a_text_document", [[[1]]])
    assert merge(tmp_path / "in", tmp_path / "all", *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_memory_does_not_grow_with_the_parts(tmp_path):
    document = np.arange(1 << 20, dtype=np.int32)
    with FileSet() as files:
        writer = IndexedDatasetWriter(tmp_path / "a_text_document", "int32", files)
        for _ in range(64):  # 256 MiB
            writer.add_documents(document, np.array([len(document)]))
        writer.write_index()
        files.publish()
    (tmp_path / "b_text_document.bin").symlink_to("a_text_document.bin")
    (tmp_path / "b_text_document.idx").symlink_to("a_text_document.idx")
    arguments = ["--input", str(tmp_path), "--output-prefix", str(tmp_path / "all")]
    program = (
        "from ml_data.cli import main\n"
        f"assert main(['merge', *{arguments}]) == 0\n"
        "(line,) = [line for line in open('/proc/self/status') if line.startswith('VmHWM')]\n"
        "print(line.split()[1])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert int(done.stdout) * 1024 < 200e6
    assert len(IndexedDataset(tmp_path / "all_text_document")) == 128


def test_there_may_be_more_parts_than_a_process_may_open_files(tmp_path):
    for number in range(60):
        write(tmp_path / "in" / f"{number:02}_text_document", [[[number]]])
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (60, before[1]))
    try:
        assert merge(tmp_path / "in", tmp_path / "all") == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert IndexedDataset(tmp_path / "all_text_document").tokens.tolist() == [*range(60)]


def test_a_full_disk_leaves_nothing(tmp_path, capsys):
    write(tmp_path / "in" / "a_text_document", [[list(range(1000))]])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        assert merge(tmp_path / "in", tmp_path / "all") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "ml-data merge: File too large: " in capsys.readouterr().err
    assert not list(tmp_path.glob("*all*"))
