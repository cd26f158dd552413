from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ml_data.atomic import FileSet
from ml_data.cli import main
from ml_data.indexed import IndexedDatasetWriter
from ml_data.tokenizer import load_tokenizer

ROWS = [
    {"instruction": "Name a colour.", "input": "", "output": "Red\x1b[31m."},
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"instruction": "Say it in Chinese.", "input": "Hello", "output": "你好"},
]


@pytest.fixture
def prefix(bpe, jsonl, tmp_path) -> Path:
    """A dataset of texts."""
    where = ["--input", str(jsonl), "--output-prefix", str(tmp_path / "data")]
    assert main(["pretrain", *where, "--tokenizer-name-or-path", str(bpe), "--append-eod"]) == 0
    return tmp_path / "data_text_document"


def instruct(bpe: Path, directory: Path, *flags: str, command: str = "instruct") -> str:
    """Write `ROWS` as instructions or preferences and return their prefix."""
    source = directory / "rows.json"
    rows = [{**row, "chosen": row["output"], "rejected": "No."} for row in ROWS]
    source.write_text(json.dumps(rows))
    kind = {"instruct": "Instruction", "preference": "Pairwise"}[command]
    argv = ["--input", str(source), "--handler-name", f"AlpacaStyle{kind}Handler"]
    argv += ["--prompt-type", "default", "--tokenizer-name-or-path", str(bpe)]
    assert main([command, *argv, "--output-prefix", str(directory / "sft"), *flags]) == 0
    return str(directory / "sft")


def write(prefix: str, documents: list[list[list[int]]]) -> None:
    """Write int32 documents of sequences."""
    flat = [sequence for document in documents for sequence in document]
    with FileSet() as files:
        writer = IndexedDatasetWriter(prefix, np.int32, files)
        writer.add_documents(
            np.array([token for sequence in flat for token in sequence], np.int32),
            np.array([len(sequence) for sequence in flat]),
            np.array([len(document) for document in documents]),
        )
        writer.write_index()
        files.publish()


def inspect(capsys, prefix: object, *flags: str) -> str:
    """Return what the command shows."""
    capsys.readouterr()
    assert main(["inspect", "--data-path", str(prefix), *flags]) == 0
    return capsys.readouterr().out


def refuse(capsys, prefix: object, *flags: str) -> str:
    """Return why the command refuses."""
    capsys.readouterr()
    assert main(["inspect", "--data-path", str(prefix), *flags]) == 2
    return capsys.readouterr().err


def facts(output: str) -> dict[str, str]:
    """Return the values by name."""
    return dict(
        line.split(maxsplit=1) for line in output.splitlines() if re.match(r"\w+ +\S", line)
    )


def test_it_shows_sizes_and_description(prefix, texts, capsys):
    shown = facts(inspect(capsys, prefix, "--samples", "0"))
    assert shown["kind"] == "texts"
    assert shown["documents"] == str(len(texts))
    assert shown["dtype"] == "uint16"
    assert shown["vocab_size"] == "2,000"
    assert re.fullmatch(r"\d\.\d{4}", shown["unigram_entropy"])
    assert shown["append_eod"] == "True"
    assert shown["checked"] == "lengths, offsets and sizes, hash of .idx"
    assert "document 0" not in shown


def test_it_shows_how_long_documents_are(prefix, bpe, texts, capsys):
    lines = inspect(capsys, prefix).splitlines()
    start = lines.index("lengths") + 1
    rows = [
        re.fullmatch(r" +([\d,]+)(?:-([\d,]+))? tokens +(\d+) .*", row) for row in lines[start:]
    ]
    tokenizer = load_tokenizer(bpe)
    lengths = [len(ids) + 1 for ids in tokenizer.encode_batch(texts)]
    for row in (row for row in rows if row):
        low, high = (int((bound or row[1]).replace(",", "")) for bound in row.groups()[:2])
        assert int(row[3]) == sum(low <= length <= high for length in lengths)
    assert sum(int(row[3]) for row in rows if row) == len(texts)


