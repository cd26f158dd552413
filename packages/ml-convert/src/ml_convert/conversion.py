"""One conversion from start to end: open, design, prove, copy, compare, name the result."""

from __future__ import annotations

import errno
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_convert import companions, execute, megatron, output, verify
from ml_convert.checksum import Piece, crc_of_pieces
from ml_convert.errors import ConversionError, VerificationError
from ml_convert.files import Files, for_each
from ml_convert.input import open_result, open_source, skeleton
from ml_convert.plan import Checkpoint, Plan, plan
from ml_convert.request import Request
from ml_convert.source import Source
from ml_convert.target import Target, design, family_of
from ml_models.commands import version_of
from ml_models.weights import parameters
from ml_parallel.checkpoint import CheckpointError, FileEntry, record
from ml_parallel.checkpoint import verify as check_files

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the bytes that were just done, and the bytes of all of it."""


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of the result."""

    name: str
    """Path within the result."""
    size: int
    """Bytes."""
    tensors: int
    """Number of tensors."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a conversion did, or would do."""

    source: Path
    """The checkpoint that was read."""
    path: Path
    """The checkpoint that was written."""
    files: tuple[File, ...]
    """Its files with tensors."""
    parameters: int
    """Number of the model's parameters, each counted once."""
    padding: int
    """Bytes of padding in the result."""
    verified: bool
    """Whether the result was compared with the source."""
    seconds: float
    """How long it took."""


def convert(request: Request, *, progress: Progress | None = None) -> Report:
    """Do what a request asks for.

    Args:
        request: What to convert.
        progress: Called from several threads while the work goes on.

    Raises:
        ConversionError: The request or a file is wrong; nothing was written.
        VerificationError: With `verify`, the result is not what it should be; it was removed.
        OSError: The disk is full, or similar; nothing was left behind.
    """
    started = time.monotonic()
    source = open_source(request)
    if request.verify_only:
        result = _earlier_result(request)
        _compare(request, source, result, progress)
        _check_manifest(result.path)
        return _report(source, result.checkpoint, result.path, started, verified=True)
    target = design(request, source)
    proven = plan(source.arch, source.checkpoint, target.checkpoint(request.save_dir))
    _check_destination(request, target)
    if request.dry_run:
        return _report(source, proven.target, request.save_dir, started, sizes=target.sizes)
    path = _write(request, source, target, progress)
    final = target.checkpoint(path)
    return _report(source, final, path, started, verified=request.verify)


# Writing


def _check_destination(request: Request, target: Target) -> None:
    """Check that there is room for the result, and that nothing is in its place."""
    save_dir, load_dir = request.save_dir.resolve(), request.load_dir.resolve()
    if save_dir == load_dir or load_dir in save_dir.parents or save_dir in load_dir.parents:
        raise ConversionError(f"--save-dir {request.save_dir}: lies in --load-dir, or around it")
    output.check_writable(save_dir, save_format=request.save_format, overwrite=request.overwrite)
    existing = next(path for path in (save_dir, *save_dir.parents) if path.exists())
    free, needed = shutil.disk_usage(existing).free, sum(target.sizes.values())
    if free < needed:
        reason = f"{needed:,} bytes are needed, {free:,} are free"
        raise OSError(errno.ENOSPC, reason, str(request.save_dir))


def _write(request: Request, source: Source, target: Target, progress: Progress | None) -> Path:
    """Write the checkpoint; returns its final directory."""
    with output.writing(request.save_dir, save_format=request.save_format) as (root, commit):
        _copy(request, source, target, root, progress)
        if request.save_format == "hf":
            _write_companions(request, source, target, root)
        if request.verify:
            _compare(request, source, open_result(request, root), progress)
        paths = [path for path in root.rglob("*") if path.is_file()]
        return commit(_recorded(paths, request, progress), _metadata(request, source))


def _copy(
    request: Request, source: Source, target: Target, root: Path, progress: Progress | None
) -> None:
    work = plan(source.arch, source.checkpoint, target.checkpoint(root))
    with Files() as files:
        for file in target.files:
            files.create(root / file.name, file.content.size)
        pieces = execute.copy(
            work,
            files,
            workers=_workers(request),
            advance=_advance(progress, "converting", work.nbytes),
            checksums=target.has_checksums,
        )
        for file in target.files:
            checksums = [_checksum(work, index, pieces[index]) for index in file.tensors]
            file.content.finish(files.descriptor(root / file.name), checksums)


