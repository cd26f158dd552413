"""Copying a model from one checkpoint to another, band by band."""

from __future__ import annotations

import threading
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy as np

from ml_convert import regions
from ml_convert.casting import cast, rounded
from ml_convert.checksum import Piece, crc32
from ml_convert.errors import ConversionError
from ml_convert.files import Buffers, Files, for_each
from ml_convert.layout import Rectangle, Steps, steps
from ml_convert.plan import PARAMETERS_AT_ONCE, Band, Checkpoint, Overlap, Plan, overlapping
from ml_convert.regions import Region
from ml_convert.tensor import Dtype, Extent

_GROWTH = 32 << 20  # bytes: in much smaller steps, threads would get in each other's way
Advance = Callable[[int], None]
"""Called with the bytes of each band that is done."""


@dataclass
class Copied:
    """What a copy did."""

    written: dict[int, Written]
    """What was written of each stored tensor of the target, by its index."""
    rounded: int = 0
    """How many elements another dtype has changed."""


@dataclass(slots=True)
class Written:
    """What was written of a stored tensor."""

    pieces: list[Piece] = field(default_factory=list)
    """Runs of bytes with their checksums."""
    is_scattered: bool = False
    """Whether some was not written in runs."""

    def add(self, piece: Piece | None) -> None:
        """Note a run of bytes, or that something was written elsewhere."""
        if piece is None:
            self.is_scattered = True
        else:
            self.pieces.append(piece)


def copy(
    plan: Plan,
    files: Files,
    *,
    workers: int,
    advance: Advance,
    checksums: bool,
    skip: Collection[str] = (),
    finished: Callable[[str, dict[int, Written]], None] = lambda _file, _written: None,
    grown: Callable[[str, int], None] | None = None,
) -> Copied:
    """Copy all parameters into files that exist already.

    Args:
        plan: What to copy.
        files: The files, open.
        workers: Number of threads.
        advance: Called after each band.
        checksums: Whether to sum up what is written.
        skip: Files of the target that are whole already.
        finished: Called with each file of the target of which everything is written, and what
            was written of all stored tensors, while the other threads go on; it may drop those of
            the file.
        grown: Called with a file, and how many of its first bytes are done up to the last tensor
            of them, now and then.

    Raises:
        ConversionError: Copies in the source differ, or a number does not fit the target dtype.
    """
    written: defaultdict[int, Written] = defaultdict(Written)
    copied, lock = Copied(written), threading.Lock()
    buffers, wanted = Buffers(), _wanted(plan.target, skip)
    remaining = _Remaining(plan.target, wanted, _GROWTH if grown else None)

    def copy_band(band: Band) -> list[Callable[[], None]]:
        places = list(overlapping(wanted(band.parameter), band))
        if places:
            data = gather(plan.source, band, files, buffers)
            check_copies(plan.source, band, data, files, buffers)
            converted = converted_to(plan.target.dtypes[band.parameter], data, plan, band)
            if converted is not data:
                changed = rounded(data, converted, *_dtypes(plan, band))
                with lock:
                    copied.rounded += changed
            parts = scatter(plan.target, band, places, converted, files, buffers)
            for tensor, offset, part in parts:
                if checksums:
                    piece = None if part is None else Piece(offset, part.nbytes, crc32(part.data))
                    with lock:  # bands of one tensor may be on several threads
                        written[tensor].add(piece)
        advance(band.rows * band.columns * plan.source.dtypes[band.parameter].itemsize)
        complete, prefixes = remaining.without(places)
        jobs: list[Callable[[], None]] = [partial(finished, file, written) for file in complete]
        if grown is not None:
            jobs += (partial(grown, file, count) for file, count in prefixes)
        return jobs

    for_each(plan.bands(), copy_band, workers=workers)
    return copied


def _wanted(target: Checkpoint, skip: Collection[str]) -> Callable[[str], list[Rectangle]]:
    """Return what lists the rectangles of a parameter that are not in files to be skipped."""
    layout = target.layout

    @lru_cache(PARAMETERS_AT_ONCE)
    def wanted(parameter: str) -> list[Rectangle]:
        found = layout.rectangles[parameter]
        return [r for r in found if not skip or layout.tensors[r.tensor].file not in skip]

    return wanted


