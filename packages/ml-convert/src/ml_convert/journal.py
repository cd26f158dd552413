"""The journal of a conversion that is under way: which files are done.

    manifest.partial.jsonl    {"plan": "<digest of what is converted to what>"}
                              {"file": "mp_rank_00/model_optim_rng.pt", "size": 1, "sha256": "..."}

A line is written when its file was synced, so whatever interrupts the conversion, the files of the
journal are whole, and those are all that a later conversion by the same plan need not do again.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from array import array
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from ml_convert.request import Request
from ml_convert.source import Source
from ml_convert.target import Target
from ml_models.commands import version_of
from ml_parallel import durable
from ml_parallel.manifest import FileEntry

JOURNAL = "manifest.partial.jsonl"
_NO_PART_OF_A_PLAN = ("dry_run", "overwrite", "resume", "verify", "verify_only", "workers")


def digest(request: Request, source: Source, target: Target) -> str:
    """Sum up a conversion: what is asked for, what is read, what is written."""
    flags = {
        item.name: repr(getattr(request, item.name))
        for item in fields(request)
        if item.name not in _NO_PART_OF_A_PLAN
    }
    read = {}
    paths = {extent.path for extent in source.checkpoint.extents}
    if source.merged is not None:
        paths |= {extent.path for extent in source.merged.checkpoint.extents}
    for path in sorted(paths):
        if path.is_file():
            status = path.stat()
            read[str(path.resolve())] = (status.st_size, status.st_mtime_ns)
    content = [version_of("ml-convert"), flags, read, repr(source.arch)]
    found = hashlib.sha256(json.dumps(content).encode())
    for file in target.files:
        found.update(json.dumps([file.name, file.content.size, len(file.tensors)]).encode())
        found.update(array("q", file.content.offsets))
        found.update(array("q", file.tensors))
    return found.hexdigest()


class Journal:
    """The journal of one directory, open for writing."""

    def __init__(self, directory: Path, plan: str) -> None:
        """Go on with the journal of a directory, or begin it."""
        self._directory, self._path = directory, directory / JOURNAL
        self._lock = threading.Lock()
        self.done = read(directory, plan) or {}
        """Files that are done, by their path within the directory."""
        lines = [{"plan": plan}, *(_line(name, entry) for name, entry in self.done.items())]
        durable.write(self._path, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def add(self, entry: FileEntry) -> None:
        """Note that a file is done."""
        name = entry.path.relative_to(self._directory).as_posix()
        with self._lock:
            self.done[name] = entry
            self._append(_line(name, entry))

    def _append(self, content: Mapping[str, object]) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(self._path, flags, 0o666)
        try:
            with durable.naming(self._path):
                line = _end_of_torn_line(descriptor) + json.dumps(content).encode() + b"\n"
                while line:
                    line = line[os.write(descriptor, line) :]
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _end_of_torn_line(descriptor: int) -> bytes:
    """Return what keeps the next line apart from one that a full disk has cut off."""
    last = max(os.fstat(descriptor).st_size - 1, 0)
    return b"" if os.pread(descriptor, 1, last) == b"\n" else b"\n"


def _line(name: str, entry: FileEntry) -> dict[str, object]:
    return {"file": name, "size": entry.size, "sha256": entry.sha256}


def read(directory: Path, plan: str) -> dict[str, FileEntry] | None:
    """List the files of an unfinished directory that are whole; None if it is of another plan."""
    try:
        first, *lines = (directory / JOURNAL).read_text().splitlines()
        if json.loads(first) != {"plan": plan}:
            return None
    except (OSError, ValueError):
        return None
    found = {}
    for line in lines:
        try:
            entry = json.loads(line)
            path = directory / entry["file"]
            whole = path.stat().st_size == entry["size"]
        except (OSError, ValueError, TypeError, KeyError):  # a line may be torn
            continue
        if whole:
            found[entry["file"]] = FileEntry(path=path, size=entry["size"], sha256=entry["sha256"])
    return found
