"""The pieces of an input file: a chunk of it, and one record of a chunk.

A chunk is cut by one process and parsed by any other, so it can be pickled and says all that its
parser needs.
"""

from __future__ import annotations

import json
from typing import Any, Literal, NamedTuple

from ml_data.instruction.conversation import RecordError

Form = Literal["text", "lines", "json lines", "json items", "csv", "arrow", "problem"]
"""What the content of a chunk is: which function parses it."""


class Chunk(NamedTuple):
    """A piece of a file: some records of it, not yet parsed."""

    path: str
    form: Form
    first: int
    """Number of its first line (item, row), from 1."""
    content: Any
    """What the parser of its form takes: bytes, or a list of bytes."""
    consumed: int
    """Bytes of the file (as it is on disk) that were read since the chunk before."""
    columns: tuple[str, ...] = ()
    """Names of the columns, where they stand at the beginning of the file only (CSV)."""


class Record(NamedTuple):
    """What a line, an item or a row holds."""

    place: str
    """For messages: `corpus.jsonl:1041`, `corpus.json: item 7`, `corpus.parquet: row 12`."""
    value: dict[str, Any]
    """Of a text file `{"text": ...}`. Its texts can all be encoded in UTF-8."""


def text_of(value: dict[str, Any], column: str) -> str:
    """Return the text in a column of a record.

    Raises:
        RecordError: There is no such column, or no text in it.
    """
    if column not in value:
        present = ", ".join(map(repr, value)) or "none"
        raise RecordError(f"no column {column!r}; the columns are {present}")
    text = value[column]
    if not isinstance(text, str):
        raise RecordError(f"the value of {column!r} is not text but {shown(text)}")
    return text


def shown(value: Any) -> str:
    """Return a value for a message, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 40 else f"{text[:40]}..."
