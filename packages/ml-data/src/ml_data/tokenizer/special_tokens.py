"""The files beside a vocabulary: which token begins, ends or pads a text, and what was added."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ml_models.flags import UsageError

_ROLES = {"bos": "bos_token", "eod": "eos_token", "pad": "pad_token"}


class SpecialIds(NamedTuple):
    """Ids of special tokens, where a tokenizer has them."""

    bos: int | None
    eod: int | None
    pad: int | None
    """That of `eod` in a tokenizer without one."""


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """What `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` say."""

    directory: Path
    """Where they are."""
    roles: Mapping[str, str]
    """Token of each role: `bos`, `eod`, `pad`."""
    added: Mapping[str, int]
    """Ids of the tokens added to the vocabulary."""
    add_bos: bool = True
    """Texts begin with `bos`; transformers takes this for granted where nothing is said."""
    add_eos: bool = False
    """Texts end with `eod`."""

    @classmethod
    def read(cls, directory: Path) -> SpecialTokens:
        """Read the files that are in `directory`."""
        config = _read_json(directory / "tokenizer_config.json")
        named = _read_json(directory / "special_tokens_map.json") | config
        roles = {role: _spelling(named.get(name)) for role, name in _ROLES.items()}
        added = _read_json(directory / "added_tokens.json")
        try:
            decoder = config.get("added_tokens_decoder", {}).items()
            added |= {token["content"]: int(id_) for id_, token in decoder}
            added = {str(token): int(id_) for token, id_ in added.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"tokenizer {directory}: added_tokens.json, or added_tokens_decoder of "
                f"tokenizer_config.json, is not tokens with their ids ({error!r})"
            ) from error
        adds = {"add_bos": config.get("add_bos_token"), "add_eos": config.get("add_eos_token")}
        return cls(
            directory=directory,
            roles={role: token for role, token in roles.items() if token is not None},
            added=added,
            **{name: value for name, value in adds.items() if value is not None},
        )

    def ids(
        self,
        vocabulary: Mapping[str, int],
        defaults: SpecialIds = SpecialIds(None, None, None),  # noqa: B008 (immutable)
    ) -> SpecialIds:
        """Return the ids of the special tokens; `defaults` for roles that no file here mentions.

        Raises:
            UsageError: a token is not in the vocabulary.
        """
        for role, token in self.roles.items():
            if token not in vocabulary:
                raise UsageError(
                    f"tokenizer {self.directory}: {_ROLES[role]} {token!r} is none of its tokens; "
                    "added_tokens.json can give it an id"
                )
        ids = defaults._replace(**{role: vocabulary[token] for role, token in self.roles.items()})
        return ids._replace(pad=ids.eod) if ids.pad is None else ids


def _spelling(token: Any) -> str | None:
    """Return the text of a token that is written as text or as an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: not a JSON object")
    return content
