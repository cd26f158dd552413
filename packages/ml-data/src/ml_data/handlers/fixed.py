"""Data of single projects with a form of their own: Belle, MOSS, LeetCode, plain instructions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_data.handlers.columns import Columns, text
from ml_data.instruction.conversation import Conversation, Message, RecordError
from ml_data.reading.record import shown


def general(record: Mapping[str, Any], columns: Columns) -> list[Conversation]:
    """Return the instruction, a new line and the input, which may be empty, with the output."""
    asked = columns.text(record, "prompt", required=True)
    query = columns.text(record, "query")
    answer = columns.text(record, "response", required=True)
    return [_turns([(f"{asked}\n{query}" if asked or query else "", answer)])]


def belle(record: Mapping[str, Any], columns: Columns) -> list[Conversation]:
    """Return the turns in an instruction `Human:... Assistant:... Human:... Assistant:`."""
    written = columns.text(record, "prompt", required=True)
    parts = [part for part in written.split("Human:") if part.strip()]
    turns = [part.split("Assistant:") for part in parts]
    if not turns or any(len(turn) != 2 for turn in turns) or turns[-1][1].strip():
        raise RecordError(
            f"{columns.prompt!r} is not 'Human:... Assistant:...' in turn, "
            "with nothing after the last 'Assistant:'"
        )
    answer = columns.text(record, "response", required=True)
    said = [(asked.strip(), answered.strip()) for asked, answered in turns]
    return [_turns([*said[:-1], (said[-1][0], answer.strip())])]


def moss(record: Mapping[str, Any], columns: Columns) -> list[Conversation]:
    """Return the turns of a chat."""
    return [_turns(_chat(record, columns))]


def moss_each_turn(record: Mapping[str, Any], columns: Columns) -> list[Conversation]:
    """Return a conversation for each turn of a chat, with the turns before it."""
    turns = _chat(record, columns)
    return [_turns(turns[:end]) for end in range(1, len(turns) + 1)]


def leetcode(record: Mapping[str, Any], columns: Columns) -> list[Conversation]:
    """Return a problem, what is before the first code fence, with its code and explanation."""
    problem = columns.text(record, "prompt", required=True).split("```", maxsplit=1)[0].strip()
    code = columns.text(record, "query", required=True)
    explanation = columns.text(record, "response", required=True)
    return [_turns([(problem, f"{code}\n{explanation}" if code or explanation else "")])]


def _turns(turns: list[tuple[str, str]]) -> Conversation:
    messages = [(Message("user", asked), Message("assistant", said)) for asked, said in turns]
    return Conversation(tuple(message for turn in messages for message in turn))


def _chat(record: Mapping[str, Any], columns: Columns) -> list[tuple[str, str]]:
    chat = columns.value(record, "messages", required=True)
    if not isinstance(chat, dict):
        raise RecordError(f"{columns.messages!r} is not an object of turns but {shown(chat)}")
    turns = []
    for name, turn in chat.items():
        if not turn:
            continue
        if not isinstance(turn, dict) or not {"Human", "MOSS"} <= turn.keys():
            raise RecordError(f"{name!r} of the chat has no 'Human' and 'MOSS': {shown(turn)}")
        asked = text(turn["Human"], f"'Human' of {name!r}")
        said = text(turn["MOSS"], f"'MOSS' of {name!r}")
        asked = asked.replace("<eoh>", "").replace("<|Human|>: ", "").strip()
        turns.append((asked, said.replace("<|MOSS|>:", "").replace("<eom>", "").strip()))
    if not turns:
        raise RecordError("the chat has no turns")
    return turns
