"""A sentencepiece model gives the ids of sentencepiece, whoever encodes."""

from __future__ import annotations

import io
import json
import logging
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from ml_data.tokenizer import Tokenizer, load_tokenizer
from ml_models.flags import UsageError

REAL = ("tokenizer-mistral", "tokenizer-mistral-v7")
CODE = "def f(x):\n    if x:\n        return  1\n\treturn 2\n\n\n# é\r\n"
ODD = [
    "",
    " ",
    "   ",
    "\n",
    " a",
    "a  ",
    "a \n b",
    "\x00\x01\x1b[0m\x7f\x85",
    "\ufeff\ufffd\u2028\u3000\u00a0",
    "▁ ▁▁a▁",
    "<s> </s><unk><0x41><0x0A>[INST]",
    "👩\u200d👩\u200d👧 e\u0301 \u202eabc",
    "\U0010ffff\ue000",
]
RUNS = [f"{a}{c * n}{b}" for c in " \n-=" for n in range(1, 90) for a, b in (("", ""), ("x", " y"))]


def processor(directory: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))


def joined_pieces(model: sentencepiece.SentencePieceProcessor, count: int) -> Iterator[str]:
    """Yield texts of pieces at random: of all texts, these are the hardest to cut."""
    choose = random.Random(1)
    pieces = [model.id_to_piece(id_).replace("▁", " ") for id_ in range(model.get_piece_size())]
    for _ in range(count):
        yield "".join(choose.choices(pieces, k=20))


def encodes_by_tokenizers(tokenizer: Tokenizer) -> bool:
    return isinstance(getattr(tokenizer, "backend", None), tokenizers.Tokenizer)


def plain(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer.encode_batch(texts, add_special_tokens=False)


@pytest.fixture
def train(tmp_path: Path, texts: list[str]) -> Callable[..., Path]:
    """Train a model with other options than sentencepiece's own."""

    def make(**options: object) -> Path:
        model = io.BytesIO()
        defaults = {
            "model_type": "bpe",
            "vocab_size": 1200,
            "normalization_rule_name": "identity",
            "character_coverage": 0.995,
            "minloglevel": 2,
        }
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts[:3] for line in text.split("\n")),
            model_writer=model,
            **{**defaults, **options},
        )
        directory = tmp_path / "model"
        directory.mkdir()
        (directory / "tokenizer.model").write_bytes(model.getvalue())
        return directory

    return make


@pytest.mark.parametrize("name", REAL)
def test_a_real_model_is_encoded_by_tokenizers_with_the_ids_of_sentencepiece(asset, texts, name):
    directory = asset(name)
    model = processor(directory)
    tokenizer = load_tokenizer(directory)
    assert encodes_by_tokenizers(tokenizer)
    assert tokenizer.kind == "sentencepiece"
    marks = [piece for piece in tokenizer.special_tokens if piece.strip()]
    documents = [*texts, CODE, *ODD, *RUNS, *marks, *joined_pieces(model, 300)]
    ids = plain(tokenizer, documents)
    assert ids == model.encode(documents)
    assert [tokenizer.decode(own) for own in ids] == model.decode(ids)
    assert tokenizer.encode_batch([CODE]) == [[1, *model.encode(CODE)]]


def test_chinese_text_has_the_ids_of_sentencepiece(asset):
    directory = asset("tokenizer-mistral")
    chapters = json.loads((asset("text-chinese") / "documents.json").read_text())
    documents = [chapter[:4000] for chapter in chapters]
    assert plain(load_tokenizer(directory), documents) == processor(directory).encode(documents)


def test_every_special_token_has_its_id_and_is_left_out_of_text(asset):
    directory = asset("tokenizer-mistral-v7")
    model = processor(directory)
    tokenizer = load_tokenizer(directory)
    control = [id_ for id_ in range(model.get_piece_size()) if model.is_control(id_)]
    assert len(control) > 700
    names = [model.id_to_piece(id_) for id_ in control]
    assert [tokenizer.token_id(name) for name in names] == control
    assert dict(tokenizer.special_tokens) == dict(zip(names, control, strict=True))
    (ids,) = plain(tokenizer, ["a  b"])
    assert tokenizer.decode([*control, *ids, *control]) == "a  b"
    shown = tokenizer.decode([1, 3, *ids, 2], skip_special_tokens=False)
    assert shown == f"<s>{model.id_to_piece(3)}a  b</s>"
    assert tokenizer.token_id("no such token") is None


