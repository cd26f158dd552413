"""Writing a checkpoint whole or not at all: it gets its name when everything else is done.

Files are written under a temporary name beside the final one, synced, and listed in a manifest with
size and sha256. Whatever interrupts the work, nothing that looks like a checkpoint is left, and the
next run removes what is.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from ml_convert.errors import ConversionError
from ml_parallel import checkpoint, durable
from ml_parallel.checkpoint import TRACKER, CheckpointError, FileEntry
from ml_parallel.manifest import read_manifest, write_manifest

RELEASE: Literal["release"] = "release"
"""Megatron's name for weights without the state of a training."""
TOOL = "ml-convert"


def check_writable(save_dir: Path, *, save_format: str, overwrite: bool) -> None:
    """Check that nothing of value would be lost or mixed up by writing to a directory.

    Raises:
        ConversionError: It is no directory, or not empty.
    """
    if not save_dir.exists():
        return
    if not save_dir.is_dir():
        raise ConversionError(f"--save-dir {save_dir}: is a file")
    content = [path.name for path in save_dir.iterdir() if not durable.temporary(path)]
    if not content:
        return
    if not _is_ours(save_dir, content, save_format):
        raise ConversionError(f"--save-dir {save_dir}: is not empty (it holds {min(content)})")
    if not overwrite:
        raise ConversionError(
            f"--save-dir {save_dir}: holds an earlier output; replace it with --overwrite"
        )


def _is_ours(save_dir: Path, content: list[str], save_format: str) -> bool:
    """Tell whether a directory holds nothing but what this tool wrote in the same format."""
    directory = save_dir
    if save_format == "mcore":
        if not set(content) <= {RELEASE, TRACKER}:
            return False
        directory = save_dir / RELEASE
    try:
        manifest = read_manifest(directory)
    except CheckpointError:
        return False
    return manifest is not None and manifest.metadata.get("tool") == TOOL


Commit = Callable[[list[FileEntry], dict[str, Any]], Path]
"""Gives the checkpoint its name, from the list of files and what else to keep in the manifest."""


@contextmanager
def writing(save_dir: Path, *, save_format: str) -> Iterator[tuple[Path, Commit]]:
    """Give a temporary directory to write to, and the function that makes it the result.

    If that function was not called by the end of the block, nothing is left.
    """
    is_new = not save_dir.exists()
    temporary = checkpoint.begin(save_dir, RELEASE) if save_format == "mcore" else _begin(save_dir)

    def commit(files: list[FileEntry], metadata: dict[str, Any]) -> Path:
        metadata = {"tool": TOOL, **metadata}
        if save_format == "mcore":
            return checkpoint.commit(temporary, files, **metadata)
        return _commit(temporary, save_dir, files, metadata)

    try:
        yield temporary, commit
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_new:
            with suppress(OSError):  # it is not empty if the checkpoint is there
                save_dir.rmdir()


def _begin(save_dir: Path) -> Path:
    """Make a directory beside the final one; removes those of dead writers."""
    save_dir.parent.mkdir(parents=True, exist_ok=True)
    for path in save_dir.parent.iterdir():
        made = durable.temporary(path)
        if made and made.name == save_dir.name and (made.is_ours or durable.is_left_over(path)):
            shutil.rmtree(path, ignore_errors=True)
    temporary = durable.temporary_path(save_dir)
    temporary.mkdir()
    return temporary


def _commit(
    temporary: Path, save_dir: Path, files: list[FileEntry], metadata: dict[str, Any]
) -> Path:
    write_manifest(temporary, RELEASE, files, metadata)
    replaced = durable.publish(temporary, save_dir)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)
    return save_dir