def test_it_shows_documents_as_text_from_the_first_to_the_last(prefix, texts, capsys):
    output = inspect(capsys, prefix, "--samples", "3")
    numbers = [int(n) for n in re.findall(r"^document (\d+):", output, re.M)]
    assert numbers == [0, (len(texts) - 1) // 2, len(texts) - 1]
    lines = output.splitlines()
    assert lines[-1] == "  'a</s>'"
    first = next(n for n, line in enumerate(lines) if line.startswith("document 0:"))
    assert repr(texts[0][:200])[1:-1] in lines[first + 1]
    assert re.fullmatch(r"  \.\.\. [\d,]+ more tokens", lines[first + 2])


def test_the_tokenizer_that_made_it_is_used_unless_another_one_is_given(
    prefix, bpe, sentencepiece_model, capsys, tmp_path
):
    assert "'a</s>'" in inspect(capsys, prefix, "--samples", "99")
    flag = "--tokenizer-name-or-path"
    assert "'a</s>'" in inspect(capsys, prefix, "--samples", "99", flag, str(bpe))
    refused = refuse(capsys, prefix, flag, str(sentencepiece_model))
    assert "the dataset is of another one: " in refused
    description = Path(f"{prefix}.json")
    description.write_text(description.read_text().replace(str(bpe), str(tmp_path / "gone")))
    output = inspect(capsys, prefix)
    gone = f"not shown: tokenizer {tmp_path / 'gone'}/tokenizer.json: no such file"
    assert facts(output)["text"].startswith(gone)
    known = json.loads(description.read_text())
    description.write_text(json.dumps({**known, "tokenizer": str(sentencepiece_model)}))
    assert facts(inspect(capsys, prefix))["text"].endswith("is another one by now")


def test_a_dataset_of_another_program_has_no_description(prefix, sentencepiece_model, capsys):
    Path(f"{prefix}.json").unlink()
    shown = facts(inspect(capsys, prefix))
    assert shown["description"] == "none (not written by ml-data)"
    assert shown["checked"] == "lengths, offsets and sizes"
    assert shown["text"].startswith("not shown: no tokenizer is known")
    flag = "--tokenizer-name-or-path"
    assert "has no token 1" in refuse(capsys, prefix, flag, str(sentencepiece_model))


def test_a_torn_dataset_is_reported(prefix, capsys):
    Path(f"{prefix}.bin").write_bytes(b"")
    assert "data_text_document.bin: " in refuse(capsys, prefix)


def test_an_altered_index_is_seen_by_its_hash_and_altered_tokens_by_theirs(prefix, capsys):
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    whole = index.read_bytes()
    entry = whole[-24:-16]  # where the last document but one begins: now one document earlier
    index.write_bytes(whole[:-16] + entry + whole[-8:])
    assert "document.idx: altered: its sha256" in refuse(capsys, prefix)
    index.write_bytes(whole)
    content = bytearray(tokens.read_bytes())
    content[100] ^= 1
    tokens.write_bytes(content)
    inspect(capsys, prefix)  # tokens are not read
    assert "document.bin: altered: its sha256" in refuse(capsys, prefix, "--verify")
    content[100] ^= 1
    tokens.write_bytes(content)
    verified = facts(inspect(capsys, prefix, "--verify"))["checked"]
    assert verified == "lengths, offsets and sizes, hash of .idx, hash of .bin, ids"


def test_a_description_of_the_other_kind_is_refused(bpe, tmp_path, capsys):
    prefix = instruct(bpe, tmp_path)
    description = Path(f"{prefix}_packed.json")
    known = json.loads(description.read_text())
    description.write_text(json.dumps({**known, "kind": "preference"}))
    expected = f"{description}: describes preferences, but beside it are instructions\n"
    assert refuse(capsys, prefix).endswith(expected)


@pytest.mark.parametrize("commands", [("instruct", "preference"), ("preference", "instruct")])
def test_samples_of_two_kinds_do_not_share_a_prefix(bpe, tmp_path, capsys, commands):
    prefix = instruct(bpe, tmp_path, command=commands[0])
    instruct(bpe, tmp_path, command=commands[0])  # the same again is in place of the first
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(AssertionError, match="assert 2 == 0"):
        instruct(bpe, tmp_path, command=commands[1])
    assert re.search(
        rf"--output-prefix {prefix}: \w+ data are there \(sft_", capsys.readouterr().err
    )
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("kind", ["texts", "instructions"])
def test_an_altered_description_is_one_line_or_changes_nothing(kind, bpe, prefix, tmp_path, capsys):
    if kind == "instructions":
        prefix = instruct(bpe, tmp_path)
        description = Path(f"{prefix}_packed.json")
    else:
        description = Path(f"{prefix}.json")
    known = json.loads(description.read_text())
    for field in known:
        for value in (None, -5, "x", [], {}, True, {"input_ids": 3}):
            description.write_text(json.dumps({**known, field: value}))
            capsys.readouterr()
            code = main(["inspect", "--data-path", str(prefix), "--verify"])
            error = capsys.readouterr().err
            assert (code, error.count("\n")) in ((0, 0), (2, 1)), (field, value)


def test_tokens_beyond_the_vocabulary_are_named(prefix, capsys):
    description = Path(f"{prefix}.json")
    known = json.loads(description.read_text())
    description.write_text(json.dumps({**known, "vocab_size": 1000}))
    assert re.search(
        r"document.bin: token \d{4} is not in the vocabulary of 1,000",
        refuse(capsys, prefix, "--verify"),
    )


def test_instructions_show_what_the_loss_sees(bpe, tmp_path, capsys):
    output = inspect(capsys, instruct(bpe, tmp_path), "--samples", "3")
    shown = facts(output)
    assert shown["kind"] == "instructions"
    assert shown["documents"] == "3"
    tokenizer = load_tokenizer(bpe)
    answers = tokenizer.encode_batch([row["output"] for row in ROWS], add_special_tokens=False)
    learned = sum(len(answer) + 1 for answer in answers)
    assert shown["learned"].startswith(f"{learned} tokens (")
    assert output.splitlines()[-6:] == [
        output.splitlines()[-6],
        "  masked   'Human: Add.\\n1 and 2\\nAssistant: '",
        "  learned  '3</s>'",
        output.splitlines()[-3],
        "  masked   'Human: Say it in Chinese.\\nHello\\nAssistant: '",
        "  learned  '你好</s>'",
    ]
    assert r"  learned  'Red\x1b[31m.</s>'" in output  # data cannot steer the terminal
    assert "\x1b" not in output
    for column in ("input_ids", "labels", "attention_mask"):
        prefix = tmp_path / f"sft_packed_{column}_document"
        assert inspect(capsys, prefix, "--samples", "3") == output


def test_on_a_terminal_what_the_loss_sees_is_coloured(bpe, tmp_path):
    command = [sys.executable, "-m", "ml_data", "inspect", "--data-path", instruct(bpe, tmp_path)]
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "60"}
    environment.pop("NO_COLOR", None)
    subprocess.run(command, stdout=theirs, env=environment, check=True)
    os.close(theirs)
    output = ""
    while chunk := read_terminal(ours):
        output += chunk
    os.close(ours)
    assert "  masked   \x1b[2m'Human: Name a colour.\\nAssistant: '\x1b[0m" in output
    assert "  learned  \x1b[1;32m'Red\\x1b[31m.</s>'\x1b[0m" in output