def _checksum(work: Plan, index: int, pieces: list[Piece]) -> int:
    """Return the CRC-32 of a written tensor, after checking that all of it was written."""
    extent, stored = work.target.extents[index], work.target.layout.tensors[index]
    written = sum(piece.length for piece in pieces)
    if written != extent.nbytes - stored.padding * extent.row_bytes:
        raise AssertionError(f"{stored.name}: only {written} bytes of {extent.nbytes} were written")
    return crc_of_pieces(pieces, extent.nbytes)


def _write_companions(request: Request, source: Source, target: Target, root: Path) -> None:
    """Write what goes with exported weights."""
    origin = request.hf_config or (source.path if source.config else None)
    companions.write_config(
        root,
        family_of(source),
        source.arch,
        dtype=target.dtypes[0],
        skeleton=skeleton(request) or source.config,
        tokenizer=origin,
    )
    companions.write_index(root, target.checkpoint(root))
    if origin is not None:
        companions.copy_tokenizer(origin, root)


def _recorded(paths: list[Path], request: Request, progress: Progress | None) -> list[FileEntry]:
    """Sync all files and list them with size and sha256."""
    advance = _advance(progress, "hashing", sum(path.stat().st_size for path in paths))
    entries: list[FileEntry] = []

    def record_file(path: Path) -> None:
        entry = record(path)
        entries.append(entry)
        advance(entry.size)

    for_each(paths, record_file, workers=_workers(request))
    return entries


def _metadata(request: Request, source: Source) -> dict[str, Any]:
    return {
        "version": version_of(output.TOOL),
        "source": str(source.path.resolve()),
        "format": request.save_format,
        "family": source.family.name if source.family else None,
        "tensor_model_parallel_size": request.target_tensor_parallel_size,
        "pipeline_model_parallel_size": request.target_pipeline_parallel_size,
        "verified": request.verify,
    }


# Comparing


def _earlier_result(request: Request) -> Source:
    """Open what an earlier conversion wrote to `--save-dir`."""
    if not request.save_dir.is_dir():
        raise ConversionError(f"--save-dir {request.save_dir}: no such directory")
    directory = request.save_dir
    if request.save_format == "mcore":
        directory = megatron.checkpoint_directory(directory, None)
    return open_result(request, directory)


def _compare(request: Request, source: Source, result: Source, progress: Progress | None) -> None:
    """Compare two opened checkpoints."""
    verify.check_description(source, result)
    work = plan(source.arch, source.checkpoint, result.checkpoint)
    verify.check_dtypes(work, request.dtype)
    advance = _advance(progress, "verifying", work.nbytes)
    with Files() as files:
        verify.check_content(work, files, workers=_workers(request), advance=advance)


def _check_manifest(directory: Path) -> None:
    try:
        check_files(directory)
    except CheckpointError as error:
        raise VerificationError(str(error)) from None


# Small parts


def _workers(request: Request) -> int:
    if request.workers:
        return request.workers
    # macOS does not tell which cores a process may use
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(8, cores or 1)


def _advance(progress: Progress | None, what: str, total: int) -> execute.Advance:
    if progress is None:
        return lambda _nbytes: None
    return lambda nbytes: progress(what, nbytes, total)


def _report(
    source: Source,
    target: Checkpoint,
    path: Path,
    started: float,
    *,
    verified: bool = False,
    sizes: Mapping[str, int] | None = None,
) -> Report:
    """Summarize; without `sizes` the files exist."""
    counts = Counter(stored.file for stored in target.layout.tensors)
    pairs = list(zip(target.layout.tensors, target.extents, strict=True))
    files = (
        File(name=name, size=sizes[name] if sizes else (path / name).stat().st_size, tensors=count)
        for name, count in counts.items()
    )
    return Report(
        source=source.path,
        path=path,
        files=tuple(files),
        parameters=sum(math.prod(parameter.shape) for parameter in parameters(source.arch)),
        padding=sum(stored.padding * extent.row_bytes for stored, extent in pairs),
        verified=verified,
        seconds=time.monotonic() - started,
    )
