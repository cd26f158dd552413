from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers

from ml_data.cli import main
from ml_data.indexed import IndexedDataset
from ml_data.pretrain import Output, PretrainConfig, Source, Tokenization, preprocess
from ml_data.pretraining.sentences import split_sentences
from ml_data.reading import read_chunks
from ml_data.sidecar import read_sidecar
from ml_data.tokenizer import TokenizerConfig


def run(source: Path | str, prefix: Path, tokenizer: Path, *flags: str) -> int:
    """Run `ml-data pretrain` in this process."""
    where = ["--input", str(source), "--output-prefix", str(prefix)]
    return main(["pretrain", *where, "--tokenizer-name-or-path", str(tokenizer), *flags])


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def documents(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    return [dataset[n].tolist() for n in range(len(dataset))]


def bpe_ids(directory: Path, texts: list[str]) -> list[list[int]]:
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    return [backend.encode(text).ids for text in texts]


@pytest.fixture
def out(tmp_path) -> Path:
    directory = tmp_path / "out"
    directory.mkdir()
    return directory


@pytest.fixture
def long_jsonl(texts, tmp_path) -> Path:
    """Some 60 MB of text: many seconds of work."""
    path = tmp_path / "long.jsonl"
    block = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    with path.open("w") as file:
        while file.tell() < 60e6:
            file.write(block)
    return path


# What is written.


@pytest.mark.parametrize("vocab_size", [2000, 70_000])
def test_files_are_those_of_megatrons_builder(bpe, texts, jsonl, out, tmp_path, vocab_size):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    backend = tokenizers.Tokenizer.from_file(str(bpe / "tokenizer.json"))
    backend.add_tokens([f"<{n}>" for n in range(vocab_size - 2000)])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_bytes((bpe / "tokenizer_config.json").read_bytes())

    assert run(jsonl, out / "ours", tmp_path, "--append-eod") == 0

    dtype = DType.optimal_dtype(vocab_size)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for text in texts:
        ids = [*backend.encode(text).ids, 1]
        builder.add_document(ids, [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        theirs = (tmp_path / f"theirs.{suffix}").read_bytes()
        assert (out / f"ours_text_document.{suffix}").read_bytes() == theirs


def test_the_number_of_workers_and_the_size_of_chunks_change_nothing(
    bpe, texts, out, tmp_path, monkeypatch
):
    source = tmp_path / "many.jsonl"
    parts = [part for text in texts for part in text.split("\n\n")] * 3
    source.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts))
    results = []
    for workers, chunk in [("1", 1 << 20), ("2", 1 << 16), ("5", 5000)]:
        read = partial(read_chunks, chunk_bytes=chunk)
        monkeypatch.setattr("ml_data.pretrain.read_chunks", read)
        assert run(source, out / "data", bpe, "--append-eod", "--workers", workers) == 0
        results.append(files(out))
    assert results[0] == results[1] == results[2]
    assert len(results[0]) == 3
    expected = [[*ids, 1] for ids in bpe_ids(bpe, [part for part in parts if part])]
    assert documents(out / "data_text_document") == expected


def test_a_sentencepiece_model_gives_bos_and_its_own_ids(sentencepiece_model, texts, jsonl, out):
    assert run(jsonl, out / "data", sentencepiece_model) == 0
    model = str(sentencepiece_model / "tokenizer.model")
    expected = sentencepiece.SentencePieceProcessor(model_file=model).encode(texts, out_type=int)
    assert documents(out / "data_text_document") == [[1, *ids] for ids in expected]

    flags = ["--tokenizer-type", "SentencePieceTokenizer", "--append-eod"]
    assert run(jsonl, out / "data", sentencepiece_model, *flags) == 0
    assert documents(out / "data_text_document") == [[*ids, 2] for ids in expected]


def test_every_json_key_gives_a_dataset(bpe, texts, jsonl, out):
    assert run(jsonl, out / "data", bpe, "--json-keys", "text", "title") == 0
    titles = [f"text {n}" for n in range(len(texts))]
    assert documents(out / "data_text_document") == bpe_ids(bpe, texts)
    assert documents(out / "data_title_document") == bpe_ids(bpe, titles)
    assert read_sidecar(out / "data_title_document").key == "title"


def test_text_files_and_several_inputs_follow_each_other(bpe, out, tmp_path):
    first, second = tmp_path / "first.txt", tmp_path / "second.jsonl"
    first.write_text("one\ntwo\n")
    second.write_text('{"text": "three"}\n')
    inputs = ["--input", str(first), str(second)]
    assert run(first, out / "data", bpe, *inputs) == 0
    assert documents(out / "data_text_document") == bpe_ids(bpe, ["one\ntwo\n", "three"])
    assert run(first, out / "data", bpe, *inputs, "--document", "per-line") == 0
    assert documents(out / "data_text_document") == bpe_ids(bpe, ["one", "two", "three"])


def test_documents_of_seq_length_are_left_out_and_counted(bpe, jsonl, texts, out, caplog):
    expected = [[*ids, 1] for ids in bpe_ids(bpe, texts)]
    limit = sorted(map(len, expected))[-2]
    caplog.set_level("INFO")
    assert run(jsonl, out / "data", bpe, "--append-eod", "--seq-length", str(limit)) == 0
    assert documents(out / "data_text_document") == [ids for ids in expected if len(ids) < limit]
    assert read_sidecar(out / "data_text_document").too_long_documents == 2
    assert f"10 records read: 8 written; 2 skipped: {limit:,} tokens or more" in caplog.text


def test_the_description_says_what_was_written(bpe, texts, out, tmp_path, caplog):
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, ""]))
    caplog.set_level("INFO")
    assert run(source, out / "data", bpe, "--append-eod") == 0
    info = read_sidecar(out / "data_text_document")
    tokens = np.concatenate([[*ids, 1] for ids in bpe_ids(bpe, texts)])
    assert (info.documents, info.empty_documents, info.tokens) == (len(texts), 1, len(tokens))
    assert info.text_bytes == len("".join(texts).encode())
    frequencies = np.unique(tokens, return_counts=True)[1] / len(tokens)
    assert info.unigram_entropy == pytest.approx(-(frequencies * np.log(frequencies)).sum())
    content = (out / "data_text_document.bin").read_bytes()
    assert (info.bin_bytes, info.dtype) == (len(content), "uint16")
    assert info.bin_sha256 == hashlib.sha256(content).hexdigest()
    assert (info.tokenizer, info.tokenizer_kind) == (str(bpe / "tokenizer.json"), "tokenizers")
    assert (info.vocab_size, info.bos, info.eod, info.pad) == (2000, 0, 1, 2)
    assert info.append_eod
    assert info.created_by == "ml-data 1.0.0"
    assert f"data_text_document: {len(texts)} documents, {len(tokens):,} tokens" in caplog.text


