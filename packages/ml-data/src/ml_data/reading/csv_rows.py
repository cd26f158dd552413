"""CSV: the first row names the columns, quoted fields may hold line ends (RFC 4180).

Python's own reader finds where rows end, to cut as to parse. To cut, it reads bytes as Latin-1:
commas, quotes and line ends are the same there as in UTF-8.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ml_data.account import Problem
from ml_data.instruction.conversation import RecordError
from ml_data.reading.record import Chunk, Record
from ml_data.reading.streams import RECORD_BYTES, read_line
from ml_data.reading.text import decode, not_utf8
from ml_models.flags import UsageError


def cut_rows(
    path: Path, stream: BinaryIO, size: int
) -> Iterator[tuple[int, bytes, tuple[str, ...]]]:
    """Yield blocks of whole rows, of about `size` bytes, and the names of the columns.

    Raises:
        UsageError: The first row does not name the columns.
    """
    lines = _Lines(path, stream)
    rows = _rows(lines)
    header = next((row for row in rows if row.fields or row.wrong), None)
    if header is None:
        return
    columns = _columns(path, header)
    lines.cut()
    first = header.last + 1
    for row in rows:
        if lines.size >= size:
            yield first, lines.cut(), columns
            first = row.last + 1
    if lines.size:
        yield first, lines.cut(), columns


def parse_rows(chunk: Chunk) -> Iterator[Record | Problem]:
    """Yield the rows that are not blank."""
    # What is not UTF-8 is escaped, and is known by that in the row that has it.
    text = chunk.content.decode(errors="surrogateescape")
    for row in _rows(io.StringIO(text, newline="\n"), chunk.first):
        place = f"{chunk.path}:{row.first}"
        reason = row.wrong or _unusable(row.fields, chunk.columns)
        if reason:
            yield Problem(place, reason)
        elif row.fields:
            yield Record(place, dict(zip(chunk.columns, row.fields, strict=True)))


class _Row(NamedTuple):
    first: int
    """Its first line, from 1."""
    last: int
    fields: list[str]
    """None of a blank line."""
    wrong: str | None
    """Why it is not CSV."""


class _Lines:
    """The lines of a stream; those since the last cut are kept."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.size = 0
        self._path = path
        self._stream = stream
        self._kept: list[bytes] = []

    def __iter__(self) -> Iterator[str]:
        mark = codecs.BOM_UTF8
        while line := read_line(self._stream, self._path):
            line = line.removeprefix(mark)
            mark = b""
            self._kept.append(line)
            self.size += len(line)
            yield line.decode("latin-1")

    def cut(self) -> bytes:
        content = b"".join(self._kept)
        self._kept.clear()
        self.size = 0
        return content


def _rows(lines: Iterable[str], first: int = 1) -> Iterator[_Row]:
    reader = csv.reader(lines, strict=True)
    begin = first
    while True:
        fields: list[str] | None = []
        wrong = None
        try:
            fields = _next(reader)
        except csv.Error as error:
            wrong = str(error).split(" - ")[0]
        if fields is None:
            return
        last = first + reader.line_num - 1
        if wrong is not None:
            taken = f", in lines {begin} to {last}" if last > begin else ""
            wrong = f"not valid CSV ({wrong}{taken})"
        yield _Row(begin, last, fields, wrong)
        begin = last + 1


def _next(reader: Any) -> list[str] | None:
    """Return the next row; Python's limit of 128 KiB a field is for all of the process."""
    limit = csv.field_size_limit(RECORD_BYTES)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(limit)


def _columns(path: Path, header: _Row) -> tuple[str, ...]:
    place = f"{path}:{header.first}"
    if header.wrong:
        raise UsageError(f"{place}: {header.wrong}")
    try:
        columns = tuple(decode(field.encode("latin-1")) for field in header.fields)
    except RecordError as error:
        raise UsageError(f"{place}: {error}") from error
    twice = {column for column in columns if columns.count(column) > 1}
    if twice:
        raise UsageError(f"{place}: more than one column is called {min(twice)!r}")
    return columns


def _unusable(fields: list[str], columns: tuple[str, ...]) -> str | None:
    if fields and len(fields) != len(columns):
        return f"{len(fields)} fields, but the first row names {len(columns)} columns"
    for field in fields:
        if not field.isascii():
            try:
                field.encode()
            except UnicodeEncodeError as error:
                return not_utf8(ord(field[error.start]) - 0xDC00)
    return None
