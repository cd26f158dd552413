"""Text, JSON and CSV: files to records."""

from __future__ import annotations

import csv
import gzip
import io
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from ml_data.account import Problem
from ml_data.instruction.conversation import RecordError
from ml_data.reading import CHUNK_BYTES, Record, json_text, read_chunks, records, streams, text_of
from ml_models.flags import UsageError

TRICKY = [
    "plain",
    "",
    "two\nlines",
    "U+2028 \u2028 U+0085 \u0085 \x0b \x0c \x1c",
    "中文🙂",
    " \t",
    'quotes " \\" \\\\" and brackets ][}{,',
]


def read(path: Path, document: str = "per-file", size: int = CHUNK_BYTES) -> list[Record | Problem]:
    chunks = read_chunks(path, document, chunk_bytes=size)
    return [record for chunk in chunks for record in records(pickle.loads(pickle.dumps(chunk)))]


def read_texts(path: Path, document: str = "per-file", size: int = CHUNK_BYTES) -> list[str]:
    return [text_of(record.value, "text") for record in read(path, document, size)]


def lines_of(texts: list[str], ensure_ascii: bool = False, end: str = "\n") -> bytes:
    lines = (json.dumps({"text": t}, ensure_ascii=ensure_ascii) + end for t in texts)
    return "".join(lines).encode()


def csv_of(rows: list[list[str]], **options: str | int) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file, **options).writerows(rows)
    return file.getvalue().encode()


@pytest.fixture(params=[7, 64, CHUNK_BYTES])
def size(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(params=["with orjson", "without orjson"])
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "without orjson":
        monkeypatch.setitem(sys.modules, "orjson", None)
    json_text._fast_parser.cache_clear()
    yield request.param
    json_text._fast_parser.cache_clear()


@pytest.mark.usefixtures("parser")
@pytest.mark.parametrize("ensure_ascii", [True, False])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n  \n"])
def test_json_lines_give_a_record_each(tmp_path, size, ensure_ascii, end):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(TRICKY * 3, ensure_ascii, end))
    assert read_texts(path, size=size) == TRICKY * 3
    path.write_bytes(path.read_bytes().rstrip())  # no line end at the end
    assert read_texts(path, size=size) == TRICKY * 3


@pytest.mark.usefixtures("parser")
@pytest.mark.parametrize("ensure_ascii", [True, False])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_gives_a_record_an_item(tmp_path, size, indent, ensure_ascii):
    path = tmp_path / "a.json"
    items = [{"text": text, "of": [n, {"[": "]"}, []]} for n, text in enumerate(TRICKY * 3)]
    array = json.dumps(items, indent=indent, ensure_ascii=ensure_ascii)
    path.write_text(f" \n{array}\n", encoding="utf-8")
    assert [record.value for record in read(path, size=size)] == items
    path.write_text("[ ]")
    assert read(path, size=size) == []


def test_a_json_file_may_hold_lines(tmp_path, size):
    path = tmp_path / "a.json"
    path.write_bytes(lines_of(TRICKY))
    assert read_texts(path, size=size) == TRICKY


