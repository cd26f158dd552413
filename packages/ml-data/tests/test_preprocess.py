"""The command lines are those of ModelLink's own example scripts and tests, with our files."""

from __future__ import annotations

import json
import logging
import shlex
from pathlib import Path

import numpy as np
import pytest

from ml_data.cli import main
from ml_data.indexed import IndexedDataset
from ml_data.preprocess import PreprocessConfig, translate
from ml_data.tokenizer import load_tokenizer
from ml_models.flags import UsageError, parse


def new(line: str) -> str:
    """Return the new spelling of a command line, then `|` and the flags without effect."""
    words = shlex.split(line.replace("\\\n", " "))
    command, passed, unused = translate(parse(PreprocessConfig, words, prog="preprocess"))
    return shlex.join([command, *passed]) + "".join(f" | {word}" for word in unused)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            r"""--input ./dataset/train-00000-of-00042-d964455e17e96d5a.parquet \
                --tokenizer-name-or-path ./model_from_hf/llama-2-7b-hf/ \
                --tokenizer-type PretrainedFromHF \
                --handler-name GeneralPretrainHandler \
                --output-prefix ./dataset/enwiki \
                --json-keys text \
                --workers 4 \
                --log-interval 1000""",
            "pretrain --input ./dataset/train-00000-of-00042-d964455e17e96d5a.parquet "
            "--output-prefix ./dataset/enwiki --tokenizer-type PretrainedFromHF "
            "--tokenizer-name-or-path ./model_from_hf/llama-2-7b-hf/ "
            "--workers 4 --log-interval 1000 --document per-line --token-dtype int32",
        ),
        (
            r"""--input ./data.parquet --tokenizer-type PretrainedFromHF
                --handler-name GeneralInstructionHandler --output-prefix part1
                --tokenizer-name-or-path ./llama-2-7b-hf --workers 4 --log-interval 1000
                --append-eod""",
            "instruct --input ./data.parquet --output-prefix part1 "
            "--handler-name GeneralInstructionHandler --tokenizer-type PretrainedFromHF "
            "--tokenizer-name-or-path ./llama-2-7b-hf --append-eod --workers 4 "
            "--log-interval 1000 --on-too-long skip --on-error skip",
        ),
        (
            r"""--input ./dataset/ --tokenizer-name-or-path m --output-prefix ./finetune_dataset/oig
                --tokenizer-type PretrainedFromHF --handler-name SharegptStyleInstructionHandler
                --prompt-type llama2 --overwrite-cache --seq-length 4096 --tokenizer-not-use-fast
                --map-keys '{"messages":"messages", "tags":{"role_tag": "role"}}'""",
            "instruct --input ./dataset/ --output-prefix ./finetune_dataset/oig "
            "--handler-name SharegptStyleInstructionHandler --tokenizer-type PretrainedFromHF "
            "--tokenizer-name-or-path m --tokenizer-not-use-fast --seq-length 4096 "
            "--prompt-type llama2 "
            """--map-keys '{"messages":"messages", "tags":{"role_tag": "role"}}' """
            "--on-too-long skip --on-error skip | --overwrite-cache",
        ),
        (
            r"""--input orca --tokenizer-name-or-path m --output-prefix orca_rlhf
                --tokenizer-type PretrainedFromHF --handler-name AlpacaStylePairwiseHandler
                --prompt-type llama3 --seq-length 4096
                --map-keys '{"prompt":"question", "query":"", "system":"system"}'""",
            "preference --input orca --output-prefix orca_rlhf "
            "--handler-name AlpacaStylePairwiseHandler --tokenizer-type PretrainedFromHF "
            "--tokenizer-name-or-path m --seq-length 4096 --prompt-type llama3 "
            """--map-keys '{"prompt":"question", "query":"", "system":"system"}' """
            "--on-too-long skip --on-error skip",
        ),
        (
            r"""--input a,b --dataset-dir ./data --handler-name LlamaFactoryInstructionHandler
                --prompt-type qwen --mix-strategy interleave_over --interleave-probs "0.7, 0.3"
                --max-samples 100 --seed 1 --cache-dir ./cache --streaming --output-prefix o
                --tokenizer-name-or-path m --pack --n-subs 4 --pad-vocab-size-to 32000
                --make-vocab-size-divisible-by 8 --dataset-impl mmap""",
            "instruct --input a b --output-prefix o --handler-name LlamaFactoryInstructionHandler "
            "--tokenizer-name-or-path m --n-subs 4 --prompt-type qwen --dataset-dir ./data "
            "--max-samples 100 --pack --mix-strategy interleave_over --interleave-probs 0.7 0.3 "
            "--seed 1 --on-too-long skip --on-error skip | --streaming | --cache-dir "
            "| --make-vocab-size-divisible-by | --pad-vocab-size-to",
        ),
        (
            "--input d --output-prefix o --merge-group-keys packed_labels_document text_document",
            "merge --input d --output-prefix o --keys packed_labels_document text_document",
        ),
        (
            """--input d --output-prefix o --tokenizer-type GPT2BPETokenizer --vocab-file v
               --merge-file m --split-sentences --keep-newlines --json-key body --seq-length 9
               --handler-name '' --map-keys {}""",
            "pretrain --input d --output-prefix o --tokenizer-type GPT2BPETokenizer --vocab-file v "
            "--merge-file m --seq-length 9 --json-keys body --split-sentences --keep-newlines "
            "--document per-line --token-dtype int32 | --map-keys",
        ),
        (
            """--input d --output-prefix o --handler-name AlpacaStyleInstructionHandler
               --prompt-type qwen --dataset-dir ./data --tokenizer-type PretrainedFromHF
               --tokenizer-name-or-path m --vocab-file v --merge-file m""",
            "instruct --input d --output-prefix o --handler-name AlpacaStyleInstructionHandler "
            "--tokenizer-type PretrainedFromHF --tokenizer-name-or-path m --prompt-type qwen "
            "--on-too-long skip --on-error skip | --dataset-dir | --vocab-file | --merge-file",
        ),
        (
            "--input d --output-prefix o --handler-name AlpacaPretrainHandler",
            "pretrain --input d --output-prefix o --handler-name AlpacaPretrainHandler "
            "--document per-line --token-dtype int32",
        ),
    ],
)
def test_a_command_line_of_modellink_has_a_new_spelling(line, expected):
    assert new(line) == expected


