"""Files with random mistakes: records and problems, or one message, and nothing else ever."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from ml_data.account import Problem
from ml_data.reading import Record, read_chunks, records
from ml_models.flags import UsageError

TEXTS = ["plain", "", "two\nlines", "中文🙂", 'quotes " \\" , ]}', "z" * 300]
ROWS = [
    {"text": text * (1 + n % 3), "id": n, "messages": [{"role": "user", "content": text}]}
    for n, text in enumerate(TEXTS * 5)
]
TABLE = pa.Table.from_pylist(ROWS)
PIECES = [b'"', b"\\", b"[", b"]", b"{", b"}", b",", b"\n", b"\r", b"\0", b"\xff", b"\\ud800"]
SURROGATE = b"\xed\xa0\x80"


def lines() -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def comma_separated() -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file).writerows([["text", "id"], *([row["text"], row["id"]] for row in ROWS)])
    return file.getvalue().encode()


def parquet(**options: str | bool) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(TABLE, sink, row_group_size=10, **options)
    return sink.getvalue().to_pybytes()


def arrow(form: str, compression: str | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with getattr(pa.ipc, f"new_{form}")(sink, TABLE.schema, options=options) as writer:
        writer.write_table(TABLE, max_chunksize=7)
    return sink.getvalue().to_pybytes()


FILES = {
    "a.jsonl": lines(),
    "a.json": json.dumps(ROWS, ensure_ascii=False, indent=1).encode(),
    "a.csv": comma_separated(),
    "a.txt": "\n".join(TEXTS).encode(),
    "a.jsonl.gz": gzip.compress(lines(), mtime=0),
    "a.jsonl.zst": zstandard.compress(lines()),
    "stream.arrow": arrow("stream"),
    "file.arrow": arrow("file"),
    "packed.arrow": arrow("stream", "zstd"),
    "a.parquet": parquet(),
    "plain.parquet": parquet(use_dictionary=False, compression="none"),
    "v2.parquet": parquet(data_page_version="2.0", compression="zstd"),
}


def mutated(chance: random.Random, content: bytes) -> bytes:
    data = bytearray(content)
    way = chance.choice(("cut", "random", "byte", "bit", "delete", "insert"))
    if way == "cut":
        return content[: chance.randrange(len(content))]
    if way == "random":
        return chance.randbytes(chance.randrange(400))
    for _ in range(chance.choice((1, 1, 2, 5, 20))):
        at = chance.randrange(len(data))
        if way == "byte":
            data[at] = chance.randrange(256)
        elif way == "bit":
            data[at] ^= 1 << chance.randrange(8)
        elif way == "delete":
            del data[at : at + chance.randrange(1, 1 + len(data) // 40)]
        else:
            data[at:at] = chance.choice([*PIECES, SURROGATE, bytes(data[at : at + 20])])
    return bytes(data)


def outcome(path: Path, size: int) -> list[object]:
    """Return the records and problems of a file, and the message that ended it."""
    found: list[object] = []
    try:
        for chunk in read_chunks(path, "per-line", chunk_bytes=size):
            for record in records(chunk):
                assert type(record) in (Record, Problem)
                json.dumps(record[1], default=repr, ensure_ascii=False).encode()
                found.append(record)
    except UsageError as error:
        found.append(str(error))
    return found


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_give_problems_and_messages_only(tmp_path, name):
    chance = random.Random(name)
    path = tmp_path / name
    damaged = 0
    for _ in range(250):
        content = mutated(chance, FILES[name])
        path.write_bytes(content)
        small, large = outcome(path, 50), outcome(path, 1 << 20)
        assert all(re.match(f".*{name}[^\n]*$", end) for end in large if isinstance(end, str))
        damaged += any(not isinstance(found, Record) for found in large)
        if name.endswith((".jsonl", ".json", ".csv", ".txt")):
            assert small == large  # where a file is cut into chunks changes nothing
    assert damaged > 20
