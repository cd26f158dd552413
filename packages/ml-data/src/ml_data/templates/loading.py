"""Template files: by name from here, by path from anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from ml_data.templates.template import Items, Place, Special, Template, Text, Token
from ml_data.templates.thoughts import Thinking
from ml_data.templates.tool_format import ToolFormat, load_tool_format
from ml_models.commands import did_you_mean
from ml_models.flags import UsageError

_BUILTIN = Path(__file__).parent / "builtin"
_CONTENT: Items = (Text("{{content}}"),)


def names() -> list[str]:
    """Return the names of the templates that come with this package."""
    return sorted(path.stem for path in _BUILTIN.glob("*.json"))


def load_template(name_or_path: str) -> Template:
    """Read a template: one of `names`, or a JSON file anywhere.

    Raises:
        UsageError: There is none, or the file is not one.
    """
    if name_or_path in names():
        return _load(_BUILTIN / f"{name_or_path}.json")
    path = Path(name_or_path).expanduser()
    if path.suffix == ".json" or path.is_file():
        return _load(path)
    raise UsageError(
        f"--prompt-type {name_or_path}: no such template; there are {', '.join(names())}, "
        f"and any path to a .json file{did_you_mean(name_or_path, names())}"
    )


def _load(path: Path) -> Template:
    keys = _read(path, ())
    end: Items = () if keys.get("efficient_eos") else (Special("eos"),)
    user = keys.get("user", _CONTENT)
    system = keys.get("system", _CONTENT)
    defaults = {
        "system": system,
        "system_with_tools": system,
        "user": user,
        "observation": user,
        "assistant": _CONTENT + end,
        "function": _CONTENT + end,
    }
    template = Template(**{**defaults, **keys, "name": path.stem})
    _check(path, template)
    return template


def _check(path: Path, template: Template) -> None:
    if template.replace_eos and not template.stop_words:
        raise _error(path, "replace_eos needs stop_words, of which the first becomes EOS")
    if template.system_in != "front":
        for items in (template.system, template.system_with_tools):
            if not all(isinstance(item, Text) for item in items):
                raise _error(path, "system must be text only to stand inside a question")


def _error(path: Path, message: str) -> UsageError:
    return UsageError(f"template {path}: {message}")


# The keys of a file.


def _read(path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    """Return the fields that a file sets, and those of the template it extends."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _error(path, error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:
        raise _error(path, f"not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise _error(path, "not a JSON object")
    inherited = _inherited(path, content.pop("extends", None), (*children, path.resolve()))
    if "observation" in content:  # the separator is of what stood around the answers
        inherited.pop("observation_separator", None)
    return {**inherited, **{key: _field(path, key, value) for key, value in content.items()}}


def _inherited(path: Path, name: Any, children: tuple[Path, ...]) -> dict[str, Any]:
    if name is None:
        return {}
    if not isinstance(name, str):
        raise _error(path, f"extends is {name!r}, must be the name of a template")
    parent = _BUILTIN / f"{name}.json" if name in names() else path.parent / name
    if not parent.is_file():
        raise _error(path, f"extends {name!r}, of which there is none{did_you_mean(name, names())}")
    if parent.resolve() in children:
        raise _error(path, f"extends {name!r}, which extends it")
    return _read(parent, children)


def _field(path: Path, key: str, value: Any) -> Any:
    if key not in _FIELDS:
        raise _error(path, f"unknown key {key!r}{did_you_mean(key, _FIELDS)}")
    try:
        return _FIELDS[key](path, value)
    except _InvalidError as error:
        raise _error(path, f"{key} is {_short(value)}, must be {error}") from error


class _InvalidError(Exception):
    """A value of the wrong form; the message is the right one."""


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _text(_path: Path, value: Any) -> str:
    if not isinstance(value, str):
        raise _InvalidError("text")
    return value


def _flag(_path: Path, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _InvalidError("true or false")
    return value


def _texts(_path: Path, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise _InvalidError("a list of texts")
    return tuple(value)


def _place(_path: Path, value: Any) -> Place:
    if value not in get_args(Place):
        raise _InvalidError(f"one of {', '.join(get_args(Place))}")
    return value


def _thinking(_path: Path, value: Any) -> Thinking:
    if not isinstance(value, dict) or value.keys() != {"start", "end"}:
        raise _InvalidError('{"start": text, "end": text}')
    texts = [text.strip() if isinstance(text, str) else "" for text in value.values()]
    if not all(texts):
        raise _InvalidError('{"start": text, "end": text}')
    return Thinking(value["start"], value["end"])


def _tool_format(path: Path, value: Any) -> ToolFormat:
    """Return one that comes with this package, or a file beside the template."""
    name = _text(path, value)
    builtin = _BUILTIN / f"{name}.jinja"
    return load_tool_format(builtin if builtin.is_file() else path.parent / name)


def _items(allowed: frozenset[str], required: frozenset[str]) -> Callable[[Path, Any], Items]:
    """Return what reads a list of items with these placeholders."""

    def read(_path: Path, value: Any) -> Items:
        if not isinstance(value, list):
            raise _InvalidError("a list of items")
        items = tuple(_item(item) for item in value)
        found = {name for item in items if isinstance(item, Text) for name in item.placeholders}
        if found - allowed:
            known = " and ".join(f"{{{{{name}}}}}" for name in sorted(allowed))
            raise _InvalidError("texts with no placeholder" + (f" but {known}" if known else ""))
        if required - found:
            raise _InvalidError("texts with {{content}} in one")
        return items

    return read


def _item(value: Any) -> Text | Token | Special:
    if isinstance(value, str):
        return Text(value)
    match value:
        case {"token": str(name), **rest} if not rest:
            return Token(name)
        case {"special": "bos" | "eos" as role, **rest} if not rest:
            return Special(role)
    raise _InvalidError(
        'a list of texts, {"token": name}, {"special": "bos"} and {"special": "eos"}'
    )


_NOTHING: frozenset[str] = frozenset()
_ONLY_CONTENT = frozenset({"content"})
_QUESTION = frozenset({"content", "round"})

_FIELDS: Mapping[str, Callable[[Path, Any], Any]] = {
    "about": _text,
    "prefix": _items(_NOTHING, _NOTHING),
    "system": _items(_ONLY_CONTENT, _ONLY_CONTENT),
    "system_with_tools": _items(_ONLY_CONTENT, _ONLY_CONTENT),
    "user": _items(_QUESTION, _ONLY_CONTENT),
    "observation": _items(_QUESTION, _ONLY_CONTENT),
    "observation_separator": _text,
    "assistant": _items(_ONLY_CONTENT, _ONLY_CONTENT),
    "function": _items(_ONLY_CONTENT, _ONLY_CONTENT),
    "separator": _items(_NOTHING, _NOTHING),
    "suffix": _items(_NOTHING, _NOTHING),
    "tools": _items(_ONLY_CONTENT, _ONLY_CONTENT),
    "tools_in": _place,
    "tool_format": _tool_format,
    "default_system": _text,
    "system_in": _place,
    "force_system": _flag,
    "trim": _flag,
    "thinking": _thinking,
    "stop_words": _texts,
    "special_tokens": _texts,
    "efficient_eos": _flag,
    "replace_eos": _flag,
}
