"""Flags: a frozen dataclass is the command line, its help, and the content of its config files.

The fields of a run's dataclass are plain values or smaller config dataclasses, each a group of
`--help` under the first line of its docstring. Every plain value is one flag, shaped by its type
and documented by the string below it:

    @dataclass(frozen=True, kw_only=True)
    class Schedule:
        '''Learning rate.'''

        lr: float
        '''Highest learning rate.'''
        decay: bool = field(default=True, metadata={"off": "--constant"})
        '''Let the rate decay.'''

| type | flag |
|---|---|
| `int`, `float`, `str`, `Path` | `--lr 1e-4`; a float is never nan, a path may begin with `~` |
| `bool` | `--decay`, `--no-decay`, and older negative names of metadata `off`: `--constant` |
| `Literal["a", "b"]` | one of them |
| `tuple[T, ...]` | `0 1 2`, `0,1,2`, `0, 1, 2`; a comma always separates |
| `tuple[Text, ...]` | `"a, b" c` or `--flag "a, b" --flag c`; a comma never separates |
| `T | None`, `T | U` | as T; what T refuses, as U |

Metadata `aliases` lists other names. A field without a default is required. A config that has a
method `check_given(names)` is told which fields were given: a default may have been meant.

A config file is flags written down: each entry goes through the parser of the command line, tables
only group, `_` is `-`, null leaves the default. Later files win over earlier ones, flags of the
command line over all.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import itertools
import sys
import textwrap
import typing
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from ml_models.commands import Command, UsageError, did_you_mean, main, run_command, version_of
from ml_models.config_file import entries
from ml_models.hints import Text, convert, metavar, show, without_none

__all__ = ["Command", "UsageError", "main", "parse", "run_command"]

T = TypeVar("T")


def parse(config_type: type[T], argv: Sequence[str], *, prog: str, description: str = "") -> T:
    """Read `argv`, and the config files it names, into a `config_type`.

    Raises:
        UsageError: a flag, a value or a config file is wrong, or a `__post_init__` says ValueError.
        SystemExit: after `--help` or `--version`.
    """
    flags = list(_flags(config_type))
    parser = _Parser(prog, description or _title(config_type), flags)
    given = parser.read(argv)
    values: dict[str, Any] = {}
    for path in given.pop("config", []):
        values |= _read_file(Path(path), parser)
    values |= given
    missing = [flag.option for flag in flags if flag.required and flag.name not in values]
    if missing:
        raise UsageError(f"missing {', '.join(missing)}")
    try:
        return typing.cast("T", _build(config_type, values))
    except ValueError as error:
        raise UsageError(str(error)) from error


# From dataclasses to flags and back.


@typing.runtime_checkable
class _ChecksGiven(typing.Protocol):
    def check_given(self, names: Collection[str]) -> None: ...


@dataclasses.dataclass(frozen=True)
class _Flag:
    field: dataclasses.Field[Any]
    hint: Any
    default: Any
    owner: type
    group: str | None

    @property
    def name(self) -> str:
        return self.field.name

    @property
    def option(self) -> str:
        return _option(self.name)

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def help(self) -> str:
        default = "required" if self.required else f"default: {show(self.default)}"
        doc = _docs(self.owner).get(self.name, "")
        text = doc if self.default is None else f"{doc} ({default})"
        return text.replace("%", "%%").strip()

    def other_names(self, kind: Literal["aliases", "off"]) -> list[str]:
        names = self.field.metadata.get(kind, ())
        return [names] if isinstance(names, str) else list(names)


def _flags(config_type: Any, instance: Any = None, group: str | None = None) -> Iterator[_Flag]:
    """Yield the flags of a config; their defaults are the values of `instance`, if given."""
    for field, hint, default in _fields(config_type, instance):
        if dataclasses.is_dataclass(hint):
            yield from _flags(hint, default, _title(hint))
        else:
            yield _Flag(field, without_none(hint), default, config_type, group)


def _build(config_type: Any, values: dict[str, Any], instance: Any = None) -> Any:
    """Make a config of `values` by field name, the others as in `_flags`."""
    made = config_type(
        **{
            field.name: _build(hint, values, default)
            if dataclasses.is_dataclass(hint)
            else values.get(field.name, default)
            for field, hint, default in _fields(config_type, instance)
        }
    )
    if isinstance(made, _ChecksGiven):
        made.check_given(values.keys())
    return made


def _fields(config_type: Any, instance: Any) -> Iterator[tuple[dataclasses.Field[Any], Any, Any]]:
    """Yield each field, its type, and its default (MISSING if none; None for a config)."""
    hints = typing.get_type_hints(config_type)
    for field in dataclasses.fields(config_type):
        default = field.default
        if instance is not None:
            default = getattr(instance, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if dataclasses.is_dataclass(hints[field.name]) and default is dataclasses.MISSING:
            default = None
        if field.init:
            yield field, hints[field.name], default


def _title(config_type: Any) -> str:
    """Return the docstring's first line; the class's name where dataclasses made one up."""
    lines = (config_type.__doc__ or "").strip().splitlines()
    made_up = not lines or lines[0].startswith(f"{config_type.__name__}(")
    return config_type.__name__ if made_up else lines[0].rstrip(".")


@functools.cache
def _docs(config_type: type) -> dict[str, str]:
    """Return the string below each field, read from the source of the class and its parents."""
    docs: dict[str, str] = {}
    for owner in filter(dataclasses.is_dataclass, reversed(config_type.__mro__)):
        try:
            source = textwrap.dedent(inspect.getsource(owner))
        except OSError:  # installed without source: flags stay undocumented
            continue
        body = typing.cast("ast.ClassDef", ast.parse(source).body[0]).body
        for field, below in itertools.pairwise(body):
            match field, below:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    docs[name] = " ".join(text.split())
    return docs


# The parser.


class _Parser(argparse.ArgumentParser):
    """argparse that knows no abbreviations, reports only what was given, and raises UsageError."""

    def __init__(self, prog: str, description: str, flags: Sequence[_Flag]) -> None:
        usage = f"{prog} [--config FILE] [flags]"
        super().__init__(
            prog, usage, description, allow_abbrev=False, argument_default=argparse.SUPPRESS
        )
        self.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
        files = "YAML file of flags; may be repeated; flags of the command line win"
        self.add_argument("--config", metavar="FILE", action="append", help=files)
        self.groups: dict[str | None, Any] = {None: self}
        self.described = [(self._add_flag(flag), flag) for flag in flags]
        self.actions = {
            name: action for action, _ in self.described for name in action.option_strings
        }

    def _add_flag(self, flag: _Flag) -> argparse.Action:
        if flag.group not in self.groups:
            self.groups[flag.group] = self.add_argument_group(flag.group)
        add = functools.partial(self.groups[flag.group].add_argument, dest=flag.name)
        names = [flag.option, *flag.other_names("aliases")]
        if flag.hint is bool:
            off = [_option("no_" + name.removeprefix("--")) for name in names]
            off += flag.other_names("off")
            return typing.cast("argparse.Action", add(*names, *off, action=_Switch, off=off))
        shown = metavar(flag.hint)
        return typing.cast(
            "argparse.Action", add(*names, action=_Value, hint=flag.hint, metavar=shown)
        )

    def format_help(self) -> str:
        """Return what `--help` shows. Only here are flags described: that reads their source."""
        for action, flag in self.described:
            action.help = flag.help
        return super().format_help()

    def read(self, words: Sequence[str]) -> dict[str, Any]:
        """Return what a command line gives, by field name."""
        namespace, unknown = self.parse_known_args(words, argparse.Namespace())
        if unknown and unknown[0].startswith("-"):
            self.unknown(unknown[0].partition("=")[0])
        if unknown:
            self.error(f"unexpected argument {unknown[0]!r}")
        return vars(namespace)

    def words(self, key: str, items: Sequence[str] | None) -> list[str]:
        """Return the command line that an entry of a config file stands for."""
        option = _option(key)
        action = self.actions.get(option) or self.unknown(option)
        if items is None:
            return []
        if isinstance(action, _Value) and action.hint == tuple[Text, ...]:
            return [f"{option}={item}" for item in items]
        text = ",".join(items)
        if not isinstance(action, _Switch):
            return [f"{option}={text}"]
        if text.lower() not in ("true", "false", "yes", "no", "on", "off"):
            self.error(f"{key}: {text!r} is neither true nor false")
        on = (text.lower() in ("true", "yes", "on")) == (option not in action.off)
        return [action.option_strings[0] if on else action.off[0]]

    def unknown(self, option: str) -> NoReturn:
        self.error(f"unknown flag {option}{did_you_mean(option, self.actions)}")

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))


class _Switch(argparse.Action):
    """True for the names of a field, False for its negative names `off`."""

    def __init__(self, option_strings: list[str], dest: str, off: list[str], **more: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **more)
        self.off = off

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        del parser, values
        setattr(namespace, self.dest, option not in self.off)


class _Value(argparse.Action):
    """The words after the flag, converted to the type of the field."""

    def __init__(self, option_strings: list[str], dest: str, hint: Any, **more: Any) -> None:
        nargs = "+" if typing.get_origin(hint) is tuple else None
        super().__init__(option_strings, dest, nargs=nargs, **more)
        self.hint = hint

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        try:
            value = convert(self.hint, values)
        except ValueError as error:
            parser.error(f"{option}: {error}")
        if self.hint == tuple[Text, ...]:
            value = (*getattr(namespace, self.dest, ()), *value)
        setattr(namespace, self.dest, value)


class _Version(argparse.Action):
    def __call__(self, parser: Any, *_: Any) -> None:
        program = parser.prog.split()[0]
        sys.stdout.write(f"{program} {version_of(program)}\n")
        parser.exit()


def _read_file(path: Path, parser: _Parser) -> dict[str, Any]:
    """Return what a config file gives, by field name."""
    values: dict[str, Any] = {}
    for where, key, items in entries(path, lambda key: _option(key) in parser.actions):
        try:
            given = parser.read(parser.words(key, items))
            if not values.keys().isdisjoint(given):
                raise UsageError(f"{key} is given twice in this file")
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from error
        values |= given
    return values


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
