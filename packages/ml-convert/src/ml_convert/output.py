"""Writing a checkpoint whole or not at all: it gets its name when everything else is done.

Files are written under a temporary name beside the final one, synced, and listed in a manifest with
size and sha256. Whatever interrupts the work, nothing that looks like a checkpoint is left, and the
next run removes what is, or goes on with it.
"""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from ml_convert import journal
from ml_convert.errors import ConversionError, VerificationError
from ml_convert.journal import JOURNAL, Journal
from ml_parallel import checkpoint, durable
from ml_parallel.checkpoint import TRACKER, CheckpointError, FileEntry
from ml_parallel.manifest import MANIFEST, read_manifest, write_manifest

logger = logging.getLogger(__name__)

RELEASE: Literal["release"] = "release"
"""Megatron's name for weights without the state of a training."""
TOOL = "ml-convert"
MEGATRON_FORMATS = ("legacy", "mcore", "torch_dist")
"""Formats that are a directory of checkpoints, of which a converted one is the release."""


def check_writable(save_dir: Path, *, save_format: str, overwrite: bool) -> None:
    """Check that nothing of value would be lost or mixed up by writing to a directory.

    Raises:
        ConversionError: It is no directory, or not empty.
        NotADirectoryError: It would lie in a file.
    """
    existing = next(path for path in (save_dir, *save_dir.parents) if path.exists())
    if existing != save_dir:
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(existing))
        return
    if not save_dir.is_dir():
        raise ConversionError(f"--save-dir {save_dir}: is a file")
    content = [path.name for path in save_dir.iterdir() if not durable.temporary(path)]
    if not content:
        return
    foreign = _not_ours(save_dir, content, save_format)
    if foreign:
        raise ConversionError(f"--save-dir {save_dir}: is not empty (it holds {min(foreign)})")
    if not overwrite:
        raise ConversionError(
            f"--save-dir {save_dir}: holds an earlier output; replace it with --overwrite"
        )


def _not_ours(save_dir: Path, content: list[str], save_format: str) -> set[str]:
    """List what is in a directory besides one output of this tool in the same format."""
    directory = save_dir
    if save_format in MEGATRON_FORMATS:
        if not set(content) <= {RELEASE, TRACKER}:
            return set(content) - {RELEASE, TRACKER}
        directory = save_dir / RELEASE
    try:
        manifest = read_manifest(directory)
    except CheckpointError:
        return set(content)
    if manifest is None or manifest.metadata.get("tool") != TOOL:
        return set(content)
    ours = {MANIFEST, *(entry.path.relative_to(directory).as_posix() for entry in manifest.files)}
    files = (path for path in directory.rglob("*") if not path.is_dir())
    return {path.relative_to(directory).as_posix() for path in files} - ours


class Draft:
    """A checkpoint that is being written under a temporary name."""

    def __init__(
        self, root: Path, save_dir: Path, journal: Journal, *, save_format: str, overwrite: bool
    ) -> None:
        """Keep what is needed to name it in the end."""
        self.root = root
        """Where to write."""
        self.journal = journal
        """What is done."""
        self._save_dir, self._save_format, self._overwrite = save_dir, save_format, overwrite

    def commit(self, files: list[FileEntry], metadata: dict[str, Any]) -> Path:
        """Give the checkpoint its name.

        Args:
            files: All its files.
            metadata: What else to keep in the manifest.

        Raises:
            ConversionError: Something else has got its name while it was written.
        """
        check_writable(self._save_dir, save_format=self._save_format, overwrite=self._overwrite)
        metadata = {"tool": TOOL, **metadata}
        if self._save_format in MEGATRON_FORMATS:
            return checkpoint.commit(self.root, files, scratch=(JOURNAL,), **metadata)
        return _commit(self.root, self._save_dir, files, metadata)


@contextmanager
def writing(
    save_dir: Path, *, save_format: str, plan: str, overwrite: bool, resume: bool
) -> Iterator[Draft]:
    """Give a temporary directory to write to.

    If it was not committed by the end of the block, nothing is left; with `resume`, all is, unless
    it is wrong.

    Args:
        save_dir: What to write.
        save_format: Its format.
        plan: Digest of what is written; what is left of an interrupted attempt goes by it.
        overwrite: Replace an earlier output.
        resume: Go on with such an attempt if there is one.
    """
    is_new, is_megatron = not save_dir.exists(), save_format in MEGATRON_FORMATS
    final = save_dir / RELEASE if is_megatron else save_dir
    temporary = _interrupted(final, plan, resume=resume)
    if temporary is None:
        temporary = checkpoint.begin(save_dir, RELEASE) if is_megatron else _begin(save_dir)
    keep = resume
    try:
        going_on = Journal(temporary, plan)
        _keep_only(temporary, {*going_on.done, JOURNAL})
        yield Draft(temporary, save_dir, going_on, save_format=save_format, overwrite=overwrite)
        keep = False
    except VerificationError:
        keep = False
        raise
    finally:
        if not keep:
            shutil.rmtree(temporary, ignore_errors=True)
            if is_new:
                with suppress(OSError):  # it is not empty if the checkpoint is there
                    save_dir.rmdir()


def _interrupted(final: Path, plan: str, *, resume: bool) -> Path | None:
    """Take over what a dead writer left of the same plan; without `resume`, only report it."""
    for path in _left_over(final):
        done = journal.read(path, plan)
        if done is None:
            continue
        if not resume:
            logger.warning(
                "removing %s, left over by an interrupted conversion (%d files were done; "
                "--resume would go on with it)", path, len(done)
            )  # fmt: skip
            continue
        temporary = durable.temporary_path(final)
        path.rename(temporary)
        return temporary
    return None


def _keep_only(directory: Path, names: Collection[str]) -> None:
    """Remove all other files, such as what a kill left of one that was being replaced."""
    for path in directory.rglob("*"):
        if not path.is_dir() and path.relative_to(directory).as_posix() not in names:
            path.unlink()


def reclaimed(save_dir: Path, *, save_format: str) -> int:
    """Count the bytes on the disk that writing there frees, or goes on with."""
    final = save_dir / RELEASE if save_format in MEGATRON_FORMATS else save_dir
    found = (path for left_over in _left_over(final) for path in left_over.rglob("*"))
    return sum(path.lstat().st_blocks * 512 for path in found)


def _left_over(final: Path) -> list[Path]:
    """List what dead writers of a directory, or this process, have left beside it."""
    beside = final.parent.iterdir() if final.parent.is_dir() else ()
    return [
        path
        for path in sorted(beside)
        if (made := durable.temporary(path))
        and made.name == final.name
        and (made.is_ours or durable.is_left_over(path))
    ]


def _begin(save_dir: Path) -> Path:
    """Make a directory beside the final one; removes those of dead writers."""
    save_dir.parent.mkdir(parents=True, exist_ok=True)
    for path in _left_over(save_dir):
        shutil.rmtree(path, ignore_errors=True)
    temporary = durable.temporary_path(save_dir)
    temporary.mkdir()
    return temporary


def _commit(
    temporary: Path, save_dir: Path, files: list[FileEntry], metadata: dict[str, Any]
) -> Path:
    write_manifest(temporary, RELEASE, files, metadata, scratch=(JOURNAL,))
    (temporary / JOURNAL).unlink()
    replaced = durable.publish(temporary, save_dir)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)
    return save_dir
