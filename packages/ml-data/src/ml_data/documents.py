r"""Text files to documents: one process cuts files into chunks, any process parses a chunk.

| file | document |
|---|---|
| `.jsonl`; `.json` that begins with `{` | a line: an object whose value of a key is the text |
| `.json` that begins with `[` | an item of the array |
| `.txt`, `.md`, `.rst` | the file, or each line of it that is not blank |

Each may be compressed (`.gz`). Chunks follow from the files alone, so the result does not depend on
who parses them. Lines end with `\n` and nothing else: texts hold Unicode's other separators.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from ml_models.flags import UsageError

CHUNK_BYTES = 1 << 20
"""About how much text a chunk holds: enough that sending it costs nothing, little enough that all
workers have one."""

TextDocument = Literal["per-file", "per-line"]
"""What is one document in a text file."""

_JSON = (".jsonl", ".json")
_TEXT = (".txt", ".md", ".rst")
_AFTER_ITEM = re.compile(r"\s*([,\]])\s*")
SUFFIXES = tuple(suffix + packed for suffix in (*_JSON, *_TEXT) for packed in ("", ".gz"))
"""Names of the files that can be read."""


class Chunk(NamedTuple):
    """A piece of a file: some documents of it, not yet parsed."""

    path: str
    form: Literal["lines", "items", "json lines", "text"]
    first: int
    """Number of its first line (of its first item), from 1."""
    content: bytes | list[Any]
    consumed: int
    """Bytes of the file (as it is on disk) that were read since the chunk before."""


def find_files(inputs: Sequence[str]) -> list[Path]:
    """Return the files that `inputs` name: files, directories (sorted by path), glob patterns.

    Raises:
        UsageError: one of them names no file, or a file of a format that is not read.
    """
    files: list[Path] = []
    for given in inputs:
        path = Path(given).expanduser()
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if _readable(p) and not _hidden(p, path))
        elif path.exists():
            found = [path]
        else:
            found = sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207
            found = [p for p in found if p.is_file()]
        if not found and path.is_dir():
            raise UsageError(f"--input {given}: the directory holds no {_names()} file")
        if not found:
            raise UsageError(f"--input {given}: no such file or directory")
        files += found
    for file in files:
        if not file.name.endswith(SUFFIXES):
            raise UsageError(f"--input {file}: not a {_names()} file")
    return files


def read_chunks(path: Path, document: TextDocument = "per-file") -> Iterator[Chunk]:
    """Cut a file into chunks of whole documents, reading it as they are asked for.

    Raises:
        UsageError: it is not in the format its name says.
    """
    with path.open("rb") as raw:
        stream = cast("BinaryIO", gzip.GzipFile(fileobj=raw)) if path.suffix == ".gz" else raw
        position = 0
        try:
            for form, first, content in _cut(path, stream, document):
                yield Chunk(str(path), form, first, content, raw.tell() - position)
                position = raw.tell()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UsageError(f"{path}: not a whole gzip file ({error})") from error


def parse(chunk: Chunk, keys: Sequence[str]) -> dict[str, list[str]]:
    """Return the texts of a chunk, of each key; text files have one text, which serves all keys.

    Raises:
        UsageError: it is not valid UTF-8 or JSON, or an object lacks a key; the message names file
            and line.
    """
    if chunk.form == "items":
        numbered = enumerate(cast("list[Any]", chunk.content), chunk.first)
        records = [(f"{chunk.path}: item {number}", item) for number, item in numbered]
        return _select(records, keys)
    text = _decode(chunk)
    if chunk.form == "text":
        texts = [text]
        return dict.fromkeys(keys, texts)
    lines = [(n, line) for n, line in enumerate(text.split("\n"), chunk.first) if line.strip()]
    if chunk.form == "lines":
        texts = [line.removesuffix("\r") for _, line in lines]
        return dict.fromkeys(keys, texts)
    records = [(f"{chunk.path}:{n}", _parse_line(chunk.path, n, line)) for n, line in lines]
    return _select(records, keys)


# Cutting.


def _cut(path: Path, stream: BinaryIO, document: TextDocument) -> Iterator[tuple[Any, int, Any]]:
    name = path.name.removesuffix(".gz")
    if name.endswith(_TEXT) and document == "per-file":
        yield "text", 1, stream.read()
    elif name.endswith(_TEXT):
        yield from (("lines", *piece) for piece in _line_blocks(stream, b""))
    else:
        head = stream.read(CHUNK_BYTES)
        begin = head.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        if name.endswith(".json") and begin == b"[":
            yield from (("items", *piece) for piece in _array_items(path, stream, head))
        else:
            yield from (("json lines", *piece) for piece in _line_blocks(stream, head))


def _line_blocks(stream: BinaryIO, head: bytes) -> Iterator[tuple[int, bytes]]:
    first = 1
    while block := head or stream.read(CHUNK_BYTES):
        head = b""
        if not block.endswith(b"\n"):
            block += stream.readline()
        yield first, block
        first += block.count(b"\n")


def _array_items(path: Path, stream: BinaryIO, head: bytes) -> Iterator[tuple[int, list[Any]]]:
    """Yield the items of a JSON array, those of one read at a time."""
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    number = 1
    try:
        text = decode(head).lstrip().removeprefix("[").lstrip()
        while not (text.startswith("]") and number == 1):
            items, text, closed = _whole_items(text)
            if items:
                yield number, items
                number += len(items)
            if closed:
                break
            block = stream.read(CHUNK_BYTES)
            text = (text + decode(block, not block)).lstrip()
            if not block:
                raise ValueError(f"item {number} is not whole, or no ',' or ']' follows it")
        if text.removeprefix("]").strip() or stream.read(CHUNK_BYTES).strip():
            raise ValueError("something follows the array")
    except ValueError as error:
        raise UsageError(f"{path}: not a JSON array in UTF-8 ({error})") from error


def _whole_items(text: str) -> tuple[list[Any], str, bool]:
    """Return the items `text` begins with, the text after them, and whether the array ended."""
    items: list[Any] = []
    position, decoder = 0, json.JSONDecoder()
    while True:
        try:
            item, end = decoder.raw_decode(text, position)
        except ValueError:
            return items, text[position:], False
        separator = _AFTER_ITEM.match(text, end)
        if separator is None:
            return items, text[position:], False
        items.append(item)
        position = separator.end()
        if separator[1] == "]":
            return items, text[position:], True


# Parsing.


def _decode(chunk: Chunk) -> str:
    content = cast("bytes", chunk.content)
    if chunk.first == 1:
        content = content.removeprefix(codecs.BOM_UTF8)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = chunk.first + content.count(b"\n", 0, error.start)
        byte = content[error.start]
        raise UsageError(
            f"{chunk.path}:{line}: not valid UTF-8 (byte 0x{byte:02x}); convert the file to UTF-8"
        ) from error


def _parse_line(path: str, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        reason = f"{error.msg}, column {error.colno}"
    except RecursionError:
        reason = "too deeply nested"
    raise UsageError(f"{path}:{number}: not valid JSON ({reason}); one object a line is read")


def _select(records: Sequence[tuple[str, Any]], keys: Sequence[str]) -> dict[str, list[str]]:
    """Return the texts of each key of (place, object) records."""
    return {key: [_text(place, record, key) for place, record in records] for key in keys}


def _text(place: str, record: Any, key: str) -> str:
    if not isinstance(record, dict):
        raise UsageError(f"{place}: not a JSON object but {_shown(record)}")
    if key not in record:
        present = ", ".join(map(repr, record)) or "no key"
        raise UsageError(
            f"{place}: no key {key!r}; the object has {present}; choose with --json-keys"
        )
    text = record[key]
    if not isinstance(text, str):
        raise UsageError(f"{place}: the value of {key!r} is not text but {_shown(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise UsageError(f"{place}: the value of {key!r} has half a character ({half})") from error
    return text


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _hidden(path: Path, below: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(below).parts)


def _readable(path: Path) -> bool:
    described = path.suffix == ".json" and path.with_suffix(".idx").exists()  # our own output
    return path.name.endswith(SUFFIXES) and path.is_file() and not described


def _names() -> str:
    return f"{', '.join(f'*{suffix}' for suffix in (*_JSON, *_TEXT))} (or these with .gz)"
