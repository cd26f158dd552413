"""Parquet and Arrow files, read with pyarrow, which is optional.

Batches are read, checked and cut into small ones here, which travel as Arrow streams; workers turn
rows into Python's objects, which is what takes the time.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_data.account import Problem
from ml_data.reading.record import Chunk, Form, Record
from ml_models.flags import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


def cut_tables(path: Path, size: int) -> Iterator[Chunk]:
    """Yield chunks of rows, of about `size` bytes.

    Raises:
        UsageError: It is not a whole file of its format.
    """
    batches = _parquet(path, size) if path.suffix.lower() == ".parquet" else _arrow(path)
    first, position = 1, 0
    while True:
        with _damage(path):
            batch, consumed = next(batches, (None, 0))
            names = [] if batch is None else batch.schema.names
        if batch is None:
            return
        _check_names(path, names)
        for form, content, rows in _contents(batch, size):
            yield Chunk(str(path), form, first, content, consumed - position)
            first += rows
            position = consumed


def parse_rows(chunk: Chunk) -> Iterator[Record | Problem]:
    """Yield the rows."""
    import pyarrow as pa

    with pa.ipc.open_stream(chunk.content) as reader:
        batch = reader.read_next_batch()
    for number, row in enumerate(_to_python(batch), chunk.first):
        place = f"{chunk.path}: row {number}"
        yield Problem(place, row) if isinstance(row, str) else Record(place, row)


def parse_problem(chunk: Chunk) -> Iterator[Record | Problem]:
    """Yield the reason why a row cannot be read."""
    yield Problem(f"{chunk.path}: row {chunk.first}", chunk.content)


def _parquet(path: Path, size: int) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Yield batches of rows, and how much of the file is read with each."""
    import pyarrow.parquet as pq

    # A page at a time, rather than the whole of a row group.
    with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        metadata = file.metadata
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        text_bytes = sum(group.total_byte_size for group in groups)
        rows = max(1, metadata.num_rows)
        file_bytes, done = path.stat().st_size, 0
        for batch in file.iter_batches(
            batch_size=max(1, min(rows, size * rows // max(1, text_bytes))), use_threads=False
        ):
            done += batch.num_rows
            yield batch, file_bytes * done // rows


def _arrow(path: Path) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Yield the batches of an Arrow file or stream."""
    import pyarrow as pa

    file_bytes = path.stat().st_size
    with pa.OSFile(str(path)) as source:
        if source.read(6) == b"ARROW1":
            file = pa.ipc.open_file(source)
            for number in range(1, file.num_record_batches + 1):
                yield file.get_batch(number - 1), file_bytes * number // file.num_record_batches
            return
        source.seek(max(0, file_bytes - len(_STREAM_END)))
        if source.read() != _STREAM_END:
            logger.warning("%s: an Arrow stream without the mark of its end; is it whole?", path)
        source.seek(0)
        for batch in pa.ipc.open_stream(source):
            yield batch, source.tell()


def _contents(batch: pa.RecordBatch, size: int) -> Iterator[tuple[Form, str | bytes, int]]:
    """Yield form, content and number of rows of the chunks of a batch.

    Nothing may look into a batch that is not valid: a wrong offset leads anywhere in memory.
    """
    import pyarrow as pa

    try:
        batch.validate(full=True)
    except pa.ArrowInvalid as error:
        if batch.num_rows == 1:
            yield "problem", f"damaged ({error})", 1
            return
        for number in range(batch.num_rows):
            yield from _contents(batch.slice(number, 1), size)
    else:
        for piece in _slices(batch, size):
            yield "arrow", _to_bytes(piece), piece.num_rows


def _slices(batch: pa.RecordBatch, size: int) -> Iterator[pa.RecordBatch]:
    rows = max(1, size * batch.num_rows // max(1, batch.nbytes, batch.num_rows))
    for start in range(0, batch.num_rows, rows):
        yield batch.slice(start, rows)


def _to_bytes(batch: pa.RecordBatch) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _to_python(batch: pa.RecordBatch) -> list[dict[str, Any] | str]:
    """Return the rows; of one that cannot be had in Python, the reason."""
    try:
        return _as_text(batch).to_pylist()
    except Exception as error:  # whatever the types of its columns raise
        if batch.num_rows == 1:
            return [f"a value that Python cannot hold ({error})"]
        rows = range(batch.num_rows)
        return [row for number in rows for row in _to_python(batch.slice(number, 1))]


def _as_text(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return dates and times as text: Python has no nanoseconds, and ends with the year 9999."""
    import pyarrow as pa

    for index, (name, kind) in enumerate(zip(batch.schema.names, batch.schema.types, strict=True)):
        if pa.types.is_temporal(kind) and not pa.types.is_interval(kind):
            batch = batch.set_column(index, name, _time_as_text(batch.column(index)))
    return batch


def _time_as_text(column: pa.Array) -> pa.Array:
    import pyarrow as pa
    import pyarrow.compute as pc

    if not (pa.types.is_timestamp(column.type) and column.type.tz):
        return column.cast(pa.string())
    # In UTC, which it is stored in: another zone takes a database that small systems are without.
    instants = column.cast(pa.timestamp(column.type.unit)).cast(pa.string())
    return pc.binary_join_element_wise(instants, "Z", "")


def _check_names(path: Path, names: list[str]) -> None:
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UsageError(f"{path}: more than one column is called {min(twice)!r}")


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Say that a file is damaged where pyarrow does: in any of a dozen ways."""
    import pyarrow as pa

    kind = "a Parquet" if path.suffix.lower() == ".parquet" else "an Arrow"
    try:
        yield
    except (pa.ArrowException, ValueError, OverflowError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk, not of what is on it
        reason = str(error).split("\n")[0]
        raise UsageError(f"{path}: not a whole file in {kind} format ({reason})") from error
