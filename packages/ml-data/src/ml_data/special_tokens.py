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
        added = dict(_read_json(directory / "added_tokens.json"))
        for id_, token in config.get("added_tokens_decoder", {}).items():
            added[token["content"]] = int(id_)
        adds = {"add_bos": config.get("add_bos_token"), "add_eos": config.get("add_eos_token")}
        return cls(
            roles={role: token for role, token in roles.items() if token is not None},
            added=added,
            **{name: value for name, value in adds.items() if value is not None},
        )

    def ids(
        self,
        vocabulary: Mapping[str, int],
        defaults: SpecialIds = SpecialIds(None, None, None),  # noqa: B008 (immutable)
    ) -> SpecialIds:
        """Return the ids of the special tokens; `defaults` for roles that no file here mentions."""
        found = {role: vocabulary.get(token) for role, token in self.roles.items()}
        ids = defaults._replace(**found)
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