def test_a_second_run_replaces_the_first_and_does_not_read_it(bpe, out):
    (out / "a.txt").write_text("one")
    assert run(out, out / "data", bpe) == 0
    (out / "a.txt").write_text("one two")
    assert run(out, out / "data", bpe) == 0
    assert documents(out / "data_text_document") == bpe_ids(bpe, ["one two"])


def test_it_can_be_called_from_python(bpe, jsonl, texts, out):
    seen = []
    config = PretrainConfig(
        source=Source(input=(str(jsonl),)),
        tokenizer=TokenizerConfig(tokenizer_name_or_path=str(bpe)),
        tokenization=Tokenization(),
        output=Output(output_prefix=str(out / "new" / "data"), workers=1),
    )
    (corpus,) = preprocess(config, seen.append)
    assert corpus.info == read_sidecar(out / "new" / "data_text_document")
    assert sum(done.documents for done in seen) == len(texts)
    assert sum(done.consumed for done in seen) == jsonl.stat().st_size


# What cannot be done.


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--json-keys", "body"],
            "texts.jsonl:1: no column 'body'; the columns are 'text', 'title'; choose with --json",
        ),
        (["--json-keys", "text", "text"], "--json-keys 'text': a key is given once"),
        (
            ["--json-keys", "a/b"],
            "--json-keys 'a/b': a key is given once, and is part of a file name",
        ),
        (["--workers", "0"], "--workers 0: must be at least 1"),
        (["--seq-length", "0"], "--seq-length 0: must be at least 1"),
        (
            ["--seq-length", "1"],
            "no document with text under --json-keys text: 10 records read: 0 written; 10 skip",
        ),
        (["--log-interval", "0"], "--log-interval 0: must be at least 1"),
        (["--n-subs", "0"], "--n-subs 0: must be at least 1"),
        (["--keep-newlines"], "--keep-newlines: is of --split-sentences, which is not given"),
        (
            ["--handler-name", "AlpacaPretrainHandler", "--json-keys", "body"],
            "--json-keys: --handler-name AlpacaPretrainHandler makes the key 'text' itself",
        ),
        (
            ["--output-prefix", "somewhere/"],
            "--output-prefix 'somewhere/': must end in a file name",
        ),
        (["--input", "nothing.jsonl"], "--input nothing.jsonl: no such file or directory"),
        (
            ["--tokenizer-name-or-path", "meta/llama"],
            "tokenizer meta/llama: no such file or directory",
        ),
        (
            ["--tokenizer-type", "GPT2"],
            "--tokenizer-type: 'GPT2' is not one of",
        ),
        (["--document", "per-page"], "--document: 'per-page' is not one of per-file, per-line"),
        (["--append-eos"], "unknown flag --append-eos; did you mean --append-eod?"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(bpe, jsonl, out, capsys, flags, message):
    assert run(jsonl, out / "data", bpe, *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("ml-data pretrain: ")
    assert message in error
    assert error.count("\n") == 1
    assert files(out) == {}


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n'])
def test_an_empty_corpus_is_refused(bpe, out, tmp_path, capsys, content):
    source = tmp_path / "empty.jsonl"
    source.write_text(content)
    assert run(source, out / "data", bpe) == 2
    assert "no document with text under --json-keys text" in capsys.readouterr().err
    assert files(out) == {}


def test_a_tokenizer_without_an_end_of_text_cannot_append_it(bpe, jsonl, out, tmp_path, capsys):
    (tmp_path / "tokenizer.json").write_bytes((bpe / "tokenizer.json").read_bytes())
    assert run(jsonl, out / "data", tmp_path, "--append-eod") == 2
    assert (
        "has no end-of-text token; name one of its tokens as eos_token" in capsys.readouterr().err
    )


def test_a_mistake_in_the_middle_leaves_the_old_files(bpe, jsonl, out, tmp_path, capsys):
    assert run(jsonl, out / "data", bpe) == 0
    old = files(out)
    broken = tmp_path / "broken.jsonl"
    broken.write_text(jsonl.read_text() * 20 + "{\n")
    assert run(broken, out / "data", bpe) == 2
    assert "broken.jsonl:201: not valid JSON" in capsys.readouterr().err
    assert files(out) == old


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """A full disk, as far as a process can tell: no file grows beyond `size`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("size", "file"), [(100_000, "data_text_document.bin"), (20, "data_text_document.")]
)
def test_a_full_disk_is_one_line_and_leaves_the_old_files(bpe, jsonl, out, capsys, size, file):
    assert run(jsonl, out / "data", bpe) == 0
    old = files(out)
    capsys.readouterr()
    with file_size_limit(size):
        assert run(jsonl, out / "data", bpe) == 1
    error = capsys.readouterr().err
    assert error.startswith("ml-data pretrain: File too large: ")
    assert str(out / file) in error
    assert error.count("\n") == 1
    assert files(out) == old


def test_an_output_that_cannot_be_written_is_named(bpe, jsonl, out, capsys):
    (out / "file").touch()
    assert run(jsonl, out / "file" / "data", bpe) == 2
    assert str(out / "file") in capsys.readouterr().err


# Dying.


def start(source: Path, prefix: Path, tokenizer: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ml_data", "pretrain", "--input", str(source)]
    command += ["--output-prefix", str(prefix), "--tokenizer-name-or-path", str(tokenizer)]
    command += ["--workers", "2", "--log-interval", "1", "--tokenizer-backend", "tokenizers"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def below(pid: int) -> list[int]:
    """Return the processes that `pid` started, and those that they started: the workers last."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found = [child for child, parent in parents.items() if parent == pid]
    return found + [child for child, parent in parents.items() if parent in found]


@pytest.fixture
def old(bpe, jsonl, out) -> dict[str, bytes]:
    """The files of an earlier run."""
    assert run(jsonl, out / "data", bpe) == 0
    return files(out)


def test_a_killed_worker_ends_the_job_with_one_line(bpe, long_jsonl, out, old):
    job = start(long_jsonl, out / "data", bpe)
    assert job.stderr.readline().startswith("Processed ")
    victim = below(job.pid)[-1]
    os.kill(victim, signal.SIGKILL)
    begin = time.monotonic()
    *progress, last = job.communicate(timeout=60)[1].splitlines()
    assert time.monotonic() - begin < 30
    assert job.returncode == 1
    assert last.startswith(f"ml-data pretrain: worker process {victim} was killed by SIGKILL")
    assert all(line.startswith("Processed ") for line in progress)
    assert files(out) == old


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("moment", ["starting", "working"])
def test_a_signal_ends_the_job_quietly_and_leaves_the_old_files(
    bpe, long_jsonl, out, old, number, code, moment
):
    job = start(long_jsonl, out / "data", bpe)
    if moment == "working":
        assert job.stderr.readline().startswith("Processed ")
    else:
        while not below(job.pid):
            time.sleep(0.005)
    workers = below(job.pid)
    os.killpg(job.pid, number)  # as a terminal does
    errors = job.communicate(timeout=60)[1]
    assert all(line.startswith("Processed ") for line in errors.splitlines())
    assert job.returncode == code
    assert files(out) == old
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


# What is left out, and said.

BROKEN = [
    (b'{"text": "one"}', None),
    (b'{"text": "two"', "texts.jsonl:2: "),
    (b'{"title": "three"}', "texts.jsonl:3: no column 'text'; the columns are 'title'"),
    (b'{"text": 4}', "texts.jsonl:4: the value of 'text' is not text but 4"),
    (b'{"text": "caf\xe9"}', "texts.jsonl:5: "),
    (b'["six"]', "texts.jsonl:6: "),
    (b'{"text": "seven"}', None),
    (b'{"text": ""}', None),
    (b'{"text": null}', None),
]


def write_lines(path: Path, lines: list[bytes]) -> Path:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def test_records_that_cannot_be_used_are_counted_and_named(bpe, out, tmp_path, caplog):
    source = write_lines(tmp_path / "texts.jsonl", [line for line, _ in BROKEN])
    caplog.set_level("INFO")
    assert run(source, out / "data", bpe, "--on-error", "skip") == 0
    assert documents(out / "data_text_document") == bpe_ids(bpe, ["one", "seven"])
    assert "9 records read: 2 written; 2 skipped: no text; 5 failed" in caplog.messages
    named = [message.strip() for message in caplog.messages if message.startswith("  ")]
    expected = [start for _, start in BROKEN if start]
    assert len(named) == len(expected)
    assert all(f"/{start}" in message for message, start in zip(named, expected, strict=True))
    info = read_sidecar(out / "data_text_document")
    assert (info.documents, info.empty_documents, info.failed_records) == (2, 2, 5)


@pytest.mark.parametrize(("number", "start"), [(n, s) for n, (_, s) in enumerate(BROKEN) if s])
def test_a_record_that_cannot_be_used_ends_the_run(bpe, out, tmp_path, capsys, number, start):
    lines = [line if n == number else b'{"text": "fine"}' for n, (line, _) in enumerate(BROKEN)]
    source = write_lines(tmp_path / "texts.jsonl", lines)
    assert run(source, out / "data", bpe) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"ml-data pretrain: {tmp_path}/{start}")
    assert error.count("\n") == 1
    assert files(out) == {}


def test_a_record_is_counted_for_each_key_by_itself(bpe, out, tmp_path, caplog):
    lines = [b'{"a": "one", "b": "two"}', b'{"a": "three"}', b'{"a": "", "b": "four"}', b"{"]
    source = write_lines(tmp_path / "texts.jsonl", lines)
    caplog.set_level("INFO")
    assert run(source, out / "data", bpe, "--json-keys", "a", "b", "--on-error", "skip") == 0
    assert documents(out / "data_a_document") == bpe_ids(bpe, ["one", "three"])
    assert documents(out / "data_b_document") == bpe_ids(bpe, ["two", "four"])
    counts = [message for message in caplog.messages if "records read" in message]
    assert counts == [
        "4 records read: 2 written; 1 skipped: no text; 1 failed",
        "4 records read: 2 written; 2 failed",
    ]


def test_a_text_that_was_there_before_is_left_out(bpe, out, texts, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    first, second = [*texts, texts[0], " a", "a"], [texts[3], "b", "a ", "b"]
    for name, part in (("0.jsonl", first), ("1.jsonl", second)):
        write_lines(tmp_path / name, [json.dumps({"text": text}).encode() for text in part])
    expected = bpe_ids(bpe, [*texts, " a", "b", "a "])
    results = []
    for workers, chunk in [("1", 1 << 20), ("3", 100)]:
        read = partial(read_chunks, chunk_bytes=chunk)
        monkeypatch.setattr("ml_data.pretrain.read_chunks", read)
        inputs = ("--input", str(tmp_path / "0.jsonl"), str(tmp_path / "1.jsonl"))
        flags = (*inputs, "--deduplicate", "--workers", workers)
        assert run(tmp_path, out / "data", bpe, *flags) == 0
        results.append(files(out))
    assert documents(out / "data_text_document") == expected
    assert results[0] == results[1]
    assert "17 records read: 13 written; 4 skipped: text was there before" in caplog.text
    assert read_sidecar(out / "data_text_document").duplicate_documents == 4


def test_a_histogram_shows_how_long_documents_are(bpe, out, tmp_path, caplog):
    write_lines(tmp_path / "texts.jsonl", [b'{"text": "a"}'] * 3 + [b'{"text": "a a a a a"}'])
    caplog.set_level("INFO")
    assert run(tmp_path / "texts.jsonl", out / "data", bpe, "--histogram", "--append-eod") == 0
    lines = [message.split() for message in caplog.messages if "#" in message]
    assert [line[:4] for line in lines] == [
        ["2-3", "tokens", "3", "75.0%"],
        ["4-7", "tokens", "1", "25.0%"],
    ]


# Sentences, handlers, types.


@pytest.mark.parametrize("keep", [(), ("--keep-newlines",)])
def test_every_sentence_is_a_sequence_of_its_document(bpe, texts, jsonl, out, tmp_path, keep):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for text in texts:
        ids = bpe_ids(bpe, split_sentences(text, keep_newlines=bool(keep)))
        ids[-1].append(1)
        builder.add_document([id_ for sentence in ids for id_ in sentence], list(map(len, ids)))
    builder.finalize(str(tmp_path / "theirs.idx"))

    flags = ("--split-sentences", "--append-eod", *keep)
    assert run(jsonl, out / "data", bpe, *flags) == 0

    for suffix in ("bin", "idx"):
        theirs = (tmp_path / f"theirs.{suffix}").read_bytes()
        assert (out / f"data_text_sentence.{suffix}").read_bytes() == theirs
    info = read_sidecar(out / "data_text_sentence")
    sentences = len(IndexedDataset(out / "data_text_sentence").sequence_lengths)
    assert (info.level, info.documents, info.sequences) == ("sentence", len(texts), sentences)


def test_an_alpaca_record_is_made_one_text(bpe, out, tmp_path):
    records = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hello"},
        {"instruction": "Greet.", "output": "Hello"},
    ]
    source = tmp_path / "alpaca.json"
    source.write_text(json.dumps(records))
    assert run(source, out / "data", bpe, "--handler-name", "AlpacaPretrainHandler") == 0
    begin = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions.USER: Below is an "
        "instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\n"
    )
    short = f"{begin}Greet.\n\n### Response: ASSISTANT: Hello"
    texts = [f"{begin}Add.\n\n### Input:\n1 and 2\n\n### Response: ASSISTANT: 3", short, short]
    assert documents(out / "data_text_document") == bpe_ids(bpe, texts)


