"""Commands: choose one by name, run it, turn what users can cause into a line and an exit code.

| what happens | exit code | shown |
|---|---|---|
| the command returns | its value, or 0 | |
| UsageError: wrong flag, value, file or checkpoint | 2 | `ml-train pretrain: message` |
| OSError: disk full, no permission, file gone | 1 | `ml-train pretrain: message` |
| Ctrl-C | 130 | |

Anything else is our bug and keeps its traceback. A command's module is imported only when chosen,
and this module imports next to nothing: a program that imports nothing else at its top cannot be
interrupted where nobody is there to catch it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import NamedTuple


class UsageError(ValueError):
    """A user's mistake: one line that names flag or file, the value, and what would be valid."""


class Command(NamedTuple):
    """One command of a program."""

    summary: str
    """What it does, for the program's `--help`."""
    run: str
    """`module:function`, a `function(argv: list[str], prog: str) -> int | None`: `argv` is what
    follows the command, `prog` the name to show in messages."""


def main(
    prog: str,
    description: str,
    commands: Mapping[str, Command],
    argv: Sequence[str] | None = None,
) -> int:
    """Run the command that `argv` (by default the process's) begins with; return the exit code."""
    return run_command(prog, lambda: _run(prog, description, commands, argv))


def _run(
    prog: str, description: str, commands: Mapping[str, Command], argv: Sequence[str] | None
) -> int:
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name == "--version":
        sys.stdout.write(f"{prog} {version_of(prog)}\n")
        return 0
    if name in ("", "-h", "--help"):
        output = sys.stdout if name else sys.stderr
        output.write(_overview(prog, description, commands))
        return 0 if name else 2
    if name not in commands:
        sys.stderr.write(f"{prog}: unknown command {name!r}{did_you_mean(name, commands)}\n")
        return 2
    full_name = f"{prog} {name}"
    return run_command(full_name, lambda: _load(commands[name].run)(rest, full_name))


def run_command(prog: str, run: Callable[[], int | None]) -> int:
    """Return the exit code of `run()`; report what a user can cause as in this module's table."""
    try:
        return run() or 0
    except UsageError as error:
        sys.stderr.write(f"{prog}: {error}\n")
        return 2
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        sys.stderr.write(f"{prog}: {reason or error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:  # --help and --version end here
        if not isinstance(stop.code, int):
            raise
        return stop.code


def version_of(prog: str) -> str:
    """Return the version of the distribution a program is named after."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(prog)
    except PackageNotFoundError:
        return "(not installed)"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean ...?` for the known word nearest to `word`, or nothing."""
    import difflib

    nearest = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _load(target: str) -> Callable[[list[str], str], int | None]:
    module, _, function = target.partition(":")
    loaded: Callable[[list[str], str], int | None] = getattr(import_module(module), function)
    return loaded


def _overview(prog: str, description: str, commands: Mapping[str, Command]) -> str:
    width = max(map(len, commands)) + 2
    rows = "".join(f"  {name:{width}}{command.summary}\n" for name, command in commands.items())
    return (
        f"usage: {prog} COMMAND [flags]\n\n{description}\n\ncommands:\n{rows}\n"
        f"`{prog} COMMAND --help` lists the flags of a command.\n"
    )
