"""Plain text: a file is one document, or each of its lines is."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ml_data.account import Problem
from ml_data.instruction.conversation import RecordError
from ml_data.reading.record import Chunk, Record
from ml_data.reading.streams import RECORD_BYTES, read_line
from ml_models.flags import UsageError


def read_document(path: Path, stream: BinaryIO) -> bytes:
    """Return the whole file.

    Raises:
        UsageError: It is too large for one document.
    """
    content = stream.read(RECORD_BYTES + 1)
    if len(content) > RECORD_BYTES:
        raise UsageError(
            f"{path}: more than {RECORD_BYTES >> 20} MiB, too large for one document; "
            "read it with --document per-line"
        )
    return content


def cut_lines(path: Path, stream: BinaryIO, size: int, head: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield blocks of whole lines, of about `size` bytes; `head` has been read already."""
    first = 1
    while block := head or stream.read(size):
        head = b""
        if not block.endswith(b"\n"):
            block += read_line(stream, path)
        yield first, block
        first += block.count(b"\n")


def parse_document(chunk: Chunk) -> Iterator[Record | Problem]:
    """Yield the document."""
    content = chunk.content.removeprefix(codecs.BOM_UTF8)
    try:
        yield Record(chunk.path, {"text": content.decode()})
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield Problem(f"{chunk.path}:{line}", not_utf8(content[error.start]))


def parse_lines(chunk: Chunk) -> Iterator[Record | Problem]:
    """Yield the lines that are not blank."""
    for number, line in numbered_lines(chunk):
        place = f"{chunk.path}:{number}"
        try:
            yield Record(place, {"text": decode(line.removesuffix(b"\r"))})
        except RecordError as error:
            yield Problem(place, str(error))


def numbered_lines(chunk: Chunk) -> Iterator[tuple[int, bytes]]:
    """Yield number and bytes of the lines that are not blank."""
    content = chunk.content
    if chunk.first == 1:
        content = content.removeprefix(codecs.BOM_UTF8)
    for number, line in enumerate(content.split(b"\n"), chunk.first):
        if line and not line.isspace():
            yield number, line


def decode(content: bytes) -> str:
    """Return the text of UTF-8.

    Raises:
        RecordError: It is not UTF-8.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise RecordError(not_utf8(content[error.start])) from error


def not_utf8(byte: int) -> str:
    """Return the reason why text with this byte is not read."""
    return f"not valid UTF-8 (byte 0x{byte:02x}); convert the file to UTF-8"
