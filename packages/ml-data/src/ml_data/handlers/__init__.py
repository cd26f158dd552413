"""Handlers: a record of a format to what it says, by ModelLink's names.

A handler is a function of a record and the names of its columns that returns conversations or
preferences; a record of MOSS gives one for each of its turns. A new format is such a function and a
line in `HANDLERS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, get_args

from ml_data.handlers import alpaca, fixed, openai, sharegpt
from ml_data.handlers.columns import Columns, Tags, map_keys
from ml_data.handlers.formats import InstructionText, MarkedTurns
from ml_data.instruction.conversation import Conversation, Preference
from ml_data.instruction.turns import ChatFormat
from ml_data.pretraining.pretrain_text import PretrainHandler
from ml_data.reading.record import shown
from ml_data.tokenizer import Tokenizer
from ml_models.commands import did_you_mean
from ml_models.flags import UsageError

Convert: TypeAlias = Callable[
    [Mapping[str, Any], Columns], Sequence[Conversation] | Sequence[Preference]
]

_ALPACA = ("prompt", "query", "response", "history", "system", "tools")
_SHAREGPT = ("messages", "system", "tools", "tags")
_PAIR = ("chosen", "rejected")
_COLUMNS = Columns()
_OPENAI = Columns(
    messages="messages",
    tags=Tags(
        role_tag="role",
        content_tag="content",
        user_tag="user",
        assistant_tag="assistant",
        observation_tag="tool",
        function_tag="function_call",
        system_tag="system",
    ),
)
_MOSS = Columns(messages="chat")


@dataclass(frozen=True, kw_only=True)
class Handler:
    """What a name stands for."""

    convert: Convert
    columns: Columns = _COLUMNS
    """The names of the columns, unless `--map-keys` says otherwise."""
    fields: tuple[str, ...] = ()
    """Columns that `--map-keys` can name, and `tags` where messages have some."""
    pairwise: bool = False
    """Whether it gives preferences."""
    chat_format: Callable[[Tokenizer], ChatFormat] | None = None
    """How it writes conversations; None if a template says that."""
    last_answer_only: bool = False
    """Whether the loss sees the last answer only."""


HANDLERS: dict[str, Handler] = {
    "AlpacaStyleInstructionHandler": Handler(convert=alpaca.conversation, fields=_ALPACA),
    "SharegptStyleInstructionHandler": Handler(convert=sharegpt.conversation, fields=_SHAREGPT),
    "OpenAIInstructionHandler": Handler(
        convert=openai.conversation, columns=_OPENAI, fields=_SHAREGPT
    ),
    "GeneralInstructionHandler": Handler(
        convert=fixed.general,
        fields=("prompt", "query", "response"),
        chat_format=InstructionText,
        last_answer_only=True,
    ),
    "BelleMultiTurnInstructionHandler": Handler(
        convert=fixed.belle,
        fields=("prompt", "response"),
        chat_format=InstructionText,
        last_answer_only=True,
    ),
    "MOSSInstructionHandler": Handler(
        convert=fixed.moss_each_turn,
        columns=_MOSS,
        fields=("messages",),
        chat_format=InstructionText,
        last_answer_only=True,
    ),
    "MOSSMultiTurnHandler": Handler(
        convert=fixed.moss, columns=_MOSS, fields=("messages",), chat_format=MarkedTurns
    ),
    "LeetcodePythonInstructionHandler": Handler(
        convert=fixed.leetcode,
        columns=Columns(prompt="code_with_problem", query="code_only", response="explanation_only"),
        fields=("prompt", "query", "response"),
        chat_format=InstructionText,
        last_answer_only=True,
    ),
    "AlpacaStylePairwiseHandler": Handler(
        convert=alpaca.preference, fields=(*_ALPACA, *_PAIR), pairwise=True
    ),
    "SharegptStylePairwiseHandler": Handler(
        convert=sharegpt.preference, fields=(*_SHAREGPT, *_PAIR), pairwise=True
    ),
    "OpenAIPairwiseHandler": Handler(
        convert=openai.preference, columns=_OPENAI, fields=(*_SHAREGPT, *_PAIR), pairwise=True
    ),
}
LLAMA_FACTORY = "LlamaFactoryInstructionHandler"
"""The name for datasets of a `dataset_info.json`; each says its own format."""


def names(*, pairwise: bool) -> list[str]:
    """Return the names of the handlers for instruction or preference data."""
    return [
        *(name for name, handler in HANDLERS.items() if handler.pairwise == pairwise),
        LLAMA_FACTORY,
    ]


def find(name: str, *, pairwise: bool) -> Handler:
    """Return the handler with a name.

    Raises:
        UsageError: there is none, or it is for the other command.
    """
    if name in get_args(PretrainHandler):
        raise UsageError(f"--handler-name {name}: that is for ml-data pretrain")
    handler = HANDLERS.get(name)
    known = names(pairwise=pairwise)
    if handler is None:
        near = did_you_mean(name, known)
        raise UsageError(f"--handler-name {name}: unknown; there are {', '.join(known)}{near}")
    if handler.pairwise != pairwise:
        command = "preference" if handler.pairwise else "instruct"
        raise UsageError(f"--handler-name {name}: that is for ml-data {command}")
    return handler


def columns_of(handler: Handler, mapping: str | None) -> Columns:
    """Return the columns of a handler, as `--map-keys` names them.

    Raises:
        UsageError: it is not a JSON object, or names what the handler does not read.
    """
    if mapping is None:
        return handler.columns
    try:
        given = json.loads(mapping)
    except ValueError as error:
        raise UsageError(f"--map-keys: not JSON ({error}): {mapping}") from error
    if not isinstance(given, dict):
        raise UsageError(f"--map-keys: not a JSON object but {shown(given)}")
    return map_keys(handler.columns, given, handler.fields)