def test_a_text_file_is_one_document_or_one_a_line(tmp_path, size):
    path = tmp_path / "a.txt"
    content = "first \u2028 line\r\n\n \nsecond\n"
    path.write_bytes(content.encode())
    assert read_texts(path, size=size) == [content]
    assert read_texts(path, "per-line", size) == ["first \u2028 line", "second"]
    places = [record.place for record in read(path, "per-line", size)]
    assert places == [f"{path}:1", f"{path}:4"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_rows_of_csv_may_have_line_ends_in_quotes(tmp_path, size, end, quoting):
    path = tmp_path / "a.csv"
    texts = [*TRICKY, "a\r\nb\n\n", "x" * 200_000] * 2  # more than Python's limit for a field
    rows = [["text", "größe"], *([text, str(n)] for n, text in enumerate(texts))]
    path.write_bytes(csv_of(rows, lineterminator=end, quoting=quoting))
    found = read(path, size=size)
    assert [record.value for record in found] == [
        {"text": text, "größe": str(n)} for n, text in enumerate(texts)
    ]
    assert csv.field_size_limit() == 131_072


def test_rows_of_csv_are_known_by_their_lines(tmp_path, size):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\n"a\nb",c\n1,"2\n3"\n\n4,5\n6\n7,"\xff"\n8,9"\n"1"0,\n"11,12\n13,14\n')
    assert read(path, size=size) == [
        Record(f"{path}:4", {"a\nb": "1", "c": "2\n3"}),
        Record(f"{path}:7", {"a\nb": "4", "c": "5"}),
        Problem(f"{path}:8", "1 fields, but the first row names 2 columns"),
        Problem(f"{path}:9", "not valid UTF-8 (byte 0xff); convert the file to UTF-8"),
        Record(f"{path}:10", {"a\nb": "8", "c": '9"'}),
        Problem(f"{path}:11", "not valid CSV (',' expected after '\"')"),
        Problem(f"{path}:12", "not valid CSV (unexpected end of data, in lines 12 to 13)"),
    ]


def test_a_csv_file_without_rows_has_no_records(tmp_path):
    path = tmp_path / "a.csv"
    for content in (b"", b"\n", b"text\n"):
        path.write_bytes(content)
        assert read(path) == []


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.csv"])
def test_compressed_files_and_byte_order_marks_change_nothing(tmp_path, size, name):
    content = {
        "a.jsonl": lines_of(TRICKY * 20),
        "a.json": json.dumps([{"text": text} for text in TRICKY * 20]).encode(),
        "a.txt": "\n".join(TRICKY * 20).encode(),
        "a.csv": csv_of([["text"], *([text] for text in TRICKY * 20)]),
    }[name]
    half = len(content) // 2  # compressed files may have several parts
    zstd = zstandard.ZstdCompressor().compress
    files = {
        name: content,
        name.upper(): content,
        f"marked-{name}": b"\xef\xbb\xbf" + content,
        f"{name}.gz": gzip.compress(content[:half]) + gzip.compress(content[half:]),
        f"{name}.zst": zstd(content[:half]) + zstd(b"") + zstd(content[half:]),
    }
    expected = None
    for file, data in files.items():
        path = tmp_path / file
        path.write_bytes(data)
        texts = read_texts(path, "per-line", size)
        expected = expected or texts
        assert texts == expected
        consumed = [chunk.consumed for chunk in read_chunks(path, "per-line", chunk_bytes=size)]
        assert sum(consumed) == len(data)
    assert len(expected) > 40


def test_a_large_file_is_read_in_pieces(tmp_path):
    texts = ["x" * 1000] * 5000
    files = {
        "a.jsonl": lines_of(texts),
        "a.json": json.dumps([{"text": text} for text in texts]).encode(),
        "a.csv": csv_of([["text"], *([text] for text in texts)]),
    }
    for name, content in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        chunks = list(read_chunks(path))
        assert 5 <= len(chunks) <= 6
        assert all(len(pickle.dumps(chunk)) < 1.02 * CHUNK_BYTES for chunk in chunks)
        numbers = [record.place.removeprefix(str(path)) for record in read(path)]
        spelt = ": item {}" if name == "a.json" else ":{}"
        first = 2 if name == "a.csv" else 1
        assert numbers == [spelt.format(n) for n in range(first, first + 5000)]


@pytest.mark.usefixtures("parser")
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"text": }', "not valid JSON (Expecting value, column 10)"),
        (b"[1, {}]", "not a JSON object but [1, {}]"),
        (b'"' + b"x" * 99 + b'"', 'not a JSON object but "' + "x" * 39 + "..."),
        (b'{"text": "\xff"}', "not valid UTF-8 (byte 0xff); convert the file to UTF-8"),
        (b'{"a": ["\\ud83d!"]}', "half a character (\\ud83d) in its text"),
        (b"[" * 100_000 + b"]" * 100_000, "not valid JSON (too deeply nested)"),
    ],
)
def test_reading_goes_on_after_a_record_that_cannot_be_used(tmp_path, size, content, reason):
    lines, array = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_bytes(b"{}\n\n" + content + b"\n{}")
    array.write_bytes(b"[{},\n" + content + b"\n, {}]")
    spelt = {lines: (":1", ":3", ":4"), array: (": item 1", ": item 2", ": item 3")}
    for path, places in spelt.items():
        first, second, third = (f"{path}{place}" for place in places)
        expected = [Record(first, {}), Problem(second, reason), Record(third, {})]
        assert read(path, size=size) == expected


@pytest.mark.usefixtures("parser")
def test_what_json_of_python_takes_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": NaN, "b": -Infinity}\n{"a": "\\ud83d\\ude42", "a": 1e400}\n')
    first, second = (record.value for record in read(path))
    assert (str(first["a"]), first["b"]) == ("nan", -float("inf"))
    assert second == {"a": float("inf")}


