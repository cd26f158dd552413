"""Directories that keep what takes time to build, whole or not at all.

The name of a directory is a hash of all its content depends on, so it is never stale. It is built
under a temporary name, and renamed when it is complete:

    PREFIX.cache/<key>/                       complete
    PREFIX.cache/<key>.tmp-<host>-<pid>/      being built, or left over by a dead process
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ml_models.flags import UsageError
from ml_parallel import durable


@dataclass(frozen=True)
class IndexCache:
    """One directory of the cache."""

    directory: Path
    """Where the files are found, or are to be written."""
    final: Path | None
    """What `publish` renames the directory to; None if it was complete."""

    def publish(self) -> None:
        """Give the directory its final name, if it was built; files open in it stay so."""
        if self.final is None:
            return
        for path in self.directory.iterdir():
            durable.sync(path)
        try:
            self.directory.rename(self.final)
        except OSError:
            if not self.final.is_dir():
                raise
            self.discard()  # another run was faster, with the same content
        durable.sync(self.final.parent)

    def discard(self) -> None:
        """Remove the directory if it was not published."""
        if self.final is not None:
            shutil.rmtree(self.directory, ignore_errors=True)

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """Say where a write failed; numpy and megatron-core do not."""
        try:
            yield
        except Exception as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError):
                raise
            raise OSError(
                f"cannot keep the order of the samples in {self.directory.parent} ({cause}): "
                "--data-cache-path names another directory"
            ) from error


def open_cache(root: Path, key: str) -> IndexCache:
    """Find the directory of `key`, or begin it; what dead processes left is removed.

    Raises:
        UsageError: The directory is missing, and cannot be created.
    """
    final = root / key
    if final.is_dir():
        return IndexCache(final, None)
    directory = durable.temporary_path(final)
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_left_overs(root)
        directory.mkdir()
    except OSError as error:
        raise UsageError(
            f"cannot keep the order of the samples in {root} ({error.strerror}): "
            "--data-cache-path names another directory"
        ) from error
    return IndexCache(directory, final)


def _remove_left_overs(root: Path) -> None:
    for path in root.iterdir():
        made = durable.temporary(path)
        if made and (made.is_ours or durable.is_left_over(path)):
            shutil.rmtree(path, ignore_errors=True)