def test_a_stack_overflow_record_is_made_one_text(bpe, out, tmp_path, capsys):
    source = tmp_path / "so.jsonl"
    record = {"title": "sort", "question_body": "How?", "answer_body": "sorted()"}
    source.write_text(json.dumps(record) + "\n")
    name = ("--handler-name", "StackOverflowPythonPretrainHandler")
    assert run(source, out / "data", bpe, *name) == 0
    text = "In python, sort\n### Question:\nHow?\n### Response:\nsorted()\n"
    assert documents(out / "data_text_document") == bpe_ids(bpe, [text])

    source.write_text('{"title": "sort"}\n')
    assert run(source, out / "data", bpe, *name) == 2
    assert (
        "so.jsonl:1: no column 'question_body'; the columns are 'title'" in capsys.readouterr().err
    )


@pytest.mark.parametrize(("wanted", "dtype"), [("auto", "uint16"), ("int32", "int32")])
def test_the_type_of_tokens_can_be_chosen(bpe, texts, jsonl, out, wanted, dtype):
    assert run(jsonl, out / "data", bpe, "--token-dtype", wanted) == 0
    assert IndexedDataset(out / "data_text_document").dtype.name == dtype
    assert read_sidecar(out / "data_text_document").dtype == dtype
    assert documents(out / "data_text_document") == bpe_ids(bpe, texts)


