"""Tokenizers on disk, each through the library that defines its ids.

| on disk | library | why |
|---|---|---|
| `tokenizer.json` | `tokenizers` | the format of that library; nothing else is imported |
| a sentencepiece model | `sentencepiece` | conversions change ids, e.g. of indented code |
| another Hugging Face directory | `transformers` | its classes; a tokenizer's own code never runs |

Importing this module imports none of the three. A new format is a new class with the members of
`Tokenizer` and a line in `load_tokenizer`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ml_data.special_tokens import SpecialIds, SpecialTokens
from ml_models.flags import UsageError

if TYPE_CHECKING:
    import tokenizers

TokenizerType = Literal[
    "PretrainedFromHF",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
]
"""ModelLink's and Megatron's names. For the first two, what is on disk chooses the library; the
others read a sentencepiece model, and of them only Llama2Tokenizer begins a text with BOS."""

_SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_OTHER_FILES = ("tokenizer_config.json", "vocab.json", "vocab.txt")
_TIKTOKEN_RANKS = re.compile(rb"[A-Za-z0-9+/]+=* 0\n[A-Za-z0-9+/]+=* 1\n")


class Tokenizer(Protocol):
    """What this repository asks of a tokenizer."""

    @property
    def path(self) -> str:
        """Where it was loaded from."""

    @property
    def kind(self) -> str:
        """The library that encodes."""

    @property
    def identity(self) -> str:
        """Equal only for tokenizers that give the same ids: a hash."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""

    @property
    def bos(self) -> int | None:
        """Id of the token that begins a text."""

    @property
    def eod(self) -> int | None:
        """Id of the token that ends a document: the tokenizer's EOS."""

    @property
    def pad(self) -> int | None:
        """Id of the padding token, or of EOS in a tokenizer without one."""

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Return the ids of each text, by default within the tokenizer's own BOS or EOS."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, special tokens left out."""


def load_tokenizer(path: str | Path, tokenizer_type: TokenizerType | None = None) -> Tokenizer:
    """Load the tokenizer in a directory, a `tokenizer.json` or a sentencepiece model.

    Raises:
        UsageError: there is no tokenizer at `path`, or none that `tokenizer_type` can read.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UsageError(f"tokenizer {path}: no such file or directory (names on a hub: download)")
    model = _sentencepiece_file(path)
    if tokenizer_type in ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"):
        if model is None:
            raise UsageError(f"tokenizer {path}: {tokenizer_type} needs a tokenizer.model there")
        return _load_sentencepiece(model, add_bos=tokenizer_type == "Llama2Tokenizer")
    fast = path / "tokenizer.json" if path.is_dir() else path
    if fast.suffix == ".json" and fast.exists():
        return _load_tokenizers(fast)
    if model is not None:
        return _load_sentencepiece(model)
    if any((path / name).exists() for name in _OTHER_FILES):
        return _load_transformers(path)
    names = ("tokenizer.json", *_SENTENCEPIECE_FILES, *_OTHER_FILES)
    raise UsageError(f"tokenizer {path}: the directory holds none of {', '.join(names)}")


def _sentencepiece_file(path: Path) -> Path | None:
    if path.is_file():
        return None if path.suffix == ".json" else path
    return next((path / name for name in _SENTENCEPIECE_FILES if (path / name).exists()), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Loaded:
    """The members of `Tokenizer` that are values."""

    path: str
    kind: str
    identity: str
    vocab_size: int
    bos: int | None
    eod: int | None
    pad: int | None


# tokenizers


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TokenizersTokenizer(_Loaded):
    backend: tokenizers.Tokenizer

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        encode = self.backend.encode_batch_fast
        return [e.ids for e in encode(list(texts), add_special_tokens=add_special_tokens)]

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode(list(ids))


def _load_tokenizers(path: Path) -> Tokenizer:
    import tokenizers

    content = path.read_bytes()
    try:
        backend = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing more specific
        raise UsageError(f"tokenizer {path}: not a tokenizer.json ({error})") from error
    vocabulary = backend.get_vocab(with_added_tokens=True)
    special = SpecialTokens.read(path.parent)
    if not vocabulary.keys() >= {*special.roles.values(), *special.added}:
        # Tokens that only the other files name get their ids when transformers adds them.
        return _load_transformers(path.parent)
    backend.no_truncation()
    backend.no_padding()
    ids = special.ids(vocabulary)
    return _TokenizersTokenizer(
        path=str(path),
        kind="tokenizers",
        identity=f"tokenizers-{hashlib.sha256(content).hexdigest()}",
        vocab_size=max(vocabulary.values(), default=-1) + 1,
        bos=ids.bos,
        eod=ids.eod,
        pad=ids.pad,
        backend=backend,
    )


# sentencepiece


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SentencePieceTokenizer(_Loaded):
    backend: Any
    before: tuple[int, ...]
    after: tuple[int, ...]

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Encode as sentencepiece does: the spelling of a special token is text like any other."""
        batch: list[list[int]] = self.backend.encode(list(texts), out_type=int, num_threads=1)
        if add_special_tokens and (self.before or self.after):
            return [[*self.before, *ids, *self.after] for ids in batch]
        return batch

    def decode(self, ids: Iterable[int]) -> str:
        pieces = self.backend.get_piece_size()  # added tokens come after them
        return str(self.backend.decode([int(id_) for id_ in ids if id_ < pieces]))


