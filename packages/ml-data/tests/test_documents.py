from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from ml_data import documents
from ml_data.documents import find_files, parse, read_chunks
from ml_models.flags import UsageError

TRICKY = ["plain", "", "two\nlines", "U+2028 \u2028 U+0085 \u0085 \x0b \x0c \x1c", "中文🙂", " \t"]


def read(path: Path, *keys: str, document: str = "per-file") -> dict[str, list[str]]:
    keys = keys or ("text",)
    found: dict[str, list[str]] = {key: [] for key in keys}
    for chunk in read_chunks(path, document):
        for key, texts in parse(chunk, keys).items():
            found[key] += texts
    return found


def lines_of(texts: list[str], ensure_ascii: bool = False, end: str = "\n") -> str:
    return "".join(json.dumps({"text": t}, ensure_ascii=ensure_ascii) + end for t in texts)


@pytest.fixture(params=[7, 64, 1 << 20])
def chunk_bytes(request, monkeypatch) -> int:
    monkeypatch.setattr(documents, "CHUNK_BYTES", request.param)
    return request.param


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("ensure_ascii", [True, False])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n  \n"])
def test_json_lines_give_a_document_each(tmp_path, ensure_ascii, end):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(TRICKY * 3, ensure_ascii, end).encode())
    assert read(path)["text"] == TRICKY * 3
    path.write_bytes(path.read_bytes().rstrip())  # no line end at the end
    assert read(path)["text"] == TRICKY * 3


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_gives_a_document_an_item(tmp_path, indent):
    path = tmp_path / "a.json"
    items = [{"text": text, "id": n} for n, text in enumerate(TRICKY * 3)]
    path.write_text(
        f" \n{json.dumps(items, indent=indent, ensure_ascii=False)}\n", encoding="utf-8"
    )
    assert read(path)["text"] == TRICKY * 3
    path.write_text("[ ]")
    assert read(path)["text"] == []


@pytest.mark.usefixtures("chunk_bytes")
def test_a_json_file_may_hold_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(lines_of(TRICKY))
    assert read(path)["text"] == TRICKY


@pytest.mark.usefixtures("chunk_bytes")
def test_a_text_file_is_one_document_or_one_a_line(tmp_path):
    path = tmp_path / "a.txt"
    content = "first \u2028 line\r\n\n \nsecond\n"
    path.write_bytes(content.encode())
    assert read(path)["text"] == [content]
    assert read(path, document="per-line")["text"] == ["first \u2028 line", "second"]
    assert read(path, "a", "b") == {"a": [content], "b": [content]}


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_compressed_files_and_byte_order_marks_change_nothing(tmp_path, name):
    content = (
        lines_of(TRICKY).encode() if name != "a.json" else json.dumps([{"text": "x"}]).encode()
    )
    plain, marked, packed = (tmp_path / f"{n}-{name}" for n in ("plain", "marked", "packed"))
    packed = packed.with_name(packed.name + ".gz")
    plain.write_bytes(content)
    marked.write_bytes(b"\xef\xbb\xbf" + content)
    packed.write_bytes(gzip.compress(content))
    assert read(marked) == read(packed) == read(plain)
    assert sum(chunk.consumed for chunk in read_chunks(plain)) == len(content)
    consumed = sum(chunk.consumed for chunk in read_chunks(packed))
    assert consumed == packed.stat().st_size


def test_every_key_has_its_texts(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "1", "b": "2"}\n{"b": "4", "a": "3"}\n')
    assert read(path, "b", "a") == {"b": ["2", "4"], "a": ["1", "3"]}