@pytest.mark.parametrize(("ranking", "command"), [(True, "preference"), (False, "instruct")])
def test_dataset_info_says_whether_there_are_preferences(tmp_path, ranking, command):
    entry = {"file_name": "pairs.json", "ranking": ranking}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"pairs": entry}))
    line = f"--input pairs --dataset-dir {tmp_path} --output-prefix o --prompt-type qwen "
    line += "--handler-name LlamaFactoryInstructionHandler"
    assert new(line).startswith(f"{command} --input pairs ")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "--handler-name AlpacaStyleInstructonHandler",
            "--handler-name AlpacaStyleInstructonHandler: unknown; there are "
            "GeneralPretrainHandler, .*; did you mean AlpacaStyleInstructionHandler.$",
        ),
        ("--hf-datasets-params '{\"a\": 1}'", "--hf-datasets-params .*: not supported"),
        ("--dataset-impl lazy", "--dataset-impl: .*mmap"),
        ("--handler_name x", "unknown flag --handler_name; did you mean --handler-name"),
    ],
)
def test_what_cannot_be_done_is_an_error(line, message):
    with pytest.raises(UsageError, match=message):
        new(f"--input d --output-prefix o {line}")


def test_tokens_have_four_bytes_whatever_the_vocabulary(bpe, jsonl, texts, tmp_path, caplog):
    """As ModelLink writes them; that the files are Megatron's is tested with `pretrain`."""
    caplog.set_level(logging.INFO)
    line = f"--input {jsonl} --output-prefix {tmp_path / 'data'} --append-eod --n-subs 3 "
    line += f"--tokenizer-type PretrainedFromHF --tokenizer-name-or-path {bpe}"
    assert main(["preprocess", *shlex.split(line)]) == 0
    tokenizer = load_tokenizer(bpe)
    ids = [id_ for ids in tokenizer.encode_batch(texts) for id_ in (*ids, tokenizer.eod)]
    content = (tmp_path / "data_text_document.bin").read_bytes()
    assert content == np.array(ids, "<i4").tobytes()
    assert caplog.messages[0].startswith(f"ml-data pretrain --input {jsonl} --output-prefix ")


