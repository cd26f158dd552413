"""Megatron-LM's own tokenizers: GPT-2's BPE and BERT's WordPiece, from their vocabulary files.

As there, a text has no special tokens: their spelling is text like any other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ml_data.tokenizer.fast import FastTokenizer
from ml_data.tokenizer.protocol import Tokenizer
from ml_data.tokenizer.special_tokens import SpecialIds
from ml_models.flags import UsageError

if TYPE_CHECKING:
    import tokenizers


def load_bpe(vocabulary: Path, merges: Path) -> Tokenizer:
    """Load GPT2BPETokenizer: `vocab.json` and `merges.txt`; `<|endoftext|>` ends a document.

    Raises:
        UsageError: a file is damaged, or they do not belong together.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    try:
        tokens = json.loads(vocabulary.read_text(encoding="utf-8"))
        lines = merges.read_text(encoding="utf-8").split("\n")
        if lines[0].startswith("#version"):
            del lines[0]
        pairs = [(left, right) for left, right in map(str.split, filter(None, lines))]
        backend = Tokenizer(models.BPE(tokens, pairs))
    except Exception as error:  # tokenizers raises nothing more specific
        raise UsageError(
            f"--vocab-file {vocabulary}, --merge-file {merges}: not those of a BPE ({error})"
        ) from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    eod = tokens.get("<|endoftext|>")
    return _tokenizer(backend, (vocabulary, merges), "gpt2", SpecialIds(None, eod, eod))


def load_wordpiece(vocabulary: Path, *, lower_case: bool) -> Tokenizer:
    """Load BertWordPieceLowerCase or BertWordPieceCase: a token a line.

    `[BOS]` and `[EOS]` are added after the vocabulary, as Megatron-LM does.

    Raises:
        UsageError: the file is not such a vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    try:
        with vocabulary.open(encoding="utf-8") as lines:  # Unicode's other line ends end no line
            tokens = {line.strip(): id_ for id_, line in enumerate(lines)}
    except ValueError as error:
        raise UsageError(f"--vocab-file {vocabulary}: not UTF-8 ({error})") from error
    missing = [token for token in ("[UNK]", "[PAD]", "[CLS]", "[SEP]") if token not in tokens]
    if missing:
        raise UsageError(f"--vocab-file {vocabulary}: no vocabulary of BERT: no {missing[0]} in it")
    for token in ("[BOS]", "[EOS]"):
        tokens.setdefault(token, len(tokens))
    # 200 letters: Megatron-LM's bound, beyond which a word is [UNK]
    model = models.WordPiece(tokens, unk_token="[UNK]", max_input_chars_per_word=200)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=lower_case)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    kind = "wordpiece-lower" if lower_case else "wordpiece"
    ids = SpecialIds(tokens["[BOS]"], tokens["[EOS]"], tokens["[PAD]"])
    return _tokenizer(backend, (vocabulary,), kind, ids)


def _tokenizer(
    backend: tokenizers.Tokenizer, files: tuple[Path, ...], kind: str, ids: SpecialIds
) -> Tokenizer:
    vocabulary = backend.get_vocab()
    names: Mapping[int, str] = {id_: token for token, id_ in vocabulary.items()}
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return FastTokenizer(
        path=str(files[0]),
        kind="tokenizers",
        identity=f"megatron-{kind}-{digest}",
        vocab_size=max(vocabulary.values(), default=-1) + 1,
        **ids._asdict(),
        special_tokens={names[id_]: id_ for id_ in ids if id_ is not None},
        backend=backend,
    )
