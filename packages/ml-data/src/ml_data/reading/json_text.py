"""JSON: an object a line, or an array of objects.

The array is cut by its brackets and quotes alone, so an item that is not right does not hide those
after it, and no item is parsed before it comes to its worker.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ml_data.account import Problem
from ml_data.instruction.conversation import RecordError
from ml_data.reading.record import Chunk, Record, shown
from ml_data.reading.streams import RECORD_BYTES
from ml_data.reading.text import decode, numbered_lines
from ml_models.flags import UsageError

_FORMS = "what is read is an object a line, or (.json) an array of objects"

_BORDER = re.compile(rb'["\[\]{},]')
_NESTED = re.compile(rb'["\[\]{}]')
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_lines(chunk: Chunk) -> Iterator[Record | Problem]:
    """Yield the objects of lines that are not blank."""
    for number, line in numbered_lines(chunk):
        found = _record(f"{chunk.path}:{number}", line)
        if number == 1 and isinstance(found, Problem):
            found = Problem(found.place, f"{found.reason}; {_FORMS}")
        yield found


def parse_items(chunk: Chunk) -> Iterator[Record | Problem]:
    """Yield the objects of an array."""
    for number, item in enumerate(chunk.content, chunk.first):
        yield _record(f"{chunk.path}: item {number}", item.strip())


def cut_items(
    path: Path, stream: BinaryIO, size: int, head: bytes
) -> Iterator[tuple[int, list[bytes]]]:
    """Yield the items of an array, those of about `size` bytes at a time; `head` begins it.

    Raises:
        UsageError: The array does not end, or something follows it.
    """
    data = head.removeprefix(codecs.BOM_UTF8).lstrip().removeprefix(b"[")
    scan, first = _ItemScan(data), 1
    while True:
        items = scan.whole_items()
        if scan.closed and first == 1 and len(items) == 1 and not items[0].strip():
            items = []  # [ ]
        if items:
            yield first, items
            first += len(items)
        if scan.closed:
            break
        if len(scan.rest) > RECORD_BYTES:
            raise UsageError(f"{path}: item {first} has more than {RECORD_BYTES >> 20} MiB")
        # As much as there is already, so that a large item is not scanned over and over.
        block = stream.read(max(size, len(scan.rest)))
        if not block:
            raise UsageError(f"{path}: a JSON array that does not end (in or after item {first})")
        scan.add(block)
    if scan.rest.strip() or stream.read(size).strip():
        raise UsageError(f"{path}: something follows the JSON array (of {first - 1} items)")


class _ItemScan:
    """Where the items of an array begin and end, found as its bytes come."""

    def __init__(self, data: bytes) -> None:
        self.rest = data
        self.closed = False
        self._position = 0
        self._depth = 0

    def add(self, block: bytes) -> None:
        self.rest += block

    def whole_items(self) -> list[bytes]:
        """Return, and forget, the items that have ended."""
        items: list[bytes] = []
        begin = 0
        while not self.closed and (mark := self._next_mark()):
            at, character = mark
            ends = character in b",]" and not self._depth
            if ends:
                items.append(self.rest[begin:at])
                begin = at + 1
                self.closed = character == b"]"
            elif character in b"[{":
                self._depth += 1
            elif self._depth:  # a bracket too many is the item's own mistake
                self._depth -= 1
        self.rest = self.rest[begin:]
        self._position -= begin
        return items

    def _next_mark(self) -> tuple[int, bytes] | None:
        """Return place and character of the next bracket or comma that counts, and go past it."""
        while found := (_NESTED if self._depth else _BORDER).search(self.rest, self._position):
            if found[0] != b'"':
                self._position = found.end()
                return found.start(), found[0]
            end = _string_end(self.rest, found.end())
            if end < 0:
                self._position = found.start()
                return None
            self._position = end
        self._position = len(self.rest)
        return None


def _string_end(data: bytes, start: int) -> int:
    """Return where the string that starts here ends, behind its quote; -1 if it does not."""
    while (quote := data.find(b'"', start)) >= 0:
        before = quote
        while before > start and data[before - 1] == ord("\\"):
            before -= 1
        if (quote - before) % 2 == 0:
            return quote + 1
        start = quote + 1
    return -1


def _record(place: str, content: bytes) -> Record | Problem:
    try:
        value = _parse(content)
    except RecordError as error:
        return Problem(place, str(error))
    if not isinstance(value, dict):
        return Problem(place, f"not a JSON object but {shown(value)}")
    return Record(place, value)


def _parse(content: bytes) -> Any:
    try:
        return _fast_parser()(content)
    except (ValueError, RecursionError):
        return _parse_exactly(decode(content))


@functools.cache
def _fast_parser() -> Callable[[bytes], Any]:
    """Return orjson's parser, where it is installed; what it refuses is for Python's to judge."""
    try:
        import orjson
    except ImportError:
        return lambda content: _parse_exactly(content.decode())
    return orjson.loads


def _parse_exactly(text: str) -> Any:
    try:
        value = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = f"its line {error.lineno}, " if error.lineno > 1 else ""
        reason = f"not valid JSON ({error.msg}, {line}column {error.colno})"
    except RecursionError:
        reason = "not valid JSON (too deeply nested)"
    except UnicodeEncodeError as error:
        reason = f"half a character (\\u{ord(error.object[error.start]):04x}) in its text"
    except ValueError as error:  # an integer of thousands of digits
        reason = f"not valid JSON ({error})"
    else:
        return value
    raise RecordError(reason)