def test_a_line_of_a_text_file_is_a_document(bpe, tmp_path):
    (tmp_path / "lines.txt").write_text("one\n\ntwo\nthree\n")
    line = f"--input {tmp_path / 'lines.txt'} --output-prefix {tmp_path / 'data'} "
    assert main(["preprocess", *shlex.split(f"{line} --tokenizer-name-or-path {bpe}")]) == 0
    assert len(IndexedDataset(tmp_path / "data_text_document")) == 3


def test_the_new_spelling_does_the_same(bpe, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    rows = [
        {"question": "Why?", "good": "Because.", "extra": 1},
        {"question": "How?", "good": "So. " * 99, "extra": 1},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mapping = json.dumps({"prompt": "question", "query": "", "response": "good"})
    argv = ["--input", str(tmp_path / "rows.jsonl"), "--map-keys", mapping, "--seq-length", "64"]
    argv += ["--handler-name", "AlpacaStyleInstructionHandler", "--prompt-type", "default"]
    argv += ["--tokenizer-name-or-path", str(bpe), "--overwrite-cache", "--output-prefix"]
    assert main(["preprocess", *argv, str(tmp_path / "one")]) == 0
    assert "without effect on ml-data instruct: --overwrite-cache" in caplog.messages
    printed = shlex.split(caplog.messages[0].replace(str(tmp_path / "one"), str(tmp_path / "two")))
    assert printed[0] == "ml-data"
    assert main(printed[1:]) == 0
    for column in ("input_ids", "labels", "attention_mask"):
        for suffix in ("bin", "idx"):
            one, two = (f"{tmp_path / n}_packed_{column}_document.{suffix}" for n in ("one", "two"))
            assert Path(one).read_bytes() == Path(two).read_bytes()
    assert (
        len(IndexedDataset(f"{tmp_path / 'one'}_packed_labels_document")) == 1
    )  # skipped, not cut


def test_conversations_that_are_none_are_left_out_and_named(bpe, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    said = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
    talks = [said, said[:1], said[::-1], said]
    rows = "".join(json.dumps({"conversations": talk}) + "\n" for talk in talks)
    (tmp_path / "talks.jsonl").write_text(rows)
    line = f"--input {tmp_path / 'talks.jsonl'} --output-prefix {tmp_path / 'data'} "
    line += f"--handler-name SharegptStyleInstructionHandler --tokenizer-name-or-path {bpe} "
    assert main(["preprocess", *shlex.split(f"{line} --prompt-type default")]) == 0
    assert "4 records read: 2 written; 2 failed" in caplog.messages
    assert any("talks.jsonl:2: message 1, the last, is not" in line for line in caplog.messages)
    assert len(IndexedDataset(tmp_path / "data_packed_labels_document")) == 2


def test_datasets_are_merged(bpe, jsonl, tmp_path):
    (tmp_path / "parts").mkdir()
    for part in ("part1", "part2"):
        line = f"--input {jsonl} --output-prefix {tmp_path / 'parts' / part} --workers 1 "
        assert main(["preprocess", *shlex.split(f"{line} --tokenizer-name-or-path {bpe}")]) == 0
    line = f"--input {tmp_path / 'parts'} --output-prefix {tmp_path / 'all'} --merge-group-keys "
    assert main(["preprocess", *shlex.split(f"{line} text_document")]) == 0
    merged = IndexedDataset(tmp_path / "all_text_document")
    part = IndexedDataset(tmp_path / "parts" / "part1_text_document")
    assert np.array_equal(merged.tokens, np.concatenate([part.tokens, part.tokens]))


def test_a_message_is_of_the_command_whose_flags_it_names(jsonl, capsys):
    assert main(["preprocess", "--input", str(jsonl), "--output-prefix", "y"]) == 2
    assert capsys.readouterr().err.startswith("ml-data pretrain: missing --tokenizer-name-or-path")
