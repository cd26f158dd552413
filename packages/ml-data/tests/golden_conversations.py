"""The conversations of golden/conversations.json, and the tokenizer of the golden files."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from ml_data.instruction.conversation import Conversation, Message
from ml_data.tokenizer import Tokenizer, load_tokenizer

GOLDEN = Path(__file__).parent / "golden"
TOKENIZER = GOLDEN / "tokenizer"
"""Byte-level BPE of 512 merges and every token that a template needs."""


def conversations() -> dict[str, Conversation]:
    """Return them by name."""
    content = json.loads((GOLDEN / "conversations.json").read_text(encoding="utf-8"))
    return {name: _conversation(**entry) for name, entry in content.items()}


@cache
def golden_tokenizer() -> Tokenizer:
    """Load it."""
    return load_tokenizer(TOKENIZER)


def _conversation(
    messages: list[tuple], system: str | None = None, tools: list | None = None
) -> Conversation:
    return Conversation(
        tuple(Message(role, _text(content)) for role, content in messages),
        system,
        None if tools is None else _text(tools),
    )


def _text(content: str | list | dict) -> str:
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