class _Remaining:
    """Counts the elements that each file still lacks, and those that each tensor lacks."""

    def __init__(
        self,
        target: Checkpoint,
        wanted: Callable[[str], Sequence[Rectangle]],
        growth: int | None = None,
    ) -> None:
        self._lock, self._target = threading.Lock(), target
        self._files = [stored.file for stored in target.layout.tensors]
        self._elements = array("q", bytes(8 * len(self._files)))
        self._tensors: Counter[str] = Counter()
        for parameter in target.layout.rectangles:
            for rectangle in wanted(parameter):
                if not self._elements[rectangle.tensor]:
                    self._tensors[self._files[rectangle.tensor]] += 1
                self._elements[rectangle.tensor] += rectangle.rows * rectangle.columns
        self._prefixes = {} if growth is None else self._unwritten(growth)

    def _unwritten(self, growth: int) -> dict[str, _Prefix]:
        found: dict[str, array[int]] = {}
        for index, file in enumerate(self._files):
            if file in self._tensors:
                found.setdefault(file, array("q")).append(index)
        return {file: _Prefix(self._target, held, growth) for file, held in found.items()}

    def without(self, places: Sequence[Overlap]) -> tuple[list[str], list[tuple[str, int]]]:
        """Take off what was written.

        Returns:
            The files that are complete now, and how far others are that have grown.
        """
        complete, prefixes = [], []
        with self._lock:
            for place in places:
                tensor = place.rectangle.tensor
                self._elements[tensor] -= place.rows * place.columns
                if self._elements[tensor]:
                    continue
                file = self._files[tensor]
                self._tensors[file] -= 1
                if not self._tensors[file]:
                    complete.append(file)
                elif file in self._prefixes:
                    count = self._prefixes[file].grown(self._elements)
                    prefixes += [(file, count)] if count else []
        return complete, prefixes


class _Prefix:
    """How far a file is done from its beginning."""

    def __init__(self, target: Checkpoint, tensors: Sequence[int], growth: int) -> None:
        self._extents, self._growth = target.extents, growth
        self._tensors = array("q", sorted(tensors, key=lambda index: target.extents[index].offset))
        self._done = self._told = 0

    def grown(self, elements: Sequence[int]) -> int:
        """Return how many bytes are done if that has grown enough, else 0."""
        tensors, done = self._tensors, self._done
        while done < len(tensors) and not elements[tensors[done]]:
            done += 1
        if done == self._done:
            return 0
        self._done = done
        last = self._extents[tensors[done - 1]]
        count = last.offset + last.nbytes
        if count - self._told < self._growth:
            return 0
        self._told = count
        return count


# Bands


def gather(
    checkpoint: Checkpoint, band: Band, files: Files, buffers: Buffers, *, buffer: str = "source"
) -> np.ndarray:
    """Read a band.

    Returns:
        Bytes of shape (rows, row bytes), valid until the thread's next call for this `buffer`.
    """
    itemsize = checkpoint.dtypes[band.parameter].itemsize
    data = buffers.take(buffer, band.rows, band.columns * itemsize)
    _read(checkpoint, band, checkpoint.primary(band.parameter), data, files, buffers)
    update = checkpoint.updates.get(band.parameter)
    if update is not None:
        update.apply(data, band, files)
    return data


def check_copies(
    checkpoint: Checkpoint, band: Band, data: np.ndarray, files: Files, buffers: Buffers
) -> None:
    """Check that stored tensors that repeat parts of a band repeat them.

    Raises:
        ConversionError: One differs.
    """
    copies = list(overlapping(checkpoint.copies(band.parameter), band))
    if copies and band.parameter in checkpoint.updates:
        data = buffers.take("raw", *data.shape)
        _read(checkpoint, band, checkpoint.primary(band.parameter), data, files, buffers)
    for copy_ in copies:
        rectangle = copy_.rectangle
        part = Band(band.parameter, copy_.row, copy_.rows, copy_.columns, copy_.column)
        itemsize = checkpoint.dtypes[band.parameter].itemsize
        found = buffers.take("copy", part.rows, part.columns * itemsize)
        _read(checkpoint, part, [rectangle], found, files, buffers)
        first = (part.column - band.column) * itemsize
        columns = slice(first, first + found.shape[1])
        if not np.array_equal(data[part.row - band.row :][: part.rows, columns], found):
            raise ConversionError(_differing_copies(checkpoint, rectangle.tensor))


