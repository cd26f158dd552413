"""Mistral's `tekken.json`: tiktoken ranks that come after the special tokens, and their pattern."""

from __future__ import annotations

import binascii
import hashlib
import json
from pathlib import Path
from typing import Any

from ml_data.tokenizer import ranks
from ml_data.tokenizer.protocol import Tokenizer
from ml_data.tokenizer.rank_models import RankModel
from ml_models.flags import UsageError

# mistral_common/tokens/tokenizers/tekken.py: what files of versions up to 7 do not say
_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]"),
    *("[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    "[TOOL_CONTENT]",
)
_ROLES = {"bos": "<s>", "eod": "</s>", "pad": "<pad>"}


def is_tekken(path: Path) -> bool:
    """Tell such a file from a `tokenizer.json`, by its first bytes."""
    with path.open("rb") as file:
        start = file.read(1024)
    return b'"config"' in start and b'"default_vocab_size"' in start


def load(path: Path) -> Tokenizer:
    """Load a file.

    Raises:
        UsageError: it is damaged.
    """
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    try:
        return _build(path, digest, json.loads(content))
    except UsageError:
        raise
    except Exception as error:  # of the pattern, `tokenizers` says nothing more specific
        raise UsageError(f"tokenizer {path}: not a tekken.json ({error!r})") from error


def _build(path: Path, digest: str, described: dict[str, Any]) -> Tokenizer:
    config = described["config"]
    first = config["default_num_special_tokens"]
    # The file has more ranks than the models have tokens.
    vocabulary = described["vocab"][: config["default_vocab_size"] - first]
    tokens = {binascii.a2b_base64(token["token_bytes"]): token["rank"] for token in vocabulary}
    model = RankModel(
        name="tekken",
        pattern=config["pattern"],
        special_tokens=_special_tokens(described),
        roles=_ROLES,
    )
    return ranks.build(path, digest, {token: first + rank for token, rank in tokens.items()}, model)


def _special_tokens(described: dict[str, Any]) -> dict[str, int]:
    """Return the ids of the special tokens, those without a name included."""
    named = [token["token_str"] for token in described.get("special_tokens") or ()] or _SPECIAL
    count = described["config"]["default_num_special_tokens"]
    names = [*named, *(f"<SPECIAL_{id_}>" for id_ in range(len(named), count))]
    return {name: id_ for id_, name in enumerate(names)}