def test_a_mistake_in_an_item_does_not_hide_the_others(tmp_path, size):
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}}, {"b" 2} , {"c": 3} {"d": 4}, , {"e": "\\"], [" },]')
    reasons = [
        record.reason if isinstance(record, Problem) else record.value
        for record in read(path, size=size)
    ]
    assert reasons == [
        "not valid JSON (Extra data, column 9)",
        "not valid JSON (Expecting ':' delimiter, column 6)",
        "not valid JSON (Extra data, column 10)",
        "not valid JSON (Expecting value, column 1)",
        {"e": '"], ['},
        "not valid JSON (Expecting value, column 1)",
    ]


def test_a_file_that_begins_wrongly_is_told_what_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"data": [1, 2]}, indent=2))
    problem = read(path)[0]
    assert str(problem) == (
        f"{path}:1: not valid JSON (Expecting property name enclosed in double quotes, column 2); "
        "what is read is an object a line, or (.json) an array of objects"
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"a": "x"}, {"a": ', "a JSON array that does not end (in or after item 2)"),
        ("a.json", b'[{"a": "x"}', "a JSON array that does not end (in or after item 1)"),
        ("a.json", b'[{"a": "x}]', "a JSON array that does not end (in or after item 1)"),
        ("a.json", b"[", "a JSON array that does not end (in or after item 1)"),
        ("a.json", b'[{"a": "x"}] {}', "something follows the JSON array (of 1 items)"),
        ("a.csv", b"a,b,a\n1,2,3\n", "a.csv:1: more than one column is called 'a'"),
        ("a.csv", b'\n"a,b\n1,2\n', "a.csv:2: not valid CSV (unexpected end of data, in l"),
        ("a.csv", b"a,\xff\n1,2\n", "a.csv:1: not valid UTF-8 (byte 0xff)"),
        ("a.jsonl.gz", b"not gzip", "a.jsonl.gz: not a whole gzip file (Not a gzipped file"),
        ("a.jsonl.zst", b"not zstd", "a.jsonl.zst: not a whole zstandard file ("),
    ],
)
def test_a_file_that_is_damaged_as_a_whole_is_refused(tmp_path, size, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=f"^{re.escape(str(tmp_path))}.*{re.escape(message)}"):
        read(path, size=size)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_compressed_file_that_is_cut_off_is_refused(tmp_path, size, name):
    whole = lines_of([str(n) for n in range(300)])
    data = gzip.compress(whole, mtime=0) if name.endswith("gz") else zstandard.compress(whole)
    path = tmp_path / name
    for end in range(0, len(data), 37):
        path.write_bytes(data[:end])
        with pytest.raises(UsageError, match=f"^{re.escape(str(path))}: not a whole (gzip|zst)"):
            read(path, size=size)


def test_files_of_zstd_with_a_long_window_are_read(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    parameters = zstandard.ZstdCompressionParameters(window_log=28)  # `zstd --long=28`
    packing = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path.write_bytes(packing.compress(lines_of(TRICKY)) + packing.flush())
    assert read_texts(path) == TRICKY


def test_a_text_file_that_is_not_utf8_is_one_problem(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("gut\nGröße".encode("latin-1"))
    reason = "not valid UTF-8 (byte 0xf6); convert the file to UTF-8"
    assert read(path) == [Problem(f"{path}:2", reason)]
    assert read(path, "per-line") == [
        Record(f"{path}:1", {"text": "gut"}),
        Problem(f"{path}:2", reason),
    ]


@pytest.mark.parametrize(
    ("name", "begin", "message"),
    [
        ("a.jsonl", b"", "a line of more than 256 MiB; not a text file?"),
        ("a.csv", b"a\n", "a line of more than 256 MiB; not a text file?"),
        ("a.json", b'["', "item 1 has more than 256 MiB"),
        ("a.txt", b"", "more than 256 MiB, too large for one document; read it with --document"),
    ],
)
def test_a_record_larger_than_any_does_not_take_the_memory(tmp_path, name, begin, message):
    path = tmp_path / name
    with path.open("wb") as file:
        file.write(begin)
        file.truncate(streams.RECORD_BYTES + (4 << 20))
    with pytest.raises(UsageError, match=f"{re.escape(str(path))}: {message}"):
        read(path)


def test_a_column_is_asked_for_by_name():
    value = {"body": "x", "id": 1, "none": None}
    assert text_of(value, "body") == "x"
    for column, message in {
        "text": "no column 'text'; the columns are 'body', 'id', 'none'",
        "id": "the value of 'id' is not text but 1",
        "none": "the value of 'none' is not text but null",
    }.items():
        with pytest.raises(RecordError, match=message):
            text_of(value, column)
    with pytest.raises(RecordError, match="no column 'text'; the columns are none"):
        text_of({}, "text")


def test_without_zstandard_the_message_names_the_extra(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(b"{}"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    message = f"{path}: needs zstandard (pip install 'ml-data[zstd]')"
    with pytest.raises(UsageError, match=re.escape(message)):
        read(path)


def test_reading_text_imports_nothing_heavy(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n")
    program = f"""
import sys
from pathlib import Path
from ml_data.reading import find_files, read_chunks, records
assert [list(records(c)) for p in find_files([{str(path)!r}]) for c in read_chunks(p)] != []
print({{"numpy", "pyarrow", "torch", "zstandard", "tokenizers"}} & set(sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("set()\n", "")