def scatter(
    checkpoint: Checkpoint,
    band: Band,
    places: Iterable[Overlap],
    data: np.ndarray,
    files: Files,
    buffers: Buffers,
) -> Iterator[tuple[int, int, np.ndarray | None]]:
    """Write a band to these places, which hold parts of it.

    Yields:
        Stored tensor, offset in it in bytes, and what was written there, valid until the next one
        is asked for: None if it was not one run of bytes.
    """
    strided: dict[int, list[Region]] = {}
    for found in places:
        tensor = found.rectangle.tensor
        extent = checkpoint.extents[tensor]
        region = _region(extent, band, found, data)
        if not region.is_run:
            strided.setdefault(tensor, []).append(region)
            continue
        part = _joined(region.words, buffers)
        offset = region.steps.first * part.itemsize
        files.write(extent.path, extent.offset + offset, part)
        yield tensor, offset, part
    for tensor, parts in strided.items():
        regions.write(checkpoint.extents[tensor], parts, files)
        yield tensor, 0, None


def _joined(words: np.ndarray, buffers: Buffers) -> np.ndarray:
    """Return the same elements without gaps between the rows.

    In a buffer that is there already: the system clears new memory, which takes longer than this.
    """
    if words.flags.c_contiguous:
        return words
    joined = buffers.take("joined", words.shape[0], words.shape[1] * words.itemsize)
    joined = joined.view(words.dtype)
    joined[...] = words
    return joined


def converted_to(target: Dtype, data: np.ndarray, plan: Plan, band: Band) -> np.ndarray:
    """Return a band of the source in another dtype."""
    try:
        return cast(data, plan.source.dtypes[band.parameter], target)
    except ConversionError as error:
        raise ConversionError(f"{band.parameter}: {error}") from None


def _dtypes(plan: Plan, band: Band) -> tuple[Dtype, Dtype]:
    return plan.source.dtypes[band.parameter], plan.target.dtypes[band.parameter]


def _read(
    checkpoint: Checkpoint,
    band: Band,
    rectangles: Sequence[Rectangle],
    data: np.ndarray,
    files: Files,
    buffers: Buffers,
) -> None:
    """Fill the parts of a band that these rectangles hold."""
    strided: dict[int, list[Region]] = {}
    for found in overlapping(rectangles, band):
        extent = checkpoint.extents[found.rectangle.tensor]
        region = _region(extent, band, found, data)
        if not region.is_run:
            strided.setdefault(found.rectangle.tensor, []).append(region)
            continue
        offset = extent.offset + region.steps.first * extent.dtype.itemsize
        if region.words.flags.c_contiguous:
            files.read(extent.path, offset, region.words)
            continue
        scratch = buffers.take("scratch", found.rows, found.columns * extent.dtype.itemsize)
        files.read(extent.path, offset, scratch)
        region.words[...] = scratch.view(region.words.dtype)
    for tensor, parts in strided.items():
        regions.read(checkpoint.extents[tensor], parts, files)


def _region(extent: Extent, band: Band, found: Overlap, data: np.ndarray) -> Region:
    """Locate what a rectangle and a band have in common, in the band and in the file."""
    words = data.view(f"u{extent.dtype.itemsize}")
    row, column = found.row - band.row, found.column - band.column
    return Region(
        words[row : row + found.rows, column : column + found.columns],
        steps_from(found, extent.shape),
    )


def steps_from(found: Overlap, shape: Sequence[int]) -> Steps:
    """Tell where an overlap lies in its stored tensor of this shape."""
    r = found.rectangle
    first, row, column = steps(r, shape)
    first += (found.row - r.parameter_row) * row + (found.column - r.parameter_column) * column
    return Steps(first, row, column)


# Messages


def element(checkpoint: Checkpoint, parameter: str, row: int, column: int) -> str:
    """Name the stored element that is (row, column) of a parameter."""
    band = Band(parameter, row, 1, 1, column)
    (found,) = overlapping(checkpoint.primary(parameter), band)
    tensor = found.rectangle.tensor
    stored, extent = checkpoint.layout.tensors[tensor], checkpoint.extents[tensor]
    first = steps_from(found, extent.shape).first
    place = [int(index) for index in np.unravel_index(first, extent.shape)]
    return f"{extent.path}: {stored.name}{place}"


def _differing_copies(checkpoint: Checkpoint, index: int) -> str:
    copy_ = checkpoint.layout.tensors[index]
    assert copy_.copy_of is not None
    original = checkpoint.layout.tensors[copy_.copy_of]
    return (
        f"{checkpoint.extents[index].path}: {copy_.name} should repeat {original.name} of "
        f"{checkpoint.extents[copy_.copy_of].path}, but differs from it"
    )
