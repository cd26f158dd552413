"""One conversion from start to end: open, design, prove, copy, compare, name the result."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from ml_convert import companions, execute, journal, logits, megatron, output, roundtrip, verify
from ml_convert.description import entries
from ml_convert.errors import ConversionError, VerificationError
from ml_convert.files import Files
from ml_convert.input import open_result, open_source, skeleton
from ml_convert.journal import JOURNAL
from ml_convert.output import Draft
from ml_convert.plan import Plan, plan
from ml_convert.report import Report, summary
from ml_convert.request import Request
from ml_convert.sealing import Sealer
from ml_convert.source import Source
from ml_convert.target import Target, design, family_of
from ml_models.commands import version_of
from ml_models.weights import Parameter
from ml_parallel.checkpoint import CheckpointError, FileEntry, record
from ml_parallel.checkpoint import verify as check_files

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the bytes that were just done, and the bytes of all of it."""


def convert(request: Request, *, progress: Progress | None = None) -> Report:
    """Do what a request asks for.

    Args:
        request: What to convert.
        progress: Called from several threads while the work goes on.

    Raises:
        ConversionError: The request or a file is wrong, or something else has got the name of the
            result meanwhile; nothing was written.
        VerificationError: With `verify`, the result is not what it should be; it was removed.
        OSError: The disk is full, or similar; nothing was left behind.
    """
    started = time.monotonic()
    source = open_source(request)
    if request.verify_only:
        report = _verify_only(request, source, progress)
    else:
        report = _convert(request, source, progress)
    return replace(report, seconds=time.monotonic() - started)


def _convert(request: Request, source: Source, progress: Progress | None) -> Report:
    target = design(request, source)
    proven = plan(source.arch, source.checkpoint, target.checkpoint(request.save_dir), source.table)
    if request.verify == "roundtrip":
        roundtrip.check_possible(source.checkpoint, proven.target)
    if request.verify == "logits":
        logits.check_possible(request, source)
    free = _check_destination(request, target)
    if request.dry_run:
        found = summary(source, proven.target, request.save_dir, sizes=target.sizes)
        return replace(found, plan=tuple(entries(proven)), free=free)
    table = proven.table
    del proven  # it holds what is needed for each tensor, and is needed no more
    done = _write(request, source, target, table, progress)
    found = summary(source, target.checkpoint(done.path), done.path)
    return replace(
        found,
        verified=request.compares_bits,
        rounded=done.rounded,
        logits=done.logits,
        resumed=done.resumed,
    )


def _verify_only(request: Request, source: Source, progress: Progress | None) -> Report:
    result = _earlier_result(request, source)
    _compare(request, source, result, progress)
    _check_manifest(result.path)
    return replace(summary(source, result.checkpoint, result.path), verified=True)


# Writing


def _check_destination(request: Request, target: Target) -> int:
    """Check that there is room for the result, and that nothing is in its place.

    Returns:
        Bytes that are free.
    """
    save_dir = request.save_dir.resolve()
    for flag, path in (("--load-dir", request.load_dir), ("--lora-load", request.lora_load)):
        read = path and path.resolve()
        if read and (save_dir == read or read in save_dir.parents or save_dir in read.parents):
            raise ConversionError(f"--save-dir {request.save_dir}: lies in {flag}, or around it")
    output.check_writable(save_dir, save_format=request.save_format, overwrite=request.overwrite)
    existing = next(path for path in (save_dir, *save_dir.parents) if path.exists())
    free, needed = shutil.disk_usage(existing).free, sum(target.sizes.values())
    free += output.reclaimed(save_dir, save_format=request.save_format)
    if free < needed:
        reason = f"{needed:,} bytes are needed, {free:,} are free"
        raise OSError(errno.ENOSPC, reason, str(request.save_dir))
    return free


class _Done(NamedTuple):
    path: Path
    """The final directory."""
    rounded: int
    """How many elements another dtype has changed."""
    logits: str
    """What comparing them has found."""
    resumed: int
    """How many files an interrupted attempt had done."""


