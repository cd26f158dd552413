"""The memory that reading takes does not depend on the size of a file: measured by the kernel."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

LINE = "of a corpus whose lines are all of about the same length, " * 17
MIB = 1 << 20

READ = """
import sys
from pathlib import Path
from ml_data.reading import read_chunks, records

def most() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10

for path in map(Path, sys.argv[1:]):
    number = sum(1 for chunk in read_chunks(path, "per-line") for _ in records(chunk))
    print(number, most())
"""


def rows(number: int) -> Iterator[dict[str, str]]:
    return ({"text": f"line {n} {LINE}"} for n in range(number))


def write_text(path: Path, number: int) -> None:
    opener = {".gz": gzip.open, ".zst": zstandard.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        if ".csv" in path.suffixes:
            csv.writer(file).writerows([["text"], *([row["text"]] for row in rows(number))])
        elif ".json" in path.suffixes:
            file.write("[" + ",\n".join(map(json.dumps, rows(number))) + "]")
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows(number))


def write_table(path: Path, number: int) -> None:
    table = pa.Table.from_pylist(list(rows(number)))
    if path.suffix == ".parquet":  # one row group, whose column is one piece of the file
        pq.write_table(table, path, row_group_size=number, compression="none", use_dictionary=False)
        return
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=1000)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's count is in /proc")
@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.json", "a.txt", "a.csv", "a.jsonl.gz", "a.json.zst", "a.arrow", "a.parquet"],
)
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    small, large = tmp_path / f"small-{name}", tmp_path / f"large-{name}"
    write = write_table if name.endswith(("arrow", "parquet")) else write_text
    write(small, 4_000)
    write(large, 64_000)
    command = [sys.executable, "-c", READ, str(small), str(large)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    (number, before), (more, after) = (
        map(int, line.split()) for line in result.stdout.splitlines()
    )
    assert (number, more) == (4_000, 64_000)
    assert len(LINE) * 60_000 > 56 * MIB  # so much more text, and
    assert after - before < 24 * MIB
