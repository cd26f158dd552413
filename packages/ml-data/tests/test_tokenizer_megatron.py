"""Megatron-LM's names read Megatron-LM's files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiktoken
from tiktoken.load import load_tiktoken_bpe
from tiktoken_ext.openai_public import r50k_pat_str

from ml_data.tokenizer import TokenizerConfig, load_tokenizer, required_eod
from ml_models.flags import UsageError, parse

MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [
    "Straße und ÉCOLE naïve Ångström, don't re-enter: 3.14%",
    "北京 is 中国's capital。",
    "tab\tnew\nline\x00\ufffd\u200b zero\u00a0width \u3000[MASK] [CLS]",
    "a" * 150 + " " + "b" * 250,
    "日本語 кириллица ﬁ ½ 🙂",
]


@pytest.fixture(scope="module")
def bert(texts, tmp_path_factory) -> Path:
    """A directory with a vocab.txt: marks, letters, parts and words of real text."""
    text = "\n".join([*texts[:2], *WORDS[:1]])
    letters = sorted({*text, *text.lower()} - {*" \n\t"})[:400]
    words = sorted({*re.findall(r"[A-Za-z]{2,}", text), *re.findall(r"[a-z]{2,}", text.lower())})
    parts = sorted({word[-3:] for word in words})
    tokens = [*MARKS, *letters, *(f"##{c}" for c in letters), *words, *(f"##{p}" for p in parts)]
    directory = tmp_path_factory.mktemp("bert")
    (directory / "vocab.txt").write_text("\n".join(dict.fromkeys(tokens)) + "\n")
    return directory


def test_gpt2_bpe_gives_the_ids_of_tiktoken_and_takes_no_mark_from_a_text(asset, texts):
    directory = asset("tokenizer-gpt2")
    ranks = load_tiktoken_bpe(str(asset("tokenizer-gpt2-ranks") / "gpt2.tiktoken"))
    gpt2 = tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
    )
    tokenizer = load_tokenizer(
        None,
        "GPT2BPETokenizer",
        vocab_file=directory / "vocab.json",
        merge_file=directory / "merges.txt",
    )
    documents = [*texts, *WORDS, "a<|endoftext|>b", "", "\x00\x85", "北京🙂"]
    ids = tokenizer.encode_batch(documents)
    assert ids == gpt2.encode_ordinary_batch(documents)
    assert [tokenizer.decode([*own, 50256]) for own in ids] == documents
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eod, tokenizer.pad) == (
        50257,
        None,
        50256,
        50256,
    )
    assert tokenizer.token_id("<|endoftext|>") == 50256
    assert load_tokenizer(directory, "GPT2BPETokenizer").identity == tokenizer.identity


@pytest.mark.parametrize("lower", [True, False], ids=["lower", "case"])
def test_wordpiece_gives_the_ids_of_berts_own_code(bert, texts, lower):
    # transformers keeps Google's code for Japanese; it has no other BERT in Python any more.
    from transformers.models.bert_japanese import tokenization_bert_japanese as google

    vocabulary = (bert / "vocab.txt").read_text().split("\n")[:-1]
    ids = {token: id_ for id_, token in enumerate(vocabulary)}
    basic = google.BasicTokenizer(do_lower_case=lower, never_split=[])
    pieces = google.WordpieceTokenizer(ids, unk_token="[UNK]", max_input_chars_per_word=200)

    def original(text: str) -> list[int]:
        return [ids[piece] for word in basic.tokenize(text) for piece in pieces.tokenize(word)]

    name = "BertWordPieceLowerCase" if lower else "BertWordPieceCase"
    tokenizer = load_tokenizer(bert, name)
    documents = [*texts, *WORDS]
    assert tokenizer.encode_batch(documents) == [original(text) for text in documents]
    size = len(vocabulary)
    assert (tokenizer.bos, tokenizer.eod, tokenizer.pad) == (size, size + 1, 0)
    assert tokenizer.vocab_size == size + 2
    assert tokenizer.token_id("[MASK]") == 4
    assert tokenizer.decode([size, *tokenizer.encode_batch(["the file"])[0], size + 1]) == (
        "the file"
    )


def test_only_line_ends_end_a_token_of_a_vocabulary(bert, tmp_path):
    lines = (bert / "vocab.txt").read_text().split("\n")
    lines.insert(5, "\u2028")
    (tmp_path / "vocab.txt").write_text("\n".join(lines))
    tokenizer = load_tokenizer(tmp_path, "BertWordPieceCase")
    assert (tokenizer.token_id(lines[6]), tokenizer.eod) == (6, len(lines))


def test_the_two_cases_are_different_tokenizers(bert):
    lower = load_tokenizer(None, "BertWordPieceLowerCase", vocab_file=bert / "vocab.txt")
    case = load_tokenizer(None, "BertWordPieceCase", vocab_file=bert / "vocab.txt")
    assert lower.identity != case.identity


def test_the_flags_of_a_tokenizer(asset, bert):
    path = str(asset("tokenizer-gpt2"))
    argv = ["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", f"{path}/vocab.json"]
    config = parse(TokenizerConfig, [*argv, "--merge-file", f"{path}/merges.txt"], prog="test")
    assert config.load().vocab_size == 50257
    with pytest.raises(UsageError, match="missing --merge-file: --tokenizer-type GPT2BPE"):
        parse(TokenizerConfig, argv, prog="test").load()
    with pytest.raises(UsageError, match="missing --tokenizer-name-or-path"):
        parse(TokenizerConfig, [], prog="test")
    argv = ["--vocab-file", str(bert / "vocab.txt")]
    with pytest.raises(UsageError, match="--vocab-file alone names no tokenizer"):
        load_tokenizer(None, vocab_file=bert / "vocab.txt")
    argv += ["--tokenizer-type", "BertWordPieceCase", "--tokenizer-not-use-fast"]
    config = parse(TokenizerConfig, argv, prog="test")
    assert config.tokenizer_not_use_fast
    assert config.load().token_id("[SEP]") == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vocab-file", "v"], "--vocab-file v: .* GPT2BPETokenizer or BertWordPieceLowerCase or"),
        (
            ["--tokenizer-type", "Llama2Tokenizer", "--merge-file", "m"],
            "--merge-file m: is read with --tokenizer-type GPT2BPETokenizer only",
        ),
        (["--tokenizer-type", "BertWordPieceCase", "--merge-file", "m"], "--merge-file m: is read"),
    ],
)
def test_files_that_the_tokenizer_does_not_read_are_refused(flags, message):
    with pytest.raises(UsageError, match=message):
        parse(TokenizerConfig, ["--tokenizer-name-or-path", "t", *flags], prog="test")


def test_mistakes_in_the_files_are_named(tmp_path, asset):
    gpt2 = asset("tokenizer-gpt2")

    def message(tokenizer_type: str, vocab: Path, merges: Path | None = None) -> str:
        with pytest.raises(UsageError) as caught:
            load_tokenizer(None, tokenizer_type, vocab_file=vocab, merge_file=merges)
        return str(caught.value)

    missing = message("BertWordPieceCase", tmp_path / "vocab.txt")
    assert missing == f"--vocab-file {tmp_path / 'vocab.txt'}: no such file"
    assert "no [UNK] in it" in message("BertWordPieceCase", gpt2 / "merges.txt")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in message("BertWordPieceCase", binary)
    assert "not those of a BPE" in message("GPT2BPETokenizer", binary, gpt2 / "merges.txt")
    small = tmp_path / "vocab.json"
    small.write_text(json.dumps({"a": 0}))
    assert "not those of a BPE" in message("GPT2BPETokenizer", small, gpt2 / "merges.txt")


def test_a_tokenizer_without_eos_is_refused_where_eos_is_needed(tmp_path):
    vocab, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    vocab.write_text(json.dumps({"a": 0, "b": 1, "ab": 2}))
    merges.write_text("#version: 0.2\na b\n")
    tokenizer = load_tokenizer(tmp_path, "GPT2BPETokenizer")
    assert tokenizer.encode_batch(["abab"]) == [[2, 2]]
    assert (tokenizer.eod, tokenizer.pad) == (None, None)
    with pytest.raises(UsageError, match=r"--append-eod: tokenizer .*vocab\.json has no end-of-"):
        required_eod(tokenizer, "--append-eod")