def _write(
    request: Request,
    source: Source,
    target: Target,
    table: tuple[Parameter, ...],
    progress: Progress | None,
) -> _Done:
    """Write the checkpoint, which is proven to hold the parameters of this table."""
    plan_digest = journal.digest(request, source, target)
    save_dir = request.save_dir.resolve() if request.save_dir.is_symlink() else request.save_dir
    with output.writing(
        save_dir,
        save_format=request.save_format,
        plan=plan_digest,
        overwrite=request.overwrite,
        resume=request.resume,
    ) as draft:
        resumed = len(draft.journal.done)
        # What was proven, in another directory.
        work = Plan(table=table, source=source.checkpoint, target=target.checkpoint(draft.root))
        rounded = _copy(request, work, target, draft, progress)
        if request.save_format == "hf" and source.adapter is None:
            _write_companions(request, source, target, draft.root)
        if target.beside is not None:
            target.beside.write(draft.root)
        said = _check(request, source, draft.root, progress)
        others = [path for path in draft.root.rglob("*") if path.is_file()]
        written = {entry.path for entry in draft.journal.done.values()}
        others = [path for path in others if path not in written and path.name != JOURNAL]
        entries = [*draft.journal.done.values(), *map(record, others)]
        metadata = {**_metadata(request, source), "plan": plan_digest}
        return _Done(draft.commit(entries, metadata), rounded, said, resumed)


def _copy(
    request: Request, work: Plan, target: Target, draft: Draft, progress: Progress | None
) -> int:
    """Write all files with tensors that are not there yet; returns how many elements changed."""
    root, done = draft.root, draft.journal.done
    total = sum(file.content.size for file in target.files if file.name not in done)
    hashed = _advance(progress, "hashing", total)

    def sealed(entry: FileEntry) -> None:
        draft.journal.add(entry)
        hashed(entry.size)

    with Files() as files, Sealer(work, target, root, files, sealed=sealed) as seal:
        for file in target.files:
            if file.name not in done:
                seal.create(file.name)
        copied = execute.copy(
            work,
            files,
            workers=_workers(request),
            advance=_advance(progress, "converting", work.nbytes),
            checksums=target.has_checksums,
            skip=frozenset(done),
            finished=seal,
            grown=seal.grown,
        )
    unfinished = [file.name for file in target.files if file.name not in done]
    if unfinished:
        raise AssertionError(f"{unfinished[0]} was not written to its end")
    return copied.rounded


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
        args=source.args,
    )
    companions.write_index(root, target.checkpoint(root))
    if origin is not None:
        companions.copy_tokenizer(origin, root)


def _metadata(request: Request, source: Source) -> dict[str, Any]:
    return {
        "version": version_of(output.TOOL),
        "source": str(source.path.resolve()),
        "format": request.save_format,
        "family": source.family.name if source.family else None,
        "lora": str(source.merged.path.resolve()) if source.merged else None,
        "tensor_model_parallel_size": request.target_tensor_parallel_size,
        "pipeline_model_parallel_size": request.target_pipeline_parallel_size,
        "verify": request.verify,
        "flags": {
            item.name: str(getattr(request, item.name))
            for item in fields(request)
            if getattr(request, item.name) != item.default
        },
    }


# Comparing


def _earlier_result(request: Request, source: Source) -> Source:
    """Open what an earlier conversion wrote to `--save-dir`."""
    if not request.save_dir.is_dir():
        raise ConversionError(f"--save-dir {request.save_dir}: no such directory")
    directory = request.save_dir
    if request.save_format in output.MEGATRON_FORMATS:
        directory = megatron.checkpoint_directory(directory, None)
    return open_result(request, directory, source)


def _check(request: Request, source: Source, root: Path, progress: Progress | None) -> str:
    """Check what was written, as thoroughly as is asked for; returns what logits say."""
    if request.verify == "none":
        return ""
    result = open_result(request, root, source)
    _compare(request, source, result, progress)
    if request.verify == "roundtrip":
        nbytes = sum(extent.nbytes for extent in result.checkpoint.extents)
        roundtrip.check(
            source.table,
            source.checkpoint,
            result.checkpoint,
            root / "roundtrip.partial",  # goes with all else if this is interrupted
            workers=_workers(request),
            advance=_advance(progress, "converting back", nbytes),
        )
    return logits.check(request, source, root) if request.verify == "logits" else ""


def _compare(request: Request, source: Source, result: Source, progress: Progress | None) -> None:
    """Compare two opened checkpoints."""
    verify.check_description(source, result)
    work = plan(source.arch, source.checkpoint, result.checkpoint, source.table)
    verify.check_dtypes(work, request.dtype)
    if not (request.compares_bits or request.verify_only):
        return
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
