from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tokenizers

from ml_data.tokenizer import load_tokenizer
from ml_eval.stream import Detokenizer, StopText

MIXED = "你好,世界! 🙂👩‍👩‍👧 naïve  π≈3.14\n\n\t日本語 end."


@pytest.fixture
def bpe(tmp_path, save_tokenizer) -> Path:
    save_tokenizer(tmp_path)
    return tmp_path


@pytest.fixture
def byte_fallback(tmp_path) -> Path:
    """The same idea in a tokenizer.json: a run of bytes is invalid as a whole or not at all."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    model = tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.fixture(params=["bpe", "sentencepiece_model", "byte_fallback"])
def tokenizer(request):
    return load_tokenizer(request.getfixturevalue(request.param))


def stream(decode: Callable, ids: Sequence[int], context: Sequence[int] = ()) -> list[str]:
    detokenizer = Detokenizer(decode, context)
    return [*(detokenizer.push(token) for token in ids), detokenizer.finish()]


def test_streamed_text_is_the_decoded_text_and_never_an_incomplete_character(
    tokenizer, texts
) -> None:
    for text in (*texts, MIXED, "🇨🇳" * 30, "中" * 100):
        (ids,) = tokenizer.encode_batch([text])
        pieces = stream(tokenizer.decode, ids)
        assert "".join(pieces) == tokenizer.decode(ids) == text
        assert not any("�" in piece for piece in pieces)


def test_text_comes_as_early_as_it_is_certain(tokenizer) -> None:
    (ids,) = tokenizer.encode_batch(["ab 中 c"])
    detokenizer, shown = Detokenizer(tokenizer.decode), ""
    for count, token in enumerate(ids, start=1):
        shown += detokenizer.push(token)
        assert shown == tokenizer.decode(ids[:count]).rstrip("�")


def test_a_continuation_keeps_the_space_before_its_first_word(tokenizer) -> None:
    for text, split in [("over the dog", 4), ("over the dog", 8), ("中 文", 1), ("a  b", 2)]:
        context, whole = tokenizer.encode_batch([text[:split], text])
        if whole[: len(context)] == context:
            continuation = "".join(stream(tokenizer.decode, whole[len(context) :], context))
            assert continuation == text[split:]


def test_the_prompt_is_never_repeated(tokenizer) -> None:
    (context,) = tokenizer.encode_batch([MIXED])
    (ids,) = tokenizer.encode_batch(["quick"], add_special_tokens=False)
    assert "".join(stream(tokenizer.decode, ids, context)).strip() == "quick"


def test_what_never_becomes_a_character_is_shown_at_the_end(tokenizer) -> None:
    (ids,) = tokenizer.encode_batch(["ab中"])
    pieces = stream(tokenizer.decode, ids[:-1])
    assert "".join(pieces[:-1]) == "ab"
    assert set(pieces[-1]) == {"�"}


def test_special_tokens_are_silent(bpe) -> None:
    tokenizer = load_tokenizer(bpe)
    (ids,) = tokenizer.encode_batch(["the dog"])
    assert stream(tokenizer.decode, [*ids, 0, 0])[-3:] == ["", "", ""]


def test_a_few_tokens_are_decoded_at_a_time(tokenizer, texts) -> None:
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return tokenizer.decode(ids)

    (ids,) = tokenizer.encode_batch([texts[0]])
    stream(decode, ids * 3)
    assert longest <= 6


def pieces_of(stop: StopText, pieces: Sequence[str]) -> list[str]:
    return [*(stop.push(piece) for piece in pieces), stop.finish()]


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "found"),
    [
        (["."], ["a", "b.c", "d"], ["a", "b", "", ""], True),
        (["END"], ["xE", "N", "D", "y"], ["x", "", "", "", ""], True),
        (["END"], ["xE", "N", "N"], ["x", "", "ENN", ""], False),
        (["END"], ["EN"], ["", "EN"], False),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", "", ""], True),
        (["bc", "abcd"], ["ab", "c"], ["", "a", ""], True),
        (["c", "bc"], ["abc"], ["a", ""], True),
        (["\n\n"], ["a\n", "b\n\nc"], ["a", "\nb", ""], True),
        ([], ["a", "b"], ["a", "b", ""], False),
        (["结束"], ["好结", "束了"], ["好", "", ""], True),
    ],
)
def test_a_stop_text_ends_the_text_before_it(stops, pieces, shown, found) -> None:
    stop = StopText(stops)
    assert pieces_of(stop, pieces) == shown
    assert stop.found is found
