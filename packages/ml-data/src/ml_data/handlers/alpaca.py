"""Alpaca: an instruction with an input, an output, and the turns before it in a history."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_data.handlers.columns import Columns, text
from ml_data.handlers.tools import tool_list
from ml_data.instruction.conversation import Conversation, Message, Preference, RecordError
from ml_data.reading.record import shown


def conversation(record: Mapping[str, Any], columns: Columns) -> list[Conversation]:
    """Return the conversation a record holds."""
    asked = question(record, columns)
    answer = columns.value(record, "response", required=True)
    if isinstance(answer, list) and len(answer) == 1:
        (answer,) = answer
    said = text("" if answer is None else answer, f"the value of {columns.response!r}")
    messages = (*asked.messages, Message("assistant", said))
    return [Conversation(messages, asked.system, asked.tools)]


def preference(record: Mapping[str, Any], columns: Columns) -> list[Preference]:
    """Return the preference a record holds: two columns, or one with a list of the two answers."""
    asked = question(record, columns)
    both = columns.value(record, "chosen", required=True)
    if isinstance(both, list):
        if len(both) != 2:
            raise RecordError(f"{columns.chosen!r} is not a list of two answers but {shown(both)}")
        chosen, rejected = (text(answer, f"an answer in {columns.chosen!r}") for answer in both)
    else:
        chosen = columns.text(record, "chosen", required=True)
        rejected = columns.text(record, "rejected", required=True)
    return [Preference(asked, Message("assistant", chosen), Message("assistant", rejected))]


def question(record: Mapping[str, Any], columns: Columns) -> Conversation:
    """Return everything before the answer."""
    parts = [columns.text(record, "prompt", required=True), columns.text(record, "query")]
    user = Message("user", "\n".join(part for part in parts if part))
    return Conversation(
        (*_history(record, columns), user),
        columns.text(record, "system") or None,
        tool_list(columns.value(record, "tools")),
    )


def _history(record: Mapping[str, Any], columns: Columns) -> list[Message]:
    turns = columns.value(record, "history") or []
    if not isinstance(turns, list):
        raise RecordError(f"{columns.history!r} is not a list of turns but {shown(turns)}")
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise RecordError(f"turn {number} of {columns.history!r} is not [question, answer]")
        asked, answer = (text(said, f"turn {number} of {columns.history!r}") for said in turn)
        messages += [Message("user", asked), Message("assistant", answer)]
    return messages
