"""Files of the safetensors format, read and written without holding a tensor in memory.

    8 bytes    length of the header, little-endian
    header     JSON: name -> dtype, shape, [begin, end) relative to the end of the header
    data       the tensors, without gaps

As sizes are known before any data is, the header is fixed first; the data may then be written at
its place by anybody in any order.
"""

from __future__ import annotations

import json
import math
import os
import struct
from array import array
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ml_convert.errors import ConversionError
from ml_convert.tensor import DTYPES, Dtype, Extent

_LONGEST_HEADER = 100_000_000  # the limit of the safetensors library
_DTYPES = {dtype.safetensors: dtype for dtype in DTYPES.values()}


def read(path: Path) -> dict[str, Extent]:
    """Find the tensors of a file by name.

    Raises:
        ConversionError: The file is torn, or its header describes something that cannot be.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
            raise ConversionError(f"{path}: torn, or no safetensors file")
        text = file.read(length)
    try:
        decoder = json.JSONDecoder(object_pairs_hook=partial(_object, path, 8 + length))
        found = decoder.decode(text.decode())
        found.pop("__metadata__", None)
        for name, extent in found.items():
            if not isinstance(extent, Extent):
                raise ValueError(f"{name} is no tensor")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConversionError(f"{path}: its header is damaged ({error})") from None
    _check_spans(path, found, 8 + length, size)
    return found


def _object(path: Path, start: int, pairs: Sequence[tuple[str, Any]]) -> Extent | dict[str, Any]:
    """Read an object of the header: a tensor at once, as there are many."""
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name is there twice")
    if type(content.get("data_offsets")) is list:
        return _extent(path, start, content)
    return content


def _extent(path: Path, start: int, entry: Mapping[str, Any]) -> Extent:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"dtype {entry['dtype']} is not supported")
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError("shapes and offsets must be whole numbers from 0 up")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"shape {list(shape)} of {dtype.name} does not fill {end - begin} bytes")
    return Extent(path, start + begin, dtype, shape)


def _check_spans(path: Path, tensors: Mapping[str, Extent], start: int, size: int) -> None:
    """Check that tensors neither overlap nor leave gaps, and end where the file does."""
    end = start
    for name, extent in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if extent.offset != end:
            problem = "overlaps another tensor" if extent.offset < end else "follows a gap"
            raise ConversionError(f"{path}: its header is damaged ({name} {problem})")
        end += extent.nbytes
    if end != size:
        raise ConversionError(f"{path}: torn, {size} bytes instead of {end}")


class SafetensorsFile:
    """A safetensors file to be written: `size` and `offsets` first, then data and `finish`."""

    has_checksums = False

    def __init__(self, tensors: Mapping[str, tuple[Dtype, tuple[int, ...]]]) -> None:
        """Lay out a file with these tensors; those of larger items come first, to be aligned."""
        order = sorted(tensors, key=lambda name: -tensors[name][0].itemsize)
        text, begins, end = bytearray(b'{"__metadata__":{"format":"pt"}'), {}, 0
        for name in order:
            dtype, shape = tensors[name]
            begins[name], end = end, end + math.prod(shape) * dtype.itemsize
            place = [begins[name], end]
            entry = {"dtype": dtype.safetensors, "shape": shape, "data_offsets": place}
            text += f",{json.dumps(name)}:{json.dumps(entry, separators=(',', ':'))}".encode()
        text += b"}"
        text += b" " * (-len(text) % 8)
        self._start = struct.pack("<Q", len(text)) + text
        begin = len(self._start)
        self.offsets = array("q", (begin + begins[name] for name in tensors))
        """Where each tensor's data starts, in the order they were given."""
        self.size = begin + end
        """Size of the whole file."""

    def finish(self, descriptor: int, checksums: Sequence[int]) -> None:
        """Write the header; the format has no checksums."""
        del checksums
        view, offset = memoryview(self._start), 0
        while view:
            written = os.pwrite(descriptor, view, offset)
            view, offset = view[written:], offset + written