def test_a_type_too_small_for_the_vocabulary_is_refused(bpe, jsonl, out, tmp_path, capsys):
    backend = tokenizers.Tokenizer.from_file(str(bpe / "tokenizer.json"))
    backend.add_tokens([f"<{n}>" for n in range(65_537 - 2000)])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert run(jsonl, out / "data", tmp_path, "--token-dtype", "uint16") == 2
    assert "--token-dtype uint16: holds ids below 65,536, tokenizer" in capsys.readouterr().err


def test_parts_of_the_input_change_nothing(bpe, jsonl, out):
    assert run(jsonl, out / "data", bpe, "--workers", "1") == 0
    before = files(out)
    assert run(jsonl, out / "data", bpe, "--workers", "1", "--n-subs", "4") == 0
    assert files(out) == before


def test_tables_are_read_by_any_number_of_workers(bpe, texts, out, tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    column = [part for text in texts for part in text.split("\n\n")] + [None]
    table = arrow.table({"text": column, "n": range(len(column))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    assert run(tmp_path / "a.parquet", out / "data", bpe, "--workers", "3") == 0
    expected = bpe_ids(bpe, [text for text in column if text])
    assert documents(out / "data_text_document") == expected


def test_decoding_gives_the_text(bpe, texts, jsonl, out):
    assert run(jsonl, out / "data", bpe, "--append-eod") == 0
    backend = tokenizers.Tokenizer.from_file(str(bpe / "tokenizer.json"))
    written = documents(out / "data_text_document")
    assert [backend.decode(ids, skip_special_tokens=True) for ids in written] == texts


def test_the_process_that_writes_loads_no_tokenizer_and_stays_small(bpe, jsonl, out):
    arguments = ["--input", str(jsonl), "--output-prefix", str(out / "data")]
    arguments += ["--tokenizer-name-or-path", str(bpe)]
    program = (
        "import sys; from ml_data.cli import main\n"
        f"assert main(['pretrain', *{arguments}]) == 0\n"
        "slow = {'tokenizers', 'gigatoken', 'transformers', 'torch', 'pyarrow'}\n"
        "assert not slow & {*sys.modules}\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
