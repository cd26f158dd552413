"""Sentencepiece models.

The library itself defines the ids. Where `conversion.py` can say the same for `tokenizers`, that
encodes, so that everything built on `tokenizers` works; the library still decodes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_data.tokenizer.conversion import ConversionError, convert
from ml_data.tokenizer.fast import put_around
from ml_data.tokenizer.protocol import Loaded, Tokenizer
from ml_data.tokenizer.special_tokens import SpecialIds, SpecialTokens
from ml_models.flags import UsageError

if TYPE_CHECKING:
    import tokenizers

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PieceTokenizer(Loaded):
    """A model that sentencepiece encodes with; the spelling of a special token is just text."""

    pieces: Any
    """The `sentencepiece.SentencePieceProcessor`."""
    vocabulary: Mapping[str, int] = dataclasses.field(repr=False)
    """Pieces, and the tokens that the files beside the model add."""
    before: tuple[int, ...]
    after: tuple[int, ...]

    def token_id(self, token: str) -> int | None:
        """Return the id of a token."""
        return self.vocabulary.get(token)

    def _encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        batch: list[list[int]] = self.pieces.encode(texts, out_type=int, num_threads=1)
        if add_special_tokens and (self.before or self.after):
            return [[*self.before, *ids, *self.after] for ids in batch]
        return batch

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`; those beyond the vocabulary have none."""
        special = {id_: token for token, id_ in self.special_tokens.items()}
        known = [int(id_) for id_ in ids if id_ < self.vocab_size]
        if skip_special_tokens:
            return str(self.pieces.decode([id_ for id_ in known if id_ not in special]))
        runs = itertools.groupby(known, special.__contains__)
        return "".join(
            "".join(map(special.__getitem__, run)) if marks else str(self.pieces.decode([*run]))
            for marks, run in runs
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertedTokenizer(PieceTokenizer):
    """A model that `tokenizers` encodes with."""

    backend: tokenizers.Tokenizer

    def _encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        encode = self.backend.encode_batch_fast
        return [e.ids for e in encode(texts, add_special_tokens=add_special_tokens)]


def load(path: Path, *, add_bos: bool | None = None, use_fast: bool = True) -> Tokenizer:
    """Load a model; without `add_bos`, the files beside it say what goes around a text.

    Raises:
        UsageError: it is not a sentencepiece model.
    """
    content = path.read_bytes()
    processor, spelled = _processor(path, content)
    special = SpecialTokens.read(path.parent)
    if add_bos is not None:
        special = dataclasses.replace(special, add_bos=add_bos, add_eos=False)
    vocabulary = {**dict(zip(spelled, itertools.count())), **special.added}
    own = (processor.bos_id(), processor.eos_id(), processor.pad_id())
    ids = special.ids(vocabulary, SpecialIds(*(id_ if id_ >= 0 else None for id_ in own)))
    before = (ids.bos,) if special.add_bos and ids.bos is not None else ()
    after = (ids.eod,) if special.add_eos and ids.eod is not None else ()
    control = {piece: id_ for id_, piece in enumerate(spelled) if processor.is_control(id_)}
    tokenizer = PieceTokenizer(
        path=str(path),
        kind="sentencepiece",
        identity=f"sentencepiece-{hashlib.sha256(content).hexdigest()}-{before}-{after}",
        vocab_size=max(vocabulary.values()) + 1,
        **ids._asdict(),
        special_tokens={**control, **special.added},
        pieces=processor,
        vocabulary=vocabulary,
        before=before,
        after=after,
    )
    return _converted(tokenizer, content, ids, special) if use_fast else tokenizer


def _converted(
    tokenizer: PieceTokenizer, content: bytes, ids: SpecialIds, special: SpecialTokens
) -> PieceTokenizer:
    """Let `tokenizers` encode if that gives the same ids."""
    try:
        backend = convert(content, tokenizer.pieces)
    except ConversionError as reason:
        logger.info("%s: sentencepiece itself encodes: %s", tokenizer.path, reason)
        return tokenizer
    put_around(backend, ids, special)
    fields = {field.name for field in dataclasses.fields(tokenizer)}
    return ConvertedTokenizer(
        **{name: getattr(tokenizer, name) for name in fields}, backend=backend
    )


def _processor(path: Path, content: bytes) -> tuple[Any, list[str]]:
    """Return the library's object and the pieces."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(content)
        pieces = [processor.id_to_piece(id_) for id_ in range(processor.get_piece_size())]
    except (RuntimeError, TypeError, UnicodeDecodeError):
        raise UsageError(f"tokenizer {path}: not a sentencepiece model") from None
    if not pieces:
        raise UsageError(f"tokenizer {path}: not a sentencepiece model")
    return processor, pieces