def test_a_terminal_that_has_not_all_characters_shows_their_numbers(bpe, tmp_path):
    command = [sys.executable, "-m", "ml_data", "inspect", "--data-path", instruct(bpe, tmp_path)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    output = subprocess.check_output([*command, "--samples", "3"], env=environment, text=True)
    assert r"  learned  '\u4f60\u597d</s>'" in output


def read_terminal(number: int) -> str:
    try:
        return os.read(number, 65536).decode()
    except OSError:  # the other end is closed and everything has been read
        return ""


def test_rows_show_their_samples(bpe, tmp_path, capsys):
    prefix = instruct(bpe, tmp_path, "--pack", "--seq-length", "300")
    output = inspect(capsys, prefix)
    shown = facts(output)
    assert shown["documents"] == "1"
    assert shown["sequences"] == "3"
    assert re.search(r"^document 0: \d+ tokens in 3 sequences$", output, re.M)
    assert re.findall(r"^  sequence (\d): \d+ tokens$", output, re.M) == ["0", "1", "2"]
    assert output.count("  learned  '") == 3


def test_preferences_show_both_answers(bpe, tmp_path, capsys):
    output = inspect(capsys, instruct(bpe, tmp_path, command="preference"), "--verify")
    shown = facts(output)
    assert shown["kind"] == "preferences"
    assert shown["documents"] == "3"
    assert re.search(r"^document 0, chosen: \d+ tokens$", output, re.M)
    assert re.search(r"^document 0, rejected: \d+ tokens$", output, re.M)
    assert output.splitlines()[-1] == "  learned  'No.</s>'"
    assert "hash of .bin, ids" in shown["checked"]


def test_what_is_learned_instead_of_the_next_token_is_shown(bpe, tmp_path, capsys):
    """As templates without a token of their own at the end of an answer have it."""
    tokenizer = load_tokenizer(bpe)
    one, two = tokenizer.encode_batch(["one", "two"])
    write(f"{tmp_path / 'sft'}_packed_input_ids_document", [[[*one, *two]]])
    labels = [*[-100] * len(one), tokenizer.eod, *[-100] * (len(two) - 1)]
    write(f"{tmp_path / 'sft'}_packed_labels_document", [[labels]])
    output = inspect(capsys, tmp_path / "sft", "--tokenizer-name-or-path", str(bpe))
    first = tokenizer.decode(two[:1])
    assert f"  masked   'one'\n  replaced '{first}' by '</s>'\n" in output


def test_samples_without_a_label_are_counted(tmp_path, capsys):
    """As ModelLink can write them; the first label is of no use, nothing predicts that token."""
    ids = [[[5, 6, 7]], [[5, 6]], [[]], [[8]], [[5, 6, 9]]]
    labels = [[[-100, 6, -100]], [[5, -100]], [[]], [[8]], [[-100, -100, 9]]]
    write(f"{tmp_path / 'sft'}_packed_input_ids_document", ids)
    write(f"{tmp_path / 'sft'}_packed_labels_document", labels)
    output = inspect(capsys, tmp_path / "sft")
    assert "learned               4 tokens (44.4%)" in output
    assert re.search(r"^without label +3 samples: nothing to learn", output, re.M)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[[5, 6]]], "has 1 documents, .*input_ids_document.idx has 2"),
        ([[[5, 6]], [[7, 8]]], "its samples have other lengths than those of .*input_ids"),
        ([[[5], [6]], [[7]]], "its samples have other lengths than those of .*input_ids"),
    ],
)
def test_columns_of_different_shapes_are_refused(tmp_path, capsys, labels, message):
    write(f"{tmp_path / 'sft'}_packed_input_ids_document", [[[5, 6]], [[7]]])
    write(f"{tmp_path / 'sft'}_packed_labels_document", labels)
    assert re.search(f"labels_document.idx: {message}", refuse(capsys, tmp_path / "sft"))


def test_large_labels_are_counted_in_blocks(tmp_path, capsys):
    random = np.random.default_rng(0)
    lengths = np.array([*random.integers(2, 3000, 900), 1_200_000, 5])
    masked = random.random(len(lengths)) < 0.2
    tokens = np.repeat(np.where(masked, -100, 1), lengths).astype(np.int32)
    for column in ("input_ids", "labels"):
        with FileSet() as files:
            prefix = f"{tmp_path / 'sft'}_packed_{column}_document"
            writer = IndexedDatasetWriter(prefix, np.int32, files)
            writer.add_documents(tokens, lengths)
            writer.write_index()
            files.publish()
    output = inspect(capsys, tmp_path / "sft")
    assert f"learned               {lengths[~masked].sum():,} tokens" in output
    assert re.search(rf"^without label +{masked.sum()} samples", output, re.M)


def test_a_prefix_that_is_not_there_is_named_with_the_nearest(bpe, tmp_path, capsys):
    prefix = instruct(bpe, tmp_path)
    message = refuse(capsys, prefix[:-1])
    assert f"{prefix[:-1]}.idx does not exist; did you mean {prefix}_packed_" in message
    assert "--samples -1: must not be negative" in refuse(capsys, prefix, "--samples", "-1")