@pytest.mark.parametrize(
    "options",
    [
        {"byte_fallback": True, "add_dummy_prefix": False, "remove_extra_whitespaces": False},
        {"byte_fallback": True},
        {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True},
        {},
        {
            "byte_fallback": True,
            "remove_extra_whitespaces": False,
            "user_defined_symbols": ["<tool>", "<tool>x", "0", "\u2581\u2581", "a.b*c", "é"],
        },
        {
            "byte_fallback": True,
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
            "user_defined_symbols": ["<tool>", "\n", "\n\n", "\u2581\u2581\u2581"],
        },
    ],
    ids=["no-prefix", "strips", "unknown", "strips-unknown", "own", "own-no-prefix"],
)
def test_the_options_of_a_bpe_model_are_converted(train, texts, options):
    directory = train(**options)
    model = processor(directory)
    tokenizer = load_tokenizer(directory)
    assert encodes_by_tokenizers(tokenizer)
    own = [f"{a}{b}{a}" for a in options.get("user_defined_symbols", ()) for b in ("", " ", "x")]
    own += ["<tool>x<tool><0x41><tool>", "<0x41>", "<tool><s><tool><unk><tool>"]
    documents = [*texts, CODE, *ODD, *RUNS, *own, *joined_pieces(model, 500)]
    assert plain(tokenizer, documents) == model.encode(documents)


@pytest.fixture(scope="module")
def both(sentencepiece_model: Path) -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    return load_tokenizer(sentencepiece_model), processor(sentencepiece_model)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.text(st.one_of(st.sampled_from(" \n\tabe_=▁<>0x"), st.characters()), max_size=60))
def test_any_text_has_the_ids_of_sentencepiece(both, text):
    tokenizer, model = both
    assert encodes_by_tokenizers(tokenizer)
    assert plain(tokenizer, [text]) == [model.encode(text)]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "not a BPE model"),
        ({"normalization_rule_name": "nmt_nfkc"}, "it normalizes characters"),
        ({"treat_whitespace_as_suffix": True}, "it treats spaces in its own way"),
        ({"user_defined_symbols": ["<0", "(", ")"]}, None),
    ],
    ids=["unigram", "normalizes", "suffix", "own"],
)
def test_what_cannot_be_converted_exactly_is_encoded_by_sentencepiece(
    train, texts, caplog, options, reason
):
    directory = train(byte_fallback=True, **options)
    with caplog.at_level(logging.INFO):
        tokenizer = load_tokenizer(directory)
    assert encodes_by_tokenizers(tokenizer) == (reason is None)
    if reason:
        assert f"sentencepiece itself encodes: {reason}" in caplog.text
    documents = [*texts, CODE, *ODD]
    assert plain(tokenizer, documents) == processor(directory).encode(documents)


def more_pieces(path: Path, *pieces: tuple[str, float, int]) -> None:
    """Append pieces to a model: protobuf messages may be written in parts."""
    for text, score, kind in pieces:
        name = text.encode()
        fields = b"\x0a" + bytes([len(name)]) + name + struct.pack("<Bf", 0x15, score)
        message = fields + bytes([0x18, kind])
        path.write_bytes(path.read_bytes() + b"\x0a" + bytes([len(message)]) + message)


