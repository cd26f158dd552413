"""Finishing files while others are still copied: checksums, structure, sync and digest.

A file is sealed as soon as its last tensor is there, when its content is still in memory. One that
needs no checksums of its tensors has its structure from the start, and its digest grows with it: so
there is as much to do for several threads when there is one file only.
"""

from __future__ import annotations

import hashlib
import mmap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ml_convert import padding
from ml_convert.checksum import crc32, crc_of_pieces
from ml_convert.execute import Written
from ml_convert.files import Files
from ml_convert.plan import Plan
from ml_convert.target import Target
from ml_convert.tensor import Extent
from ml_parallel import durable
from ml_parallel.manifest import FileEntry

_BLOCK = 1 << 20
_WINDOW = 4 << 20  # bytes of a file that count as our memory


class Sealer:
    """Finishes the files of a conversion, from any thread; a context manager."""

    def __init__(
        self,
        plan: Plan,
        target: Target,
        root: Path,
        files: Files,
        *,
        sealed: Callable[[FileEntry], None],
    ) -> None:
        """Prepare.

        Args:
            plan: What is copied.
            target: The files.
            root: Directory they are in.
            files: The files, open.
            sealed: Called with each file that is done.
        """
        self._plan, self._root, self._files = plan, root, files
        self._new = {file.name: file for file in target.files}
        self._digests: dict[str, _Digest] = {}
        self._sealed = sealed
        self._syncing = ThreadPoolExecutor(1)

    def __enter__(self) -> Sealer:
        return self

    def __exit__(self, *_: object) -> None:
        self._syncing.shutdown()

    def create(self, name: str) -> None:
        """Create a file, with its structure if that does not depend on what is written."""
        new, path = self._new[name], self._root / name
        path.unlink(missing_ok=True)
        self._files.create(path, new.content.size)
        self._digests[name] = _Digest(self._files.descriptor(path))
        if not new.content.has_checksums:
            new.content.finish(self._files.descriptor(path), [])

    def grown(self, name: str, count: int) -> None:
        """Sum up the first bytes of a file, which are done; all of it may be by now."""
        digest = self._digests.get(name)  # another thread may have sealed the file meanwhile
        if digest is not None and not self._new[name].content.has_checksums:
            digest.advance(count)

    def __call__(self, name: str, written: dict[int, Written]) -> None:
        """Finish a file to which all tensors were written."""
        new, path = self._new[name], self._root / name
        padding.fill(self._plan, self._files, new.tensors)
        if new.content.has_checksums:
            checksums = [self._checksum(index, written.pop(index, None)) for index in new.tensors]
            new.content.finish(self._files.descriptor(path), checksums)
        synced = self._syncing.submit(durable.sync, path)  # the disk works while we sum up
        digest = self._digests.pop(name).finish(new.content.size)
        synced.result()
        self._sealed(FileEntry(path=path, size=new.content.size, sha256=digest))

    def _checksum(self, index: int, written: Written | None) -> int:
        """Return the CRC-32 of a written tensor."""
        written = written or Written()  # of a tensor without elements
        extent, stored = self._plan.target.extents[index], self._plan.target.layout.tensors[index]
        is_filled = stored.padding > 0 and self._plan.target.layout.repeats_last_row
        if written.is_scattered or is_filled:
            return _crc_of_extent(extent, self._files)
        length = sum(piece.length for piece in written.pieces)
        if length != extent.nbytes - stored.padding * extent.row_bytes:
            raise AssertionError(f"{stored.name}: only {length} bytes of {extent.nbytes} written")
        return crc_of_pieces(written.pieces, extent.nbytes)


class _Digest:
    """The sha256 of a file that grows. Its pages are looked at where they are, not copied."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._digest, self._place = descriptor, hashlib.sha256(), 0
        self._lock = threading.Lock()

    def advance(self, stop: int) -> None:
        """Go on to this byte, unless another thread goes on already."""
        if self._lock.acquire(blocking=False):
            try:
                self._add(stop)
            finally:
                self._lock.release()

    def finish(self, size: int) -> str:
        """Go on to the end; returns the digest."""
        with self._lock:
            self._add(size)
        return self._digest.hexdigest()

    def _add(self, stop: int) -> None:
        while self._place < stop:
            start = self._place // _WINDOW * _WINDOW
            end = min(start + _WINDOW, stop)
            with mmap.mmap(
                self._descriptor, end - start, access=mmap.ACCESS_READ, offset=start
            ) as window, memoryview(window)[self._place - start :] as part:  # fmt: skip
                self._digest.update(part)
            self._place = end


def _crc_of_extent(extent: Extent, files: Files) -> int:
    crc, block = 0, np.empty(_BLOCK, np.uint8)
    for offset in range(0, extent.nbytes, _BLOCK):
        part = block[: min(_BLOCK, extent.nbytes - offset)]
        files.read(extent.path, extent.offset + offset, part)
        crc = crc32(part.data, crc)
    return crc
