"""How a template writes tools, calls of tools and what they answer: macros in a file of Jinja.

    {% macro describe(tools) %}...{% endmacro %}       what the model is told of the tools
    {% macro call(calls, text) %}...{% endmacro %}     what it writes to call some, after `text`
    {% macro observe(content) %}...{% endmacro %}      what a tool answered; without it, as it is

`json_or_text` is a filter that reads JSON and leaves other text as it is.

A tool is an object with name, description and parameters (a JSON schema); a call has a name and
arguments. `describe` may begin with line breaks: they go where there is no system text before them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_data.instruction.conversation import RecordError
from ml_data.templates.sandbox import FAILURES, environment
from ml_models.flags import UsageError

_REQUIRED = ("describe", "call")
_MACROS = (*_REQUIRED, "observe")


@dataclass(frozen=True)
class ToolFormat:
    """A file with the macros."""

    path: Path
    macros: dict[str, Any]

    def describe(self, tools: str) -> str:
        """Return the description of tools; no text for an empty list."""
        functions = read_tools(tools)
        return self._render("describe", functions) if functions else ""

    def call(self, content: str) -> str:
        """Return what the model writes to call tools."""
        calls, text = read_calls(content)
        return self._render("call", calls, text)

    def observe(self, content: str) -> str:
        """Return what a tool answered, as the model reads it."""
        return self._render("observe", content) if "observe" in self.macros else content

    def _render(self, macro: str, *values: Any) -> str:
        import jinja2

        try:
            return str(self.macros[macro](*values))
        except RecordError:
            raise
        except (jinja2.TemplateError, *FAILURES) as error:
            raise RecordError(f"{self.path.name}: {macro} fails: {error}") from error


def load_tool_format(path: Path) -> ToolFormat:
    """Read a file.

    Raises:
        UsageError: It cannot be read, is not Jinja, or lacks a macro.
    """
    import jinja2

    try:
        jinja = environment()
        jinja.filters["json_or_text"] = _json_or_text
        module = jinja.from_string(path.read_text(encoding="utf-8")).module
    except OSError as error:
        raise UsageError(f"tool format {path}: {error.strerror}") from error
    except (jinja2.TemplateError, *FAILURES) as error:
        raise UsageError(f"tool format {path}: not a Jinja template ({error})") from error
    macros = {name: getattr(module, name) for name in _MACROS if hasattr(module, name)}
    missing = [name for name in _REQUIRED if name not in macros]
    if missing:
        raise UsageError(f"tool format {path}: defines no macro {' and no macro '.join(missing)}")
    return ToolFormat(path, macros)


def read_tools(text: str) -> list[dict[str, Any]]:
    """Return the functions of a JSON list of tools; OpenAI's wrapping is taken off.

    Raises:
        RecordError: It is none.
    """
    tools = _functions("tools", _parse("tools", text))
    for tool in tools:
        if not isinstance(tool.get("name"), str):
            raise RecordError(f"tools: a tool without a name ({_short(tool)})")
        if not isinstance(tool.get("parameters", {}), dict):
            raise RecordError(f"tools: parameters that are not an object ({_short(tool)})")
    return tools


def read_calls(content: str) -> tuple[list[dict[str, Any]], str]:
    """Return the calls in a message that calls functions, and the text before them.

    Such a message is JSON: a call, a list of calls, or OpenAI's {"content": text, "tool_calls":
    [...]}.

    Raises:
        RecordError: It holds no call.
    """
    value, text = _parse("function call", content), ""
    if isinstance(value, dict) and "tool_calls" in value:
        value, text = value["tool_calls"], value.get("content") or ""
    calls = _functions("function call", value)
    if not calls:
        raise RecordError("function call: an empty list")
    return [{"name": _name(call), "arguments": _arguments(call)} for call in calls], text


def _parse(what: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{what}: not JSON ({_short(text)})") from error


def _functions(what: str, value: Any) -> list[dict[str, Any]]:
    entries = value if isinstance(value, list) else [value]
    return [_unwrapped(what, entry) for entry in entries]


def _unwrapped(what: str, entry: Any) -> dict[str, Any]:
    """Return what is in {"type": "function", "function": {...}}."""
    if isinstance(entry, dict) and isinstance(entry.get("function"), dict):
        entry = entry["function"]
    if not isinstance(entry, dict):
        raise RecordError(f"{what}: not an object ({_short(entry)})")
    return entry


def _name(call: dict[str, Any]) -> str:
    name = call.get("name")
    if not isinstance(name, str):
        raise RecordError(f"function call: no name ({_short(call)})")
    return name


def _arguments(call: dict[str, Any]) -> Any:
    """Return the arguments; OpenAI writes them as JSON in a string."""
    if "arguments" not in call:
        raise RecordError(f"function call: no arguments ({_short(call)})")
    arguments = call["arguments"]
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"function call: arguments that are not JSON ({arguments!r})") from error


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
