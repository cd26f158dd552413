"""Tools in one form: JSON of plain functions and of calls (see `instruction.conversation`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ml_data.instruction.conversation import RecordError
from ml_data.reading.record import shown


def tool_list(value: Any) -> str | None:
    """Return the tools of a record, as JSON or as a list, as JSON; None if there are none.

    OpenAI's wrapper around a function, `{"type": "function", "function": ...}`, is taken off.

    Raises:
        RecordError: it is not a list of functions with names.
    """
    tools = value
    if isinstance(value, str):
        tools = _parsed(value, "the tools") if value.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list):
        raise RecordError(f"the tools are not a list but {shown(tools)}")
    return _written([_function(tool) for tool in tools], "the tools")


def call_text(calls: Sequence[Any], said: str = "") -> str:
    """Return calls of tools as JSON: the object of one, a list of several.

    With something `said` before them, OpenAI's `{"content": ..., "tool_calls": [...]}`.

    Raises:
        RecordError: one has no name, or arguments that are not JSON.
    """
    written = [_call(call) for call in calls]
    if said:
        return _written({"content": said, "tool_calls": written}, "the calls")
    return _written(written[0] if len(written) == 1 else written, "the calls")


def _function(tool: Any) -> dict[str, Any]:
    inner = tool.get("function", tool) if isinstance(tool, dict) else tool
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise RecordError(f"a tool has no name: {shown(tool)}")
    return inner


def _call(call: Any) -> dict[str, Any]:
    inner = _function(call)
    arguments = inner.get("arguments", {})
    if isinstance(arguments, str):
        what = f"the arguments of {inner['name']!r}"
        arguments = _parsed(arguments, what) if arguments.strip() else {}
    return {"name": inner["name"], "arguments": arguments}


def _parsed(value: str, what: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{what} are not JSON but {shown(value)}") from error


def _written(value: Any, what: str) -> str:
    """Return JSON; what is JSON in a string of a record has not been looked at before.

    Raises:
        RecordError: it cannot be encoded, or is nested too deeply.
    """
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise RecordError(f"{what} have half a character (\\u{half:04x}) in their text") from error
    except RecursionError as error:
        raise RecordError(f"{what} are nested too deeply") from error
    return text