def test_a_large_file_is_read_in_pieces(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(lines_of(["x" * 1000] * 5000))
    chunks = list(read_chunks(path))
    assert len(chunks) == 5
    assert all(len(chunk.content) < documents.CHUNK_BYTES + 2000 for chunk in chunks)
    assert [chunk.first for chunk in chunks][:2] == [1, chunks[0].content.count(b"\n") + 1]


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "x"}\n\n{"text": \n',
            "a.jsonl:3: not valid JSON (Expecting value, c",
        ),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', "a.jsonl:2: not a JSON object but [1]"),
        (
            "a.jsonl",
            b'{"body": "x", "id": 1}',
            "a.jsonl:1: no key 'text'; the object has 'body', 'id'; ",
        ),
        (
            "a.jsonl",
            b"{}",
            "a.jsonl:1: no key 'text'; the object has no key; choose with --json-keys",
        ),
        ("a.jsonl", b'{"text": null}', "a.jsonl:1: the value of 'text' is not text but null"),
        (
            "a.jsonl",
            b'\n{"text": "\\ud83d!"}',
            "a.jsonl:2: the value of 'text' has half a character (\\ud83d)",
        ),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "a.jsonl:2: not valid UTF-8 (byte 0xff)"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1: not valid JSON (too deeply nested)"),
        ("a.txt", "Größe".encode("latin-1"), "a.txt:1: not valid UTF-8 (byte 0xf6)"),
        (
            "a.json",
            b'[{"text": "x"}, {"txt": 1}]',
            "a.json: item 2: no key 'text'; the object has 'txt'",
        ),
        (
            "a.json",
            b'[{"text": "x"}, {"text": ',
            "a.json: not a JSON array in UTF-8 (item 2 is not whole",
        ),
        (
            "a.json",
            b'[{"text": "x"} {"text": "y"}]',
            "not a JSON array in UTF-8 (item 1 is not whole, or",
        ),
        ("a.json", b'[{"text": "x"},]', "a.json: not a JSON array in UTF-8 (item 2 is not whole"),
        ("a.json", b'[{"text": "x"}] {}', "a.json: not a JSON array in UTF-8 (something follows"),
        ("a.json", b'[{"text": "\xff"}]', "a.json: not a JSON array in UTF-8 ('utf-8' codec"),
        ("a.jsonl.gz", b"not gzip", "a.jsonl.gz: not a whole gzip file"),
        (
            "a.jsonl.gz",
            gzip.compress(lines_of(TRICKY).encode(), mtime=0)[:-9],
            "a.jsonl.gz: not a whole gzip file",
        ),
    ],
)
def test_mistakes_name_file_and_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=re.escape(message)):
        read(path)


def test_files_come_from_files_directories_and_patterns(tmp_path):
    for name in ("b/2.txt", "b/1.jsonl.gz", "b/.hidden/x.txt", "b/x.png", "a.json", "c.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def found(*inputs: str) -> list[str]:
        files = find_files([str(tmp_path / given) for given in inputs])
        return [str(path.relative_to(tmp_path)) for path in files]

    assert found("c.md", "a.json") == ["c.md", "a.json"]
    assert found("b") == ["b/1.jsonl.gz", "b/2.txt"]
    assert found("*.*") == ["a.json", "c.md"]
    assert found("**/*.txt") == ["b/2.txt"]


def test_a_dataset_beside_its_text_is_not_text(tmp_path):
    for name in ("a.jsonl", "a_text_document.json", "a_text_document.idx", "other.json"):
        (tmp_path / name).touch()
    assert [p.name for p in find_files([str(tmp_path)])] == ["a.jsonl", "other.json"]


def test_input_that_names_nothing_readable_is_refused(tmp_path):
    (tmp_path / "x.parquet").touch()
    supported = re.escape("*.jsonl, *.json, *.txt, *.md, *.rst (or these with .gz)")
    for given, message in {
        "nothing": "no such file or directory",
        "*.jsonl": "no such file or directory",
        "": f"the directory holds no {supported} file",
        "x.parquet": f"not a {supported} file",
    }.items():
        path = str(tmp_path / given)
        with pytest.raises(UsageError, match=f"--input {re.escape(path)}: {message}"):
            find_files([path])
