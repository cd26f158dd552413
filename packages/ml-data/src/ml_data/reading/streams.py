"""Files as streams of bytes, whatever they are compressed with."""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from ml_models.flags import UsageError

COMPRESSED = (".gz", ".zst")
"""Endings of names of compressed files."""

RECORD_BYTES = 256 << 20
"""The largest record (line, item, document) that is read: what is larger is a file of another
format, and would take the memory."""

_ZSTD_READ = 4 << 10
"""Little, because all that comes out of it is in memory at once; 1000 times as much at worst."""


@contextlib.contextmanager
def open_stream(path: Path, raw: BinaryIO) -> Iterator[BinaryIO]:
    """Give the uncompressed content of an open file.

    Raises:
        UsageError: It is not compressed as its name says, or not to its end.
    """
    try:
        yield _uncompressed(path, raw)
    except (EOFError, gzip.BadGzipFile, zlib.error, _ZstandardError) as error:
        kind = {".gz": "gzip", ".zst": "zstandard"}[path.suffix.lower()]
        raise UsageError(f"{path}: not a whole {kind} file ({error})") from error


def require(package: str, extra: str, path: Path) -> None:
    """Check that an optional package is there.

    Raises:
        UsageError: It is not.
    """
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"{path}: needs {package} (pip install 'ml-data[{extra}]')")


def read_line(stream: BinaryIO, path: Path) -> bytes:
    """Return the next line, with its end.

    Raises:
        UsageError: It is longer than any record.
    """
    line = stream.readline(RECORD_BYTES)
    if len(line) == RECORD_BYTES and not line.endswith(b"\n"):
        raise UsageError(f"{path}: a line of more than {RECORD_BYTES >> 20} MiB; not a text file?")
    return line


def _uncompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    if path.suffix.lower() in COMPRESSED and not path.stat().st_size:
        raise EOFError("it is empty")  # which the packages take for the end of a whole file
    if path.suffix.lower() == ".gz":
        return cast("BinaryIO", gzip.GzipFile(fileobj=raw))
    if path.suffix.lower() == ".zst":
        return cast("BinaryIO", io.BufferedReader(_Zstandard(raw), 1 << 16))
    return raw


class _ZstandardError(ValueError):
    """A file is not in the format of zstandard."""


class _Zstandard(io.RawIOBase):
    """A zstandard file of any number of frames.

    The package's own `stream_reader` takes a file that is cut off for one that ends.
    """

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw = raw
        # Files made with `zstd --long` need, and may have, a large window.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._error = zstandard.ZstdError
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output and self._more():
            pass
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size

    def _more(self) -> bool:
        """Decompress a little; return whether the file goes on."""
        data = self._input or self._raw.read(_ZSTD_READ)
        self._input = b""
        if not data:
            if self._frame is not None:
                raise _ZstandardError("it ends within a frame")
            return False
        self._frame = self._frame or self._decompressor.decompressobj()
        try:
            self._output = memoryview(self._frame.decompress(data))
        except self._error as error:
            raise _ZstandardError(str(error)) from error
        if self._frame.eof:
            self._input = self._frame.unused_data
            self._frame = None
        return True
