"""Which library reads what is on disk."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from ml_data.tokenizer import fast, megatron, pieces, ranks, slow, tekken
from ml_data.tokenizer.protocol import Tokenizer
from ml_models.flags import UsageError

TokenizerType = Literal[
    "PretrainedFromHF",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "TikTokenizer",
    "GPT2BPETokenizer",
    "BertWordPieceLowerCase",
    "BertWordPieceCase",
]
"""ModelLink's and Megatron's names. For the first two, what is on disk chooses the library. The
next three read a sentencepiece model, and of them only Llama2Tokenizer begins a text with BOS."""

FILES: dict[TokenizerType | None, tuple[str, ...]] = {
    "GPT2BPETokenizer": ("vocab_file", "merge_file"),
    "BertWordPieceLowerCase": ("vocab_file",),
    "BertWordPieceCase": ("vocab_file",),
}
"""The files by themselves that a type reads; the others read what is at the path only."""

_PIECES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
_MODELS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_OTHER_FILES = ("tokenizer_config.json", "vocab.json", "vocab.txt")
_RANKS = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n[A-Za-z0-9+/]+=* \d+\r?\n")


def load_tokenizer(
    path: str | Path | None,
    tokenizer_type: TokenizerType | None = None,
    *,
    vocab_file: Path | None = None,
    merge_file: Path | None = None,
    use_fast: bool = True,
) -> Tokenizer:
    """Load the tokenizer in a directory or a file.

    Args:
        path: A Hugging Face directory, a `tokenizer.json`, a sentencepiece model, tiktoken ranks or
            a `tekken.json`; may be None with `vocab_file`.
        tokenizer_type: How to read it; by default what is there decides.
        vocab_file: Vocabulary of GPT2BPETokenizer and BertWordPiece...
        merge_file: Merges of GPT2BPETokenizer.
        use_fast: Whether a `tokenizer.json` goes before a sentencepiece model, and a model is
            converted for `tokenizers`.

    Raises:
        UsageError: there is no tokenizer at `path`, or none that `tokenizer_type` can read.
    """
    if tokenizer_type is not None and tokenizer_type in FILES:
        return _load_megatron(path, tokenizer_type, vocab_file, merge_file)
    if path is None:
        given = f"--tokenizer-type {tokenizer_type}" if tokenizer_type else "--vocab-file"
        raise UsageError(f"missing --tokenizer-name-or-path: {given} alone names no tokenizer")
    path = Path(path).expanduser()
    if not path.exists():
        raise UsageError(
            f"tokenizer {path}: no such file or directory (what has a name on a hub: download it)"
        )
    if tokenizer_type in _PIECES:
        model = _needed(path, _models(path), tokenizer_type, "tokenizer.model")
        add_bos = tokenizer_type == "Llama2Tokenizer"
        return pieces.load(model, add_bos=add_bos, use_fast=use_fast)
    if tokenizer_type == "TikTokenizer":
        files = [*_models(path), *_rank_files(path)]
        return ranks.load(_needed(path, files, tokenizer_type, "file of tiktoken ranks"))
    return _load_file(path, use_fast) if path.is_file() else _load_directory(path, use_fast)


def _load_megatron(
    path: str | Path | None,
    tokenizer_type: TokenizerType,
    vocab_file: Path | None,
    merge_file: Path | None,
) -> Tokenizer:
    directory = None if path is None else Path(path).expanduser()
    if tokenizer_type == "GPT2BPETokenizer":
        vocabulary = _file(vocab_file, directory, "vocab.json", "--vocab-file", tokenizer_type)
        merges = _file(merge_file, directory, "merges.txt", "--merge-file", tokenizer_type)
        return megatron.load_bpe(vocabulary, merges)
    vocabulary = _file(vocab_file, directory, "vocab.txt", "--vocab-file", tokenizer_type)
    return megatron.load_wordpiece(vocabulary, lower_case=tokenizer_type.endswith("LowerCase"))


def _file(
    path: Path | None, directory: Path | None, name: str, flag: str, tokenizer_type: str
) -> Path:
    """Return a file that is given, or that lies in the directory that is."""
    if path is None:
        if directory is None or not (directory / name).exists():
            where = f", or --tokenizer-name-or-path: a directory with {name}"
            raise UsageError(f"missing {flag}: --tokenizer-type {tokenizer_type} needs it{where}")
        return directory / name
    if not path.expanduser().is_file():
        raise UsageError(f"{flag} {path}: no such file")
    return path.expanduser()


def _load_directory(path: Path, use_fast: bool) -> Tokenizer:
    models = _models(path)
    described = path / "tokenizer.json"
    if described.exists() and (use_fast or not models or _has_ranks(models[0])):
        return fast.load(described)
    for file in (*models, *_rank_files(path), path / "tekken.json"):
        if file.exists():
            return _load_file(file, use_fast)
    if any((path / name).exists() for name in _OTHER_FILES):
        return slow.load(path)
    names = ("tokenizer.json", *_MODELS, "*.tiktoken", "tekken.json", *_OTHER_FILES)
    raise UsageError(f"tokenizer {path}: the directory holds none of {', '.join(names)}")


def _load_file(path: Path, use_fast: bool) -> Tokenizer:
    if path.suffix == ".json":
        return tekken.load(path) if tekken.is_tekken(path) else fast.load(path)
    if _has_ranks(path):
        return ranks.load(path)
    return pieces.load(path, use_fast=use_fast)


def _models(path: Path) -> list[Path]:
    """Return the files that are sentencepiece models, or ranks under the same name."""
    if path.is_file():
        return [] if path.suffix == ".json" else [path]
    return [path / name for name in _MODELS if (path / name).exists()]


def _rank_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.tiktoken")) if path.is_dir() else []


def _has_ranks(path: Path) -> bool:
    with path.open("rb") as file:
        return _RANKS.match(file.read(4096)) is not None


def _needed(path: Path, files: list[Path], tokenizer_type: str, what: str) -> Path:
    """Return the first of `files` that `tokenizer_type` reads."""
    wants_ranks = tokenizer_type == "TikTokenizer"
    for file in files:
        if _has_ranks(file) == wants_ranks:
            return file
    is_other = "is not one" if wants_ranks else "is a list of tiktoken ranks"
    hint = f"; {files[0].name} {is_other}" if files else ""
    raise UsageError(f"tokenizer {path}: {tokenizer_type} needs a {what} there{hint}")