NORMAL, USER_DEFINED, UNUSED = 1, 4, 5
LESS = [("<", -3.5, NORMAL), ("0", -3.6, NORMAL)]  # too rare in the text of the model


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        ([("M1", -1.5, NORMAL), ("1M", -1.5, NORMAL)], "different pieces of the same score"),
        ([("M\u0416", -1.5, NORMAL)], "pieces with characters that are no pieces"),
        ([("M1", -1.5, UNUSED)], "pieces that are not used"),
        ([*LESS, ("<0", -1.5, NORMAL), ("<tool>", 0.0, USER_DEFINED)], "one with <0"),
        ([("M1M1M1", -1.5, NORMAL), ("<tool>", 0.0, USER_DEFINED)], "'M1M1M1' is never merged"),
        ([("M1M", -0.5, NORMAL), ("M1", -1.5, NORMAL)], None),
        ([("MM", -1.5, NORMAL), ("MMM", -1.5, NORMAL), ("MMMMM", -1.5, NORMAL)], None),
    ],
    ids=["tied", "letters", "unused", "byte", "unmerged", "order", "run"],
)
def test_unusual_pieces_are_converted_or_not_but_never_change_ids(
    sentencepiece_model, tmp_path, texts, caplog, pieces, reason
):
    directory = shutil.copytree(sentencepiece_model, tmp_path / "model")
    more_pieces(directory / "tokenizer.model", *pieces)
    with caplog.at_level(logging.INFO):
        tokenizer = load_tokenizer(directory)
    assert encodes_by_tokenizers(tokenizer) == (reason is None)
    assert reason is None or reason in caplog.text
    own = ["M1M 1M1 M1M1M1M <tool>M1M1M1<tool>", "M\u0416 <0x41><tool><0x41>"]
    own += ["M" * n for n in range(60)]
    documents = [*texts, CODE, *ODD, *own]
    assert plain(tokenizer, documents) == processor(directory).encode(documents)


def test_a_damaged_model_is_refused_or_encodes_as_sentencepiece_does(sentencepiece_model, tmp_path):
    whole = (sentencepiece_model / "tokenizer.model").read_bytes()
    choose = random.Random(5)
    path = tmp_path / "tokenizer.model"
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(choose.choice((1, 2, 5))):
            start = choose.choice((0, len(whole) - 300))  # the settings are at the end
            damaged[choose.randrange(start, len(whole))] = choose.randrange(256)
        path.write_bytes(damaged[: choose.choice((len(whole), choose.randrange(len(whole))))])
        try:
            tokenizer = load_tokenizer(path)
        except UsageError:
            refused += 1
            continue
        assert plain(tokenizer, [CODE, *ODD]) == processor(tmp_path).encode([CODE, *ODD])
    assert 10 < refused < 60


def test_ids_beyond_the_vocabulary_have_no_text(sentencepiece_model):
    tokenizer = load_tokenizer(sentencepiece_model)
    (ids,) = plain(tokenizer, ["def"])
    assert tokenizer.decode([*ids, 1500, 99999]) == "def"


def test_not_use_fast_takes_sentencepiece_itself_and_gives_the_same_ids(
    sentencepiece_model, bpe, texts, tmp_path
):
    converted = load_tokenizer(sentencepiece_model)
    slow = load_tokenizer(sentencepiece_model, use_fast=False)
    assert encodes_by_tokenizers(converted)
    assert not encodes_by_tokenizers(slow)
    assert slow.encode_batch(texts) == converted.encode_batch(texts)
    assert slow.identity == converted.identity
    both = shutil.copytree(sentencepiece_model, tmp_path / "both")
    shutil.copy(bpe / "tokenizer.json", both)
    assert load_tokenizer(both).kind == "tokenizers"
    assert load_tokenizer(both, use_fast=False).identity == converted.identity
    assert load_tokenizer(bpe, use_fast=False).kind == "tokenizers"


def test_what_goes_around_a_text_is_part_of_the_converted_tokenizer(sentencepiece_model, tmp_path):
    directory = shutil.copytree(sentencepiece_model, tmp_path / "model")
    (directory / "tokenizer_config.json").write_text('{"add_eos_token": true}')
    tokenizer = load_tokenizer(directory)
    (ids,) = plain(tokenizer, ["def"])
    assert tokenizer.encode_batch(["def"]) == [[1, *ids, 2]]
    assert tokenizer.backend.encode("def").ids == [1, *ids, 2]
