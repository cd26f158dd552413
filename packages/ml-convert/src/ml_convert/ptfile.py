"""Files of `torch.save`, read and written without torch and without holding a tensor in memory.

Such a file is a zip archive whose members are stored uncompressed: a pickle with the structure, and
one member for each storage. Sizes are known before any data is, so all offsets are fixed first; the
data may then be written at its place by anybody in any order, and `finish` adds the zip structure
with the checksums of what was written.

    archive/data.pkl        the pickle
    archive/byteorder       "little"
    archive/data/0 ...      storages, aligned to 64 bytes so that they can be mapped into memory
    archive/version         "3"
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import struct
import zipfile
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from ml_convert import pickles
from ml_convert.errors import ConversionError
from ml_convert.pickles import TensorPickle
from ml_convert.tensor import Dtype, Extent

_ALIGNMENT = 64
_MAX_32 = 0xFFFFFFFF
_LONGEST_PICKLE = 1 << 30
_DAMAGED = (
    zipfile.BadZipFile,
    EOFError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    ValueError,
    struct.error,
)


# Reading


class _Span(NamedTuple):
    offset: int
    size: int


@dataclass(frozen=True)
class Saved:
    """What a file of `torch.save` holds."""

    path: Path
    """The file."""
    value: Any
    """What was saved, with a TensorPickle for each tensor and inert objects of unknown classes."""
    spans: Mapping[str, _Span]
    """Where the storages are, by key."""

    def extent(self, tensor: TensorPickle) -> Extent:
        """Find a tensor's bytes.

        Raises:
            ConversionError: They are not in the file.
        """
        start = tensor.offset * tensor.dtype.itemsize
        span = self.spans.get(tensor.storage)
        if span is None or start + tensor.numel * tensor.dtype.itemsize > span.size:
            raise ConversionError(f"{self.path}: storage {tensor.storage} is missing or cut short")
        return Extent(self.path, span.offset + start, tensor.dtype, tensor.shape)


def read(path: Path) -> Saved:
    """Read what was saved; executes nothing, loads no tensor.

    Raises:
        ConversionError: It is no such file, or damaged.
    """
    with path.open("rb") as file:
        return read_part(file, path, 0, os.fstat(file.fileno()).st_size)


def read_part(file: IO[bytes], path: Path, start: int, length: int) -> Saved:
    """Read what was saved to a part of a file; executes nothing, loads no tensor.

    Args:
        file: The file, open.
        path: Its path.
        start: Where the part begins.
        length: Its bytes.

    Raises:
        ConversionError: It is no such file, or damaged.
    """
    try:
        with zipfile.ZipFile(_Part(file, start, length)) as archive:
            members = _members(archive, path, length)
            content = archive.read(members["data.pkl"])
            spans = _storage_spans(file.fileno(), members, path, start, start + length)
    except ConversionError:
        raise
    except _DAMAGED as error:
        reason = f"{path}: torn, or no file of torch.save since 1.6 ({error})"
        raise ConversionError(reason) from None
    except OSError as error:
        if error.errno != errno.EINVAL:  # a place before the beginning
            raise
        raise ConversionError(f"{path}: torn, or no file of torch.save since 1.6") from None
    return Saved(path, pickles.load(content, str(path)), spans)


class _Part(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        super().__init__()
        self._descriptor, self._start, self._length, self._place = file.fileno(), start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise zipfile.BadZipFile("too short")
        self._place = base + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._length - self._place))
        found = os.preadv(self._descriptor, [view[:count]], self._start + self._place)
        self._place += found
        return found


def _members(archive: zipfile.ZipFile, path: Path, size: int) -> dict[str, zipfile.ZipInfo]:
    """List the members by name without the folder that all are in; `size` is that of the file."""
    members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if len(members) != len(archive.infolist()):
        raise ConversionError(f"{path}: two members have the same name")
    pickled = members.get("data.pkl")
    if pickled is None:
        raise ConversionError(f"{path}: no file of torch.save, it has no data.pkl")
    for info in (pickled, members.get("byteorder", pickled)):  # these are read at once
        stored = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size
        if not stored or info.file_size > min(size, _LONGEST_PICKLE):
            raise ConversionError(f"{path}: {info.filename} is compressed, or longer than its file")
    if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
        raise ConversionError(f"{path}: written by a big-endian machine, which is not supported")
    return members


def _storage_spans(
    descriptor: int, members: Mapping[str, zipfile.ZipInfo], path: Path, start: int, end: int
) -> dict[str, _Span]:
    spans = {}
    for name, info in members.items():
        if not name.startswith("data/"):
            continue
        header = os.pread(descriptor, 30, start + info.header_offset)
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        offset = start + info.header_offset + 30 + name_length + extra_length
        if info.compress_type != zipfile.ZIP_STORED or offset + info.file_size > end:
            raise ConversionError(f"{path}: storage {name} is compressed or cut short")
        spans[name.removeprefix("data/")] = _Span(offset, info.file_size)
    return spans


# Writing


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to be written, in its place in the structure."""

    dtype: Dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the content."""
        return TensorPickle(self.dtype, self.shape, "").numel * self.dtype.itemsize


class _Member(NamedTuple):
    name: bytes
    offset: int
    """Of its local header."""
    data_offset: int
    size: int
    content: bytes | None
    """None for a tensor, whose content others write."""


class PtFile:
    """A `torch.save` file to be written: `size` and `offsets` first, then data, then `finish`."""

    has_checksums = True

    def __init__(self, value: Any, *, archive: str) -> None:
        """Lay out the file.

        Args:
            value: What to save: plain values, with a NewTensor for each tensor.
            archive: Name of the folder in the zip archive; torch.save uses the file's stem.
        """
        self._archive = archive
        self._lengths = array("q")
        self._content = pickles.dump(_with_storages(value, self._lengths))
        self.offsets = array("q")
        """Where each tensor's data starts, in the order of the structure."""
        size = end = 0
        for member in self._members():
            if member.content is None:
                self.offsets.append(member.data_offset)
            size += len(_directory_entry(member, 0))
            end = member.data_offset + member.size
        self._end = end
        self.size = end + size + len(self._end_of_directory(size))
        """Size of the whole file."""

    def finish(self, descriptor: int, checksums: Sequence[int], *, start: int = 0) -> None:
        """Write everything but the tensors.

        Args:
            descriptor: The open file.
            checksums: CRC-32 of each tensor's data, in the order of `offsets`.
            start: Where in the file this one begins, if it is a part of it.
        """
        crcs, directory = iter(checksums), bytearray()
        for member in self._members():
            content = b"" if member.content is None else member.content
            crc = next(crcs) if member.content is None else zlib.crc32(content)
            _write_all(descriptor, _local_header(member, crc) + content, start + member.offset)
            directory += _directory_entry(member, crc)
        directory += self._end_of_directory(len(directory))
        _write_all(descriptor, directory, start + self._end)

    def _members(self) -> Iterator[_Member]:
        """List the members; there may be as many as the model has tensors."""
        end = 0
        for name, size, content in self._contents():
            encoded = f"{self._archive}/{name}".encode()
            fixed = end + 30 + len(encoded) + len(_zip64(size, size))
            pad = -(fixed + 4) % _ALIGNMENT  # in an extra field, whose own header takes 4 bytes
            yield _Member(encoded, end, fixed + 4 + pad, size, content)
            end = fixed + 4 + pad + size

    def _contents(self) -> Iterator[tuple[str, int, bytes | None]]:
        yield "data.pkl", len(self._content), self._content
        yield "byteorder", 6, b"little"
        for number, length in enumerate(self._lengths):
            yield f"data/{number}", length, None
        yield "version", 2, b"3\n"

    def _end_of_directory(self, size: int) -> bytes:
        """The records after the central directory, which point to it."""
        count, start = len(self._lengths) + 3, self._end
        end64 = struct.pack(
            "<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start
        )
        locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, start + size, 1)
        is_large = count >= 0xFFFF or max(size, start) >= _MAX_32
        end = struct.pack(
            "<4sHHHHIIH", b"PK\x05\x06", 0, 0, min(count, 0xFFFF), min(count, 0xFFFF),
            min(size, _MAX_32), min(start, _MAX_32), 0,
        )  # fmt: skip
        return (end64 + locator if is_large else b"") + end


