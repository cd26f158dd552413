"""A file to chunks, and a chunk to records, by the format that the file's name says."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

from ml_data.account import Problem
from ml_data.reading import csv_rows, json_text, tables, text
from ml_data.reading.record import Chunk, Form, Record
from ml_data.reading.streams import COMPRESSED, open_stream, require

CHUNK_BYTES = 1 << 20
"""About how much text a chunk holds: enough that sending it costs nothing, little enough that all
workers have one."""

TextDocument = Literal["per-file", "per-line"]
"""What is one document in a text file."""

_DATA = (".jsonl", ".json", ".csv")
_TEXT = (".txt", ".md", ".rst")
_TABLES = (".parquet", ".arrow")
_COMPRESSIBLE = (*_DATA, *_TEXT)
SUFFIXES = (*_COMPRESSIBLE, *_TABLES, *(s + packed for s in _COMPRESSIBLE for packed in COMPRESSED))
"""Endings of names of files that can be read."""

_FIRST_BYTES = 64 << 10
"""Of the first chunk, so that the first worker has something to do at once."""

_PARSERS: dict[Form, Callable[[Chunk], Iterator[Record | Problem]]] = {
    "text": text.parse_document,
    "lines": text.parse_lines,
    "json lines": json_text.parse_lines,
    "json items": json_text.parse_items,
    "csv": csv_rows.parse_rows,
    "arrow": tables.parse_rows,
    "problem": tables.parse_problem,
}


def read_chunks(
    path: Path, document: TextDocument = "per-file", *, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[Chunk]:
    """Cut a file into chunks of whole records, reading it as they are asked for.

    Raises:
        UsageError: It is not in the format its name says.
    """
    require_packages(path)
    if path.name.lower().endswith(_TABLES):
        yield from tables.cut_tables(path, chunk_bytes)
        return
    with path.open("rb") as raw, open_stream(path, raw) as stream:
        position = 0
        for form, first, content, columns in _cut(path, stream, document, chunk_bytes):
            yield Chunk(str(path), form, first, content, raw.tell() - position, columns)
            position = raw.tell()


def records(chunk: Chunk) -> Iterator[Record | Problem]:
    """Yield the records of a chunk, and in their places those that cannot be used."""
    return _PARSERS[chunk.form](chunk)


def is_plain_text(path: Path) -> bool:
    """Whether a file is text without structure."""
    return _content_name(path).endswith(_TEXT)


def supported() -> str:
    """Return what can be read, for messages."""
    texts, tables = (", ".join(f"*{end}" for end in ends) for ends in (_COMPRESSIBLE, _TABLES))
    return f"{texts}, each also with {' or '.join(COMPRESSED)}; {tables}"


def require_packages(path: Path) -> None:
    """Check that what reading a file takes is installed.

    Raises:
        UsageError: It is not.
    """
    if path.name.lower().endswith(_TABLES):
        require("pyarrow", "arrow", path)
    elif path.name.lower().endswith(".zst"):
        require("zstandard", "zstd", path)


def _cut(
    path: Path, stream: BinaryIO, document: TextDocument, size: int
) -> Iterator[tuple[Form, int, Any, tuple[str, ...]]]:
    name = _content_name(path)
    if name.endswith(".csv"):
        for first, block, columns in csv_rows.cut_rows(path, stream, size):
            yield "csv", first, block, columns
    elif name.endswith(_TEXT) and document == "per-file":
        yield "text", 1, text.read_document(path, stream), ()
    else:
        head = stream.read(min(size, _FIRST_BYTES))
        if name.endswith(".json") and _begins_array(head):
            for first, items in json_text.cut_items(path, stream, size, head):
                yield "json items", first, items, ()
        else:
            form: Form = "lines" if name.endswith(_TEXT) else "json lines"
            for first, block in text.cut_lines(path, stream, size, head):
                yield form, first, block, ()


def _begins_array(head: bytes) -> bool:
    return head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _content_name(path: Path) -> str:
    name = path.name.lower()
    for packed in COMPRESSED:
        name = name.removesuffix(packed)
    return name
