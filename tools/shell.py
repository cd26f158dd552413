"""Running commands that are shown first, as a shell reads them, so that they can be copied."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console


class CommandError(RuntimeError):
    """A command failed."""


class Shell:
    """Runs commands, showing each one first."""

    def __init__(self, console: Console, log: Path) -> None:
        """Show commands on `console`, and keep them in the file `log`."""
        self._console = console
        self._log = log
        programs = Path(sys.executable).parent
        self._environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}

    def run(self, *command: str | Path, keep: Path | None = None) -> None:
        """Run a command to its end.

        Args:
            command: Its words.
            keep: File for a copy of its standard output, which is shown as it comes. Standard error
                is shown at the end then, as two streams read apart would get mixed up.

        Raises:
            CommandError: It failed.
        """
        if keep is None:
            with self.start(*command) as process:
                pass
        else:
            with tempfile.TemporaryFile() as errors, keep.open("wb") as copy:
                with self.start(*command, stdout=subprocess.PIPE, stderr=errors) as process:
                    _copy(process, copy, sys.stdout.buffer)
                errors.seek(0)
                sys.stderr.buffer.write(errors.read())
                sys.stderr.flush()
        self.check(process)

    def start(self, *command: str | Path, **streams: Any) -> subprocess.Popen[bytes]:
        """Show a command and start it, its streams as for `subprocess.Popen`."""
        words = [str(word) for word in command]
        line = wrap(words)
        with self._log.open("a", encoding="utf-8") as log:
            log.write(f"{line}\n\n")
        self._console.print(f"\n$ {line}", style="bold cyan", markup=False)
        return subprocess.Popen(words, env=self._environment, **streams)

    def check(self, process: subprocess.Popen[bytes]) -> None:
        """Raise CommandError unless a process that has ended succeeded."""
        if process.returncode:
            name = " ".join(map(str, process.args[:2]))  # type: ignore[index]
            raise CommandError(f"`{name} ...` failed with exit code {process.returncode}")


def _copy(process: subprocess.Popen[bytes], *targets: BinaryIO) -> None:
    """Copy what a process prints, as it comes."""
    assert process.stdout is not None, "it was started with a pipe"
    while part := os.read(process.stdout.fileno(), 4096):
        for target in targets:
            target.write(part)
            target.flush()


def wrap(words: Sequence[str], width: int = 96) -> str:
    """Return a command as a shell reads it, on lines of at most `width` where that is possible."""
    groups: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        is_value = before.startswith("--") and not word.startswith("--")
        if is_value:  # stays on the line of its flag
            groups[-1] += f" {shlex.quote(word)}"
        else:
            groups.append(shlex.quote(word))
    lines = [groups[0]]
    for group in groups[1:]:
        if len(lines[-1]) + len(group) + 1 <= width:
            lines[-1] += f" {group}"
        else:
            lines.append(f"    {group}")
    return " \\\n".join(lines)