def _with_storages(value: Any, lengths: array[int]) -> Any:
    """Copy a structure, giving each tensor a storage of its own, whose bytes are counted."""
    if isinstance(value, NewTensor):
        lengths.append(value.nbytes)
        return TensorPickle(value.dtype, value.shape, str(len(lengths) - 1))
    if isinstance(value, argparse.Namespace):
        return argparse.Namespace(**_with_storages(vars(value), lengths))
    if isinstance(value, dict):
        return {key: _with_storages(item, lengths) for key, item in value.items()}
    return value


def _zip64(*sizes: int) -> bytes:
    """The extra field with the sizes that do not fit 32 bits."""
    large = [size for size in sizes if size >= _MAX_32]
    return struct.pack(f"<HH{len(large)}Q", 1, 8 * len(large), *large) if large else b""


def _common_header(member: _Member, crc: int, large: bool) -> bytes:
    """The fields that local and central headers share: version, flags, method, time, crc, sizes."""
    size = min(member.size, _MAX_32)
    return struct.pack("<HHHHHIII", 45 if large else 20, 1 << 11, 0, 0, 33, crc, size, size)


def _local_header(member: _Member, crc: int) -> bytes:
    extra = _zip64(member.size, member.size)
    pad = member.data_offset - member.offset - 30 - len(member.name) - len(extra) - 4
    extra += struct.pack("<2sH", b"FB", pad) + b"Z" * pad
    lengths = struct.pack("<HH", len(member.name), len(extra))
    header = b"PK\x03\x04" + _common_header(member, crc, bool(_zip64(member.size)))
    return header + lengths + member.name + extra


def _directory_entry(member: _Member, crc: int) -> bytes:
    extra = _zip64(member.size, member.size, member.offset)
    header = b"PK\x01\x02" + struct.pack("<H", 45) + _common_header(member, crc, bool(extra))
    offset = min(member.offset, _MAX_32)
    rest = struct.pack("<HHHHHII", len(member.name), len(extra), 0, 0, 0, 0, offset)
    return header + rest + member.name + extra


def _write_all(descriptor: int, content: bytes | bytearray, offset: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
