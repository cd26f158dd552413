"""Finishing files while others are still copied: checksums, structure, sync and digest.

A file is sealed as soon as its last tensor is there, when its content is still in memory.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ml_convert import padding
from ml_convert.checksum import crc_of_pieces
from ml_convert.execute import Written
from ml_convert.files import Files
from ml_convert.plan import Plan
from ml_convert.target import NewFile, Target
from ml_convert.tensor import Extent
from ml_parallel import durable
from ml_parallel.manifest import FileEntry, sha256

_BLOCK = 1 << 20


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
        self._sealed = sealed
        self._syncing = ThreadPoolExecutor(1)

    def __enter__(self) -> Sealer:
        return self

    def __exit__(self, *_: object) -> None:
        self._syncing.shutdown()

    def __call__(self, name: str, written: Sequence[Written]) -> None:
        """Finish a file to which all tensors were written."""
        new, path = self._new[name], self._root / name
        padding.fill(self._plan, self._files, new.tensors)
        checksums = [self._checksum(new, index, written[index]) for index in new.tensors]
        new.content.finish(self._files.descriptor(path), checksums)
        synced = self._syncing.submit(durable.sync, path)  # the disk works while we sum up
        digest = sha256(path)
        synced.result()
        self._sealed(FileEntry(path=path, size=new.content.size, sha256=digest))

    def _checksum(self, new: NewFile, index: int, written: Written) -> int:
        """Return the CRC-32 of a written tensor."""
        if not new.content.has_checksums:
            return 0
        extent, stored = self._plan.target.extents[index], self._plan.target.layout.tensors[index]
        is_filled = stored.padding > 0 and self._plan.target.layout.repeats_last_row
        if written.is_scattered or is_filled:
            return _crc_of_extent(extent, self._files)
        length = sum(piece.length for piece in written.pieces)
        if length != extent.nbytes - stored.padding * extent.row_bytes:
            raise AssertionError(f"{stored.name}: only {length} bytes of {extent.nbytes} written")
        return crc_of_pieces(written.pieces, extent.nbytes)


def _crc_of_extent(extent: Extent, files: Files) -> int:
    crc, block = 0, np.empty(_BLOCK, np.uint8)
    for offset in range(0, extent.nbytes, _BLOCK):
        part = block[: min(_BLOCK, extent.nbytes - offset)]
        files.read(extent.path, extent.offset + offset, part)
        crc = zlib.crc32(part.data, crc)
    return crc
