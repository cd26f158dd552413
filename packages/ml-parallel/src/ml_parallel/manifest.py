"""The list of a checkpoint's files with sizes and digests, and checking a directory against it.

`manifest.json` also holds a digest of itself, so every byte of a checkpoint is covered.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ml_parallel import durable

MANIFEST = "manifest.json"
MODEL_FILE = "model_optim_rng.pt"

Iteration = int | Literal["release"]


class CheckpointError(ValueError):
    """A checkpoint is incomplete, damaged or used wrongly; the message names the file."""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file of a checkpoint, as it was when it was written."""

    path: Path
    """Where it is."""
    size: int
    """Bytes."""
    sha256: str
    """Hexadecimal digest of the content."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What was written down about a checkpoint."""

    iteration: Iteration
    """Step of the training it was taken after, or "release" for weights without training state."""
    files: tuple[FileEntry, ...]
    """Every file but the manifest itself."""
    metadata: Mapping[str, Any]
    """Topology, versions, and whatever else the writer passed, as JSON values."""


def record(path: Path) -> FileEntry:
    """Sync a file of the checkpoint that was just written, and describe it for the manifest."""
    durable.sync(path)
    return FileEntry(path=path, size=path.stat().st_size, sha256=sha256(path))


def write_manifest(
    directory: Path,
    iteration: Iteration,
    files: Iterable[FileEntry],
    metadata: Mapping[str, Any],
    *,
    scratch: Collection[str] = (),
) -> None:
    """Write `manifest.json` and sync the directory's names.

    Args:
        directory: Where the files are.
        iteration: What it is a checkpoint of.
        files: All files.
        metadata: What else to write down.
        scratch: Names of files that the caller will remove.

    Raises:
        CheckpointError: The files in the directory are not those recorded.
    """
    names = {_name(entry, directory): entry for entry in files}
    for entry in names.values():
        _check_size(entry)
    _check_recorded(directory, {*names, *scratch, MANIFEST})
    content = {
        "iteration": iteration,
        "files": {name: [names[name].size, names[name].sha256] for name in sorted(names)},
        "metadata": metadata,
    }
    content = json.loads(json.dumps(content))  # as the reader will see it, so that digests agree
    for folder in {folder for name in names for folder in Path(name).parents}:
        durable.sync(directory / folder)
    text = json.dumps({"sha256": _digest(content), **content}, indent=1) + "\n"
    durable.write(directory / MANIFEST, text.encode())


def read_manifest(directory: Path) -> Manifest | None:
    """Return the manifest of a checkpoint, or None if it has none.

    Raises:
        CheckpointError: It is torn or was changed.
    """
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        if content.pop("sha256") != _digest(content):
            raise ValueError("its content does not match its own sha256")
        files = tuple(
            FileEntry(path=directory / name, size=size, sha256=sha256)
            for name, (size, sha256) in content["files"].items()
        )
        return Manifest(iteration=content["iteration"], files=files, metadata=content["metadata"])
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def verify(directory: Path, *, hashes: bool = True, only: str | None = None) -> bool:
    """Check that a checkpoint is whole; return whether it has a manifest.

    A directory without one (written by Megatron-LM or a converter) can only be checked for model
    files that are there and not cut short.

    Args:
        directory: One iteration's directory.
        hashes: Read the files, rather than look at sizes only.
        only: Read those of this name only, such as `MODEL_FILE`.

    Raises:
        CheckpointError: A file is missing, torn or changed; the message names it.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} does not exist")
    manifest = read_manifest(directory)
    if manifest is None:
        _check_unlisted(directory)
        return False
    for entry in manifest.files:
        _check_size(entry)
    if hashes:
        _check_hashes([file for file in manifest.files if only in (None, file.path.name)])
    return True


def _check_size(entry: FileEntry) -> None:
    if not entry.path.is_file():
        raise CheckpointError(f"{entry.path} is missing")
    size = entry.path.stat().st_size
    if size != entry.size:
        raise CheckpointError(f"{entry.path} is torn: {size} bytes instead of {entry.size}")


def _check_hashes(files: Sequence[FileEntry]) -> None:
    with ThreadPoolExecutor(max_workers=8) as pool:  # hashing and reading release the GIL
        digests = pool.map(sha256, [entry.path for entry in files])
        for entry, digest in zip(files, digests, strict=True):
            if digest != entry.sha256:
                raise CheckpointError(
                    f"{entry.path} is damaged: its sha256 is not that in {MANIFEST}"
                )


def _check_unlisted(directory: Path) -> None:
    """Check what can be checked of a checkpoint without a manifest."""
    ranks = sorted(directory.glob("mp_rank_*"))
    if not ranks and not (directory / ".metadata").is_file():  # .metadata: torch_dist format
        raise CheckpointError(f"{directory} holds neither {MANIFEST} nor mp_rank_*/{MODEL_FILE}")
    for path in (rank / MODEL_FILE for rank in ranks):
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        with path.open("rb") as file:
            start = file.read(2)
        # torch.save writes zip files, and the directory of a zip file is its end.
        if not start or (start == b"PK" and not _is_zip(path)):
            raise CheckpointError(f"{path} is torn: it is cut short")


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # it can raise this, too
        return False


def _check_recorded(directory: Path, names: Collection[str]) -> None:
    for path in directory.rglob("*"):
        if path.is_file() and path.relative_to(directory).as_posix() not in names:
            raise CheckpointError(f"{path} was written but not recorded")


def _name(entry: FileEntry, directory: Path) -> str:
    try:
        return entry.path.relative_to(directory).as_posix()
    except ValueError:
        raise CheckpointError(f"{entry.path} is not a file of {directory}") from None


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Return the hexadecimal digest of a file's content."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()
