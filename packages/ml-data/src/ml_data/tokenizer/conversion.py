"""A sentencepiece BPE model as a tokenizer of the library `tokenizers`, with the same ids.

Both merge the best pair of neighbours first. Sentencepiece compares the scores of the merged
pieces, and of equals takes the leftmost; `tokenizers` has a list of pairs. So every way to cut a
piece into two pieces becomes a pair, in the order of the scores. That is all, but for:

- pieces of equal score, as the runs of spaces in Llama's and Mistral's models: the leftmost first
  means that one run grows from the left, so the pair with the longer left part comes first. Other
  pieces of equal score cannot be ordered;
- user-defined pieces, which are cut out of the text before anything is merged. `tokenizers` has no
  way to do that after the space that sentencepiece puts before a text, except by cutting the text
  at them and then taking a whole part that is a token as this token (`ignore_merges`). This is the
  same if every piece is what its own text is merged to. What looks like a byte piece, `<0x41>`, is
  cut in two, so that it is never taken for one;
- pieces that mark something, which no text may give: their name is changed to one with a space,
  which the text has not at that point.

Unigram models are not converted: scores are summed in float32 by sentencepiece and in float64 by
`tokenizers`, so the better of two nearly equal segmentations is not the same one (with a model of
8,000 pieces, in 24 of 300 modules of Python; and sentencepiece is six times as fast there). Nor are
models that normalize characters: `tokenizers` does this by grapheme.
"""

from __future__ import annotations

import itertools
import random
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers


class ConversionError(Exception):
    """The model cannot be expressed exactly; the message says why."""


_BEFORE_BYTE = "<(?=0x[0-9A-F]{2}>)"


class _Type(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, kw_only=True)
class _Piece:
    text: str
    score: float
    type: int


@dataclass(frozen=True, kw_only=True)
class _Model:
    """What a `ModelProto` of sentencepiece says, as far as it changes ids."""

    pieces: Sequence[_Piece]
    is_bpe: bool
    byte_fallback: bool
    space_is_suffix: bool
    normalizes: bool
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool

    def texts(self, kind: _Type) -> list[str]:
        """Return the pieces of a kind."""
        return [piece.text for piece in self.pieces if piece.type == kind]


def convert(content: bytes, processor: Any) -> tokenizers.Tokenizer:
    """Convert the model in `content`, which is also the one of `processor`.

    Raises:
        ConversionError: some text would get other ids.
    """
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers

    model = _read(content)
    _check(model)
    marks = (_Type.CONTROL, _Type.UNKNOWN)
    names = [f" {p.text}" if p.type in marks else p.text for p in model.pieces]
    unknown = next((f" {text}" for text in model.texts(_Type.UNKNOWN)), None)
    bpe = models.BPE(
        dict(zip(names, itertools.count())),
        _merges(model),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )
    own = model.texts(_Type.USER_DEFINED)
    if own:
        _check_whole(model, bpe)
        bpe.ignore_merges = True
    backend = tokenizers.Tokenizer(bpe)
    backend.normalizer = normalizers.Sequence(_normalizers(model))
    if own:
        pattern = "|".join(map(re.escape, sorted(own, key=len, reverse=True)))
        cuts = [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.Split(tokenizers.Regex(_BEFORE_BYTE), "merged_with_previous"),
        ]
        backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    _compare(backend, processor, model)
    return backend


def _normalizers(model: _Model) -> list[tokenizers.normalizers.Normalizer]:
    from tokenizers import Regex, normalizers

    steps: list[tokenizers.normalizers.Normalizer] = []
    if model.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    steps.append(normalizers.Replace(" ", "▁"))
    if model.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"▁+\z"), ""))
    return steps


