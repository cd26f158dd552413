"""What the descriptions beside datasets have in common: the tokenizer, JSON, and being checked.

`sidecar` describes texts, `instruction.sample_info` instruction and preference data.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ml_data.typed import check_types
from ml_models.flags import UsageError

if TYPE_CHECKING:
    from ml_data.tokenizer import Tokenizer

T = TypeVar("T", bound="TokenizerInfo")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerInfo:
    """Which tokenizer made the tokens."""

    tokenizer: str
    """Path of the tokenizer."""
    tokenizer_kind: str
    """Library whose ids these are: `tokenizers`, `sentencepiece`, `tiktoken` or `transformers`."""
    tokenizer_identity: str
    """Equal for tokenizers that give the same ids."""
    vocab_size: int
    """One more than the largest id the tokenizer can give."""
    bos: int | None
    """Id of the token that begins a text."""
    eod: int | None
    """Id of the token that ends a document or a text."""
    pad: int | None
    """Id of the padding token."""

    @staticmethod
    def of(tokenizer: Tokenizer) -> TokenizerInfo:
        """Return what there is to say of a tokenizer."""
        return TokenizerInfo(
            tokenizer=tokenizer.path,
            tokenizer_kind=tokenizer.kind,
            tokenizer_identity=tokenizer.identity,
            vocab_size=tokenizer.vocab_size,
            bos=tokenizer.bos,
            eod=tokenizer.eod,
            pad=tokenizer.pad,
        )


def to_json(info: TokenizerInfo) -> str:
    """Return the content of a description."""
    return json.dumps(dataclasses.asdict(info), indent=2) + "\n"


def read_description(path: Path, make: Callable[[dict[str, Any]], T], what: str) -> T | None:
    """Return what `make` makes of a description, or None if there is none.

    Args:
        path: Of the description.
        make: Takes the values by name, some of which it may not know.
        what: It describes, for messages.

    Raises:
        UsageError: The file is damaged.
    """
    if not path.exists():
        return None
    try:
        info = make(json.loads(path.read_text(encoding="utf-8")))
        check_types(info)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UsageError(f"{path}: not the description of {what} ({error})") from error
    return info


def known(info_type: type[TokenizerInfo], values: dict[str, Any]) -> dict[str, Any]:
    """Return the values that `info_type` has fields for."""
    names = {field.name for field in dataclasses.fields(info_type)}
    return {name: value for name, value in values.items() if name in names}


def check_size(path: Path, tokens: Path, size: int) -> None:
    """Check that a `.bin`, where it is there, is as long as its description at `path` says.

    Raises:
        UsageError: It is not.
    """
    if tokens.exists() and tokens.stat().st_size != size:
        raise UsageError(
            f"{path}: not of the same run as {tokens}: "
            f"describes {size} bytes, not {tokens.stat().st_size}"
        )
