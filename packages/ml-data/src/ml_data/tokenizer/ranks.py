"""Files of tiktoken: base64 of a token and its rank, a line each.

The ranks are half of a tokenizer: the pattern that cuts text into words and the special tokens are
in the code of each model. The file tells the model: `rank_models.py` has the hash of those it
knows. The tokenizers built here need no tiktoken and give its ids, with special tokens allowed.
"""

from __future__ import annotations

import binascii
import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ml_data.tokenizer.fast import FastTokenizer, put_around
from ml_data.tokenizer.protocol import Tokenizer
from ml_data.tokenizer.rank_models import RANK_MODELS, RankModel
from ml_data.tokenizer.special_tokens import SpecialTokens
from ml_models.flags import UsageError

if TYPE_CHECKING:
    import tokenizers


def load(path: Path) -> Tokenizer:
    """Load the ranks of a known model.

    Raises:
        UsageError: the file is of an unknown model.
    """
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    model = RANK_MODELS.get(digest)
    if model is None:
        known = ", ".join(known.name for known in RANK_MODELS.values())
        raise UsageError(
            f"tokenizer {path}: tiktoken ranks of an unknown model (known: {known}); "
            "use the tokenizer.json of the same model"
        )
    lines = map(bytes.split, content.splitlines())
    tokens = {binascii.a2b_base64(token): int(rank) for token, rank in lines}
    return build(path, digest, tokens, model)


def build(path: Path, digest: str, ranks: Mapping[bytes, int], model: RankModel) -> Tokenizer:
    """Return the tokenizer of a file with this hash; the files beside it may name other roles."""
    beside = SpecialTokens.read(path.parent)
    renamed = set(beside.added.values())
    own = {token: id_ for token, id_ in model.special_tokens.items() if id_ not in renamed}
    special_tokens = {**own, **beside.added}
    special = dataclasses.replace(
        beside,
        roles={**model.roles, **beside.roles},
        add_bos=beside.add_bos and "bos" in model.roles,  # as its own code does
    )
    backend = backend_of(ranks, special_tokens, pattern=model.pattern, nfc=model.nfc)
    named = ((token, backend.token_to_id(token)) for token in special.roles.values())
    ids = special.ids({token: id_ for token, id_ in named if id_ is not None})
    around = put_around(backend, ids, special)
    return FastTokenizer(
        path=str(path),
        kind="tiktoken",
        identity=f"tiktoken-{digest}-{around}-{sorted(beside.added.items())}",
        vocab_size=max([*ranks.values(), *special_tokens.values()]) + 1,
        **ids._asdict(),
        special_tokens=special_tokens,
        backend=backend,
    )


def backend_of(
    ranks: Mapping[bytes, int], special_tokens: Mapping[str, int], *, pattern: str, nfc: bool
) -> tokenizers.Tokenizer:
    """Build the tokenizer that tiktoken builds of these.

    tiktoken merges the neighbours whose union has the lowest rank, so every way to cut a token
    into two tokens is a merge; a word that is a token is not cut at all.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers as words

    tokens = {_spelling(token): rank for token, rank in ranks.items()}
    merges = [
        (left, right)
        for token in sorted(tokens, key=tokens.__getitem__)
        for cut in range(len(token) - 1, 0, -1)
        if (left := token[:cut]) in tokens and (right := token[cut:]) in tokens
    ]
    backend = Tokenizer(models.BPE({**tokens, **special_tokens}, merges, ignore_merges=True))
    if nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = words.Sequence(
        [
            words.Split(Regex(pattern), "isolated"),
            words.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in special_tokens]
    )
    return backend


def _letters() -> dict[int, str]:
    """Return the letter of each byte in tokenizers of GPT-2's kind."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = sorted(set(range(256)) - visible)
    return {byte: chr(byte) for byte in visible} | {b: chr(256 + n) for n, b in enumerate(others)}


_LETTERS = _letters()


def _spelling(token: bytes) -> str:
    return token.decode("latin-1").translate(_LETTERS)
