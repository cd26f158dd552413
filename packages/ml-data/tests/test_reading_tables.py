"""Parquet and Arrow files to records; pyarrow wrote them, and its own reading is the oracle."""

from __future__ import annotations

import datetime
import decimal
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ml_data.account import Problem
from ml_data.reading import CHUNK_BYTES, Chunk, Record, read_chunks, records
from ml_models.flags import UsageError

ROWS = [
    {
        "text": f"{n} " + "größer\n" * (n % 50),
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": str(n)}],
        "id": n if n % 3 else None,
        "kind": ("a", "b")[n % 2],
    }
    for n in range(500)
]
TABLE = pa.Table.from_pylist(ROWS)
TABLE = TABLE.set_column(3, "kind", TABLE["kind"].dictionary_encode())


def write_parquet(path: Path, table: pa.Table, **options: Any) -> None:
    pq.write_table(table, path, **{"row_group_size": 130, **options})


def write_stream(path: Path, table: pa.Table, **options: Any) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema, **options) as to:
        to.write_table(table, max_chunksize=130)


def write_file(path: Path, table: pa.Table, **options: Any) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema, **options) as to:
        to.write_table(table, max_chunksize=130)


WRITERS = {
    "parquet": write_parquet,
    "parquet, zstandard, pages of version 2": lambda path, table: write_parquet(
        path, table, compression="zstd", data_page_version="2.0"
    ),
    "parquet, plain": lambda path, table: write_parquet(
        path, table, compression="none", use_dictionary=False
    ),
    "arrow stream": write_stream,
    "arrow file": write_file,
    "arrow file, zstandard": lambda path, table: write_file(
        path, table, options=pa.ipc.IpcWriteOptions(compression="zstd")
    ),
}


@pytest.fixture(params=list(WRITERS))
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[pa.Table], Path]]:
    def writer(table: pa.Table) -> Path:
        path = tmp_path / ("a.parquet" if "parquet" in request.param else "a.arrow")
        WRITERS[request.param](path, table)
        return path

    return writer


def chunks_of(path: Path, size: int = CHUNK_BYTES) -> list[Chunk]:
    return [pickle.loads(pickle.dumps(chunk)) for chunk in read_chunks(path, chunk_bytes=size)]


def read(path: Path, size: int = CHUNK_BYTES) -> list[Record | Problem]:
    return [record for chunk in chunks_of(path, size) for record in records(chunk)]


@pytest.mark.parametrize("size", [7, 5000, CHUNK_BYTES])
def test_rows_are_records(write, size):
    path = write(TABLE)
    assert read(path, size) == [Record(f"{path}: row {n}", row) for n, row in enumerate(ROWS, 1)]
    consumed = sum(chunk.consumed for chunk in chunks_of(path, size))
    assert path.stat().st_size - 8 <= consumed <= path.stat().st_size


def test_chunks_hold_about_as_much_as_is_asked_for(write):
    path = write(pa.table({"text": ["x" * 1000] * 20_000}))
    chunks = chunks_of(path, 100_000)
    assert 180 <= len(chunks) <= 400
    assert all(len(chunk.content) < 110_000 for chunk in chunks)


def test_a_table_without_rows_has_no_records(write):
    assert read(write(TABLE.slice(0, 0))) == []


def test_dates_and_times_are_text_whatever_their_unit(write):
    nanoseconds = pa.array([1_500_000_000_123_456_789, None], pa.timestamp("ns"))
    day = pa.array([datetime.date(2024, 2, 29), None])
    zoned = pa.array([86_400, None], pa.timestamp("s", "Mars/Olympus_Mons"))
    path = write(pa.table({"text": ["a", "b"], "at": nanoseconds, "day": day, "zoned": zoned}))
    first, second = (record.value for record in read(path))
    zoned_text = first.pop("zoned")
    assert first == {"text": "a", "at": "2017-07-14 02:40:00.123456789", "day": "2024-02-29"}
    assert second == {"text": "b", "at": None, "day": None, "zoned": None}
    assert re.fullmatch(r"1970-01-02 00:00:00(\.000)?Z", zoned_text)


def test_other_types_of_values_come_as_python_has_them(write):
    values = {"price": decimal.Decimal("1.50"), "raw": b"\xff", "f": 0.5, "yes": True, "none": None}
    path = write(pa.Table.from_pylist([values]))
    assert read(path) == [Record(f"{path}: row 1", values)]


def test_a_row_that_python_cannot_hold_is_a_problem(write):
    late = pa.array([[1], [1 << 60], []], pa.list_(pa.timestamp("ms")))
    path = write(pa.table({"text": ["a", "b", "c"], "times": late}))
    first, second, third = read(path)
    assert (first.value["text"], third.value["text"]) == ("a", "c")
    assert second.place == f"{path}: row 2"
    assert second.reason.startswith("a value that Python cannot hold (")


def test_a_row_that_is_not_utf8_is_a_problem(write):
    bad = pa.array([b"a", b"\xff", b"c"] * 100).view(pa.string())
    path = write(pa.table({"text": bad}))
    found = read(path)
    assert len(found) == 300
    for number, record in enumerate(found, 1):
        place = f"{path}: row {number}"
        if number % 3 == 2:
            assert record[0] == place
            assert "Invalid UTF8 sequence" in record[1]
        else:
            assert record == Record(place, {"text": "ac"[number % 3 == 0]})


def test_two_columns_of_one_name_are_refused(write):
    path = write(pa.table([pa.array(["x"]), pa.array(["y"])], names=["text", "text"]))
    with pytest.raises(UsageError, match=r"a\.\w+: more than one column is called 'text'"):
        read(path)


def test_a_file_that_is_cut_off_is_refused(write):
    path = write(TABLE)
    data = path.read_bytes()
    for end in (0, 5, 100, len(data) // 2, len(data) - 20):
        path.write_bytes(data[:end])
        message = f"^{re.escape(str(path))}: not a whole file in (a Parquet|an Arrow) format \\("
        with pytest.raises(UsageError, match=message):
            read(path)


def test_a_stream_without_the_mark_of_its_end_is_read_with_a_warning(tmp_path, caplog):
    path = tmp_path / "a.arrow"
    write_stream(path, TABLE)
    assert len(read(path)) == 500
    assert caplog.messages == []
    path.write_bytes(path.read_bytes()[:-8])
    assert len(read(path)) == 500
    message = f"{path}: an Arrow stream without the mark of its end; is it whole?"
    assert caplog.messages == [message]
