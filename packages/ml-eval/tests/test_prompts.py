from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from ml_convert.errors import ConversionError
from ml_data.tokenizer import Tokenizer, load_tokenizer
from ml_eval.config import Prompts
from ml_eval.prompts import encode, eos_ids, read_prompts
from ml_models.architecture import Architecture
from ml_models.flags import UsageError


@pytest.fixture
def tokenizer(tmp_path, save_tokenizer) -> Tokenizer:
    save_tokenizer(tmp_path)
    return load_tokenizer(tmp_path)


@pytest.fixture
def pieces(sentencepiece_model) -> Tokenizer:
    """Puts a space before a text, and takes special tokens in it for text."""
    return load_tokenizer(sentencepiece_model)


def architecture(**changes: Any) -> Architecture:
    sizes = {"vocab_size": 300, "max_position_embeddings": 16}
    return Architecture(num_layers=1, hidden_size=8, num_attention_heads=2, **{**sizes, **changes})


def test_each_line_of_a_file_is_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("first, line\r\n\n  \n 第二 \nlast".encode())
    assert read_prompts(Prompts(prompt_file=path)) == ["first, line", " 第二 ", "last"]
    assert read_prompts(Prompts(prompt=("a", ""))) == ["a", ""]


def test_a_byte_order_mark_is_not_part_of_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("first\nsecond".encode("utf-8-sig"))
    assert read_prompts(Prompts(prompt_file=path)) == ["first", "second"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"\n \n", "has no line with text"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_files_without_prompts_are_refused(tmp_path: Path, content, message: str) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=f"--prompt-file .*prompts.txt: {message}"):
        read_prompts(Prompts(prompt_file=path))


def test_prompts_become_the_ids_of_the_tokenizer(tokenizer: Tokenizer) -> None:
    (ids,) = encode(tokenizer, ["the dog"], architecture(), max_length=None)
    assert tokenizer.decode(ids) == "the dog"


@pytest.mark.parametrize(
    ("text", "max_length", "message"),
    [
        ("", None, "prompt '': has no tokens, and this tokenizer adds none"),
        ("x z " * 30, None, r"prompt '(x z ){9}x\.\.\.': \d+ tokens leave no room for another one; "
         "the model's max_position_embeddings is 16"),
        ("x z x z", 7, "prompt 'x z x z': 7 tokens leave no room for another one; --max-length is"),
    ],
)  # fmt: skip
def test_prompts_must_leave_room(tokenizer, text: str, max_length, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        encode(tokenizer, ["a", text], architecture(), max_length=max_length)


def test_a_prompt_may_leave_room_for_one_token(tokenizer: Tokenizer) -> None:
    assert encode(tokenizer, ["x z x z"], architecture(), max_length=8)


def test_the_model_must_know_the_tokens_of_the_prompts(tokenizer: Tokenizer) -> None:
    texts, largest = ["a", "a</s>。</s>"], tokenizer.token_id("ãĢĤ")
    assert largest is not None
    assert encode(tokenizer, texts, architecture(vocab_size=largest + 1), max_length=None)
    message = (
        rf"prompt 'a</s>。</s>': its token '。' has the id {largest}, .* end at {largest - 1};"
    )
    with pytest.raises(UsageError, match=message):
        encode(tokenizer, texts, architecture(vocab_size=largest), max_length=None)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [7, 9]}, {"eos_token_id": 3}, {7, 9}),
        ({"eos_token_id": 7}, {}, {7}),
        ({"temperature": 1.0}, {"eos_token_id": 3}, {3}),
        ({"eos_token_id": None}, {"eos_token_id": [3, 4]}, {3, 4}),
        ({"temperature": 1.0}, {}, {0}),  # </s>
        (None, {"eos_token_id": 3}, {3}),
        (None, {"eos_token_id": [3, 4]}, {3, 4}),
        (None, {"eos_token_id": None}, {0}),
        (None, {}, {0}),
    ],
)
def test_the_files_of_the_model_say_what_ends_a_text(
    tokenizer, tmp_path, generation, config, expected
) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert eos_ids(tmp_path, config, tokenizer, []) == expected


def test_more_tokens_can_end_a_text(tokenizer, tmp_path) -> None:
    (a,), (b,) = tokenizer.encode_batch(["a", "b"])
    assert eos_ids(tmp_path, {}, tokenizer, ["a", "b", "</s>"]) == {0, a, b}
    message = r"--add-eos-token 'xz': is not a single token .* give --stop"
    with pytest.raises(UsageError, match=message):
        eos_ids(tmp_path, {}, tokenizer, ["a", "xz"])


@pytest.mark.parametrize("spelling", ["</s>", "<0x0A>", "fox", "▁fox", "t", "▁brown"])
def test_tokens_that_end_a_text_are_spelled_as_in_the_vocabulary(
    pieces, tmp_path, spelling: str
) -> None:
    expected = pieces.pieces.piece_to_id(spelling)
    assert expected != pieces.pieces.unk_id()
    assert eos_ids(tmp_path, {"eos_token_id": 0}, pieces, [spelling]) == {0, expected}


@pytest.mark.parametrize("text", ["brown", "北", "\n", "o o"])
def test_a_token_with_another_text_ends_no_text(pieces, tmp_path, text: str) -> None:
    with pytest.raises(UsageError, match="is not a single token"):
        eos_ids(tmp_path, {}, pieces, [text])


def test_a_letter_ends_a_text_and_not_the_byte_of_this_name(tmp_path) -> None:
    model = tokenizers.models.BPE({"é": 0, "Ã": 1, "©": 2, "Ã©": 3}, [("Ã", "©")])
    backend = tokenizers.Tokenizer(model)  # é in the names of bytes is E9, in UTF-8 C3 A9
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    assert eos_ids(tmp_path, {}, load_tokenizer(tmp_path), ["é"]) == {3}


def test_a_damaged_generation_config_is_named(tokenizer, tmp_path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConversionError, match=r"generation_config.json: no JSON"):
        eos_ids(tmp_path, {}, tokenizer, [])
