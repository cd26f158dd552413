"""File system steps that a kill, a full disk or a power cut cannot leave half done.

A name only ever points at content that was synced before, and moves to it in one step. What is not
complete has a temporary name, which says whose it is:

    iter_0000020.tmp-<host>-<pid>    being written, or left over by a dead writer
    iter_0000020.old-<host>-<pid>    replaced, and about to be removed
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_TEMPORARY = re.compile(r"(.+)\.(?:tmp|old)-(.+)-([0-9]{1,9})")
_UNTOUCHED_S = 3600.0  # a writer on another host cannot be asked whether it lives


# Writing


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let a failed write name the file it was meant for."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def sync(path: Path) -> None:
    """Make a file's content, or a directory's list of names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, content: bytes) -> None:
    """Replace a file's content: readers see the old one or the new one."""
    with prepared(path, content):
        pass


@contextlib.contextmanager
def prepared(path: Path, content: bytes) -> Iterator[None]:
    """Replace a file's content after the block. There is room for it before the block begins."""
    temporary = temporary_path(path)
    try:
        with naming(path):
            temporary.write_bytes(content)
        sync(temporary)
        yield
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def publish(directory: Path, final: Path) -> Path | None:
    """Give a directory its final name.

    Args:
        directory: What to rename; its content must have been synced.
        final: Its new name, in the same parent. What has that name now is replaced, in one step
            where system and file system can (Linux), else with an instant in which it is absent.

    Returns:
        Where the directory that was replaced now is, for the caller to delete.
    """
    replaced = None
    if not os.path.lexists(final):
        directory.rename(final)
    elif _exchange(directory, final):
        replaced = directory
    else:
        replaced = temporary_path(final, kind="old")
        final.rename(replaced)
        directory.rename(final)
    sync(final.parent)
    return replaced


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; return False where that is not possible."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0)


# Temporary names


class Temporary(NamedTuple):
    """What a temporary name says."""

    name: str
    """What is being written."""
    host: str
    """Where the writer runs."""
    pid: int
    """Which process it is."""

    @property
    def is_ours(self) -> bool:
        """Whether this process made the name."""
        return (self.host, self.pid) == (_host(), os.getpid())


def temporary_path(path: Path, *, kind: str = "tmp") -> Path:
    """Return a name beside `path` that no other process uses."""
    return path.with_name(f"{path.name}.{kind}-{_host()}-{os.getpid()}")


def temporary(path: Path) -> Temporary | None:
    """Read a temporary name; None for any other."""
    match = _TEMPORARY.fullmatch(path.name)
    return Temporary(match[1], match[2], int(match[3])) if match else None


def is_left_over(path: Path) -> bool:
    """Tell whether `path` is a temporary name whose writer is dead."""
    found = temporary(path)
    if found is None:
        return False
    if found.host != _host():
        return _last_touched(path) < time.time() - _UNTOUCHED_S
    return not _is_alive(found.pid)


def _host() -> str:
    return re.sub(r"[^\w.-]", "_", socket.gethostname()) or "localhost"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _last_touched(path: Path) -> float:
    try:
        return max(part.stat().st_mtime for part in (path, *path.rglob("*")))
    except FileNotFoundError:
        return time.time()  # somebody is at work there


# One writer at a time


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, which says who holds it; the lock ends with the process.

    Where the file system has no locks, nothing is held.

    Raises:
        BlockingIOError: Another process holds it; `strerror` says which.
        OSError: The file cannot be written.
    """
    descriptor = _open_locked(path)
    try:
        with naming(path):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {_host()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _open_locked(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(descriptor, 200).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise BlockingIOError(error.errno, f"{owner} holds it", str(path)) from None
        except OSError:
            return descriptor
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)  # its holder removed it just now: what we have locked has no name