def _merges(model: _Model) -> list[tuple[str, str]]:
    """Return every pair of pieces that is a piece, the best first."""
    scores = {piece.text: piece.score for piece in model.pieces if piece.type == _Type.NORMAL}
    pairs = [
        (-score, -cut, text[:cut], text[cut:])
        for text, score in scores.items()
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    return [(left, right) for _, _, left, right in sorted(pairs)]


# What is not the same.


def _check(model: _Model) -> None:
    """Refuse what cannot be expressed, whatever the text."""
    if not model.is_bpe:
        raise ConversionError("not a BPE model")
    if model.normalizes:
        raise ConversionError("it normalizes characters")
    if model.space_is_suffix or not model.escape_whitespaces:
        raise ConversionError("it treats spaces in its own way")
    if model.texts(_Type.UNUSED):
        raise ConversionError("it has pieces that are not used")
    normal = [piece for piece in model.pieces if piece.type == _Type.NORMAL]
    characters = {piece.text for piece in normal if len(piece.text) == 1}
    longer = [piece for piece in normal if len(piece.text) > 1]
    if not characters.issuperset(itertools.chain.from_iterable(p.text for p in longer)):
        raise ConversionError("it has pieces with characters that are no pieces")
    if model.texts(_Type.USER_DEFINED) and any("<0" in piece.text for piece in normal):
        raise ConversionError("it has user-defined pieces and one with <0")
    longer.sort(key=lambda piece: piece.score)
    for _, equal in itertools.groupby(longer, key=lambda piece: piece.score):
        tied = list(equal)
        if len(tied) > 1 and len({*"".join(piece.text for piece in tied)}) > 1:
            raise ConversionError("it has different pieces of the same score")


def _check_whole(model: _Model, bpe: tokenizers.models.BPE) -> None:
    """Check that the text of every piece is merged to this piece."""
    for id_, piece in enumerate(model.pieces):
        if piece.type == _Type.NORMAL and [t.id for t in bpe.tokenize(piece.text)] != [id_]:
            raise ConversionError(f"it has user-defined pieces, and {piece.text!r} is never merged")


def _compare(backend: tokenizers.Tokenizer, processor: Any, model: _Model) -> None:
    """Encode some text with both."""
    for text in _sample(model):
        if backend.encode(text, add_special_tokens=False).ids != processor.encode(text):
            raise ConversionError(f"tokenizers gives other ids for {text!r}")


def _sample(model: _Model) -> Iterator[str]:
    """Yield texts of every kind of character and piece."""
    yield "def f(x):\n    if x:\n\treturn  'é' # 北京🙂\r\n\n\n"
    yield "\x00\x1b\u2581 \ufffd\ufeff" + " " * 40 + "\u3000\u00a0"
    yield from ("", " ", "  a ", "\n", "a  b", *model.texts(_Type.CONTROL)[:3], "<0x41>")
    for length in range(1, 70):
        yield "x" + " " * length + "y" + "\n" * length + "-" * length
    choose = random.Random(0)
    pieces = [piece.text.replace("▁", " ") for piece in model.pieces]
    for _ in range(100):
        yield "".join(choose.choices(pieces, k=30))


# The file.


def _read(content: bytes) -> _Model:
    """Read a `ModelProto`; the numbers are those of sentencepiece_model.proto."""
    fields = list(_fields(content))
    trainer = dict(_fields(b"".join(_bytes(fields, 2))))
    normalizer = dict(_fields(b"".join(_bytes(fields, 3))))
    return _Model(
        pieces=[_piece(dict(_fields(value))) for value in _bytes(fields, 1)],
        is_bpe=trainer.get(3) == 2,
        byte_fallback=bool(trainer.get(35, False)),
        space_is_suffix=bool(trainer.get(24, False)),
        normalizes=bool(normalizer.get(2)),
        add_dummy_prefix=bool(normalizer.get(3, True)),
        remove_extra_whitespaces=bool(normalizer.get(4, True)),
        escape_whitespaces=bool(normalizer.get(5, True)),
    )


def _bytes(fields: Sequence[tuple[int, int | bytes]], number: int) -> Iterator[bytes]:
    return (value for key, value in fields if key == number and isinstance(value, bytes))


def _piece(fields: dict[int, Any]) -> _Piece:
    (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
    return _Piece(text=fields[1].decode(), score=score, type=fields.get(3, _Type.NORMAL))


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the number and the value of each field of a protobuf message."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        if key & 7 == 0:
            value, position = _varint(message, position)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(key & 7)
        if size is None:
            size, position = _varint(message, position)
        yield key >> 3, message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in itertools.count(0, 7):
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise AssertionError