def _load_sentencepiece(path: Path, *, add_bos: bool | None = None) -> Tokenizer:
    """Load a model; without `add_bos`, the files beside it say what goes around a text."""
    content = path.read_bytes()
    backend = _sentencepiece_backend(path, content)
    special = SpecialTokens.read(path.parent)
    pieces = {backend.id_to_piece(id_): id_ for id_ in range(backend.get_piece_size())}
    vocabulary = {**pieces, **special.added}
    own = (backend.bos_id(), backend.eos_id(), backend.pad_id())
    ids = special.ids(vocabulary, SpecialIds(*(id_ if id_ >= 0 else None for id_ in own)))
    with_bos = special.add_bos if add_bos is None else add_bos
    with_eos = special.add_eos if add_bos is None else False
    before = (ids.bos,) if with_bos and ids.bos is not None else ()
    after = (ids.eod,) if with_eos and ids.eod is not None else ()
    return _SentencePieceTokenizer(
        path=str(path),
        kind="sentencepiece",
        identity=f"sentencepiece-{hashlib.sha256(content).hexdigest()}-{before}-{after}",
        vocab_size=max(vocabulary.values()) + 1,
        bos=ids.bos,
        eod=ids.eod,
        pad=ids.pad,
        backend=backend,
        before=before,
        after=after,
    )


def _sentencepiece_backend(path: Path, content: bytes) -> Any:
    import sentencepiece

    if _TIKTOKEN_RANKS.match(content):
        raise UsageError(
            f"tokenizer {path}: a list of tiktoken ranks, not a sentencepiece model; "
            "use the tokenizer.json of the same model"
        )
    backend = sentencepiece.SentencePieceProcessor()
    try:
        backend.load_from_serialized_proto(content)
    except (RuntimeError, TypeError):
        raise UsageError(f"tokenizer {path}: not a sentencepiece model") from None
    if not backend.get_piece_size():
        raise UsageError(f"tokenizer {path}: not a sentencepiece model")
    return backend


# transformers


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TransformersTokenizer(_Loaded):
    backend: Any

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        options = {"return_attention_mask": False, "verbose": False}
        encoded = self.backend(list(texts), add_special_tokens=add_special_tokens, **options)
        return list(encoded["input_ids"])

    def decode(self, ids: Iterable[int]) -> str:
        return str(self.backend.decode(list(ids), skip_special_tokens=True))


def _load_transformers(path: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        backend = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # every tokenizer class raises its own
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(f"tokenizer {path}: transformers cannot load it ({reason})") from error
    vocabulary = backend.get_vocab()
    probe = json.dumps([sorted(vocabulary.items()), backend(["a"])["input_ids"]])
    pad = backend.eos_token_id if backend.pad_token_id is None else backend.pad_token_id
    return _TransformersTokenizer(
        path=str(path),
        kind="transformers",
        identity=f"transformers-{hashlib.sha256(probe.encode()).hexdigest()}",
        vocab_size=max(vocabulary.values()) + 1,
        bos=backend.bos_token_id,
        eod=backend.eos_token_id,
        pad=pad,
        backend=backend,
    )
