"""Files that appear together, complete, or not at all.

They are written beside their final places under temporary names. `publish` syncs them to disk and
renames them in the order of their creation, after the old versions are gone, the last one first:
whoever finds the file that was created last (an `.idx`) finds all the others, of the same run.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NoReturn

from ml_models.flags import UsageError


class FileSet:
    """A context: what was created in it and not published is gone at its end."""

    def __init__(self) -> None:
        self._files: dict[Path, BinaryIO] = {}
        self._outdated: list[Path] = []

    def create(self, path: str | Path) -> BinaryIO:
        """Open a new file that `publish` will put at `path`.

        Raises:
            UsageError: another process is writing the same file, or its directory is none.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise UsageError(f"{path.parent}: not a directory") from error
        file = self._files[path] = _open_locked(_temporary(path))
        return file

    def remove(self, path: str | Path) -> None:
        """Let `publish` remove what an earlier run may have left at `path`."""
        self._outdated.append(Path(path))

    def publish(self) -> None:
        """Rename all files to their final names."""
        for path, file in self._files.items():
            with naming(path):
                file.flush()
                os.fsync(file.fileno())
        with _uninterrupted():
            for path in (*reversed(self._files), *self._outdated):
                path.unlink(missing_ok=True)
            for path in self._files:
                _temporary(path).replace(path)
            for directory in {path.parent for path in self._files}:
                _sync_directory(directory)
            self._close()

    def __enter__(self) -> FileSet:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for path in self._files:
            _temporary(path).unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):  # of a full disk: what was not flushed cannot be
                file.close()
        self._files = {}


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the program like `sys.exit`, so that contexts clean up behind it."""
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let a failed write name the file it was meant for."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _open_locked(path: Path) -> BinaryIO:
    """Open `path` empty, unless a live process writes it: its lock ends with the process."""
    while True:
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UsageError(f"another process is writing {path}") from None
        except OSError:  # a file system without locks
            pass
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            return file
        file.close()  # its owner published or discarded it just now: it is not ours to empty


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Put off SIGINT and SIGTERM to the end of the context.

    Blocking them in this thread is not enough: a library's thread would take them, and Python
    would then interrupt this one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is ever interrupted
        return
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _frame: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for late in received:
            signal.raise_signal(late)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
