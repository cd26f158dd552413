"""File system steps that a kill, a full disk or a power cut cannot leave half done.

A name only ever points at content that was synced before, and moves to it in one step.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path


def sync(path: Path) -> None:
    """Make a file's content, or a directory's list of names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, content: bytes) -> None:
    """Replace a file's content: readers see the old one or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        sync(temporary)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def publish(directory: Path, final: Path, *, aside: Path) -> Path | None:
    """Give a directory its final name.

    Args:
        directory: What to rename; its content must have been synced.
        final: Its new name, in the same parent. What has that name now is replaced, in one step
            where system and file system can (Linux), else with an instant in which it is absent.
        aside: Name for what is replaced where that takes two steps.

    Returns:
        Where the directory that was replaced now is, for the caller to delete.
    """
    replaced = None
    if not os.path.lexists(final):
        directory.rename(final)
    elif _exchange(directory, final):
        replaced = directory
    else:
        final.rename(aside)
        directory.rename(final)
        replaced = aside
    sync(final.parent)
    return replaced


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; return False where that is not possible."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0)
