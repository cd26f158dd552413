"""What `--input` names: files, directories, patterns, datasets that `datasets` saved."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ml_data.reading import find_files
from ml_models.flags import UsageError

READ = (
    r"\(\*.jsonl, \*.json, \*.csv, \*.txt, \*.md, \*.rst, each also with .gz or .zst; "
    r"\*.parquet, \*.arrow\)"
)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., None]:
    def touch(*names: str) -> None:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()

    return touch


@pytest.fixture
def found(tmp_path: Path) -> Callable[..., list[str]]:
    def find(*inputs: str) -> list[str]:
        files = find_files([str(tmp_path / given) for given in inputs])
        return [str(path.relative_to(tmp_path)) for path in files]

    return find


def save(directory: Path, names: list[str], **state: object) -> None:
    """Lay a directory out as `datasets` does."""
    directory.mkdir(parents=True)
    for name in names:
        (directory / name).touch()
    about = {"_data_files": [{"filename": name} for name in names], "_split": None, **state}
    (directory / "state.json").write_text(json.dumps(about))
    (directory / "dataset_info.json").write_text('{"features": {}}')


def test_files_come_from_files_directories_and_patterns(make, found):
    make("b/2.txt", "b/1.jsonl.gz", "b/.hidden/x.txt", "b/B.CSV.zst", "b.parquet", "a.json", "c.md")
    assert found("c.md", "a.json") == ["c.md", "a.json"]
    assert found("b") == ["b/1.jsonl.gz", "b/2.txt", "b/B.CSV.zst"]
    assert found("*.[jm]*") == ["a.json", "c.md"]
    assert found("**/*.txt") == ["b/2.txt"]
    everything = ["a.json", "b/1.jsonl.gz", "b/2.txt", "b/B.CSV.zst", "b.parquet", "c.md"]
    assert sorted(found("")) == sorted(found("*")) == sorted(found("**")) == sorted(everything)


def test_all_files_of_a_directory_are_read_whatever_their_types(make, found, caplog):
    make("a.jsonl", "b.txt", "c.parquet", "d.csv.gz", "sub/e.arrow")
    assert found("") == ["a.jsonl", "b.txt", "c.parquet", "d.csv.gz", "sub/e.arrow"]
    assert caplog.messages == []


def test_what_is_not_read_of_a_directory_is_named(make, found, caplog, tmp_path):
    make("a.jsonl", "b.png", "LICENSE", "sub/c.tsv", ".git/config")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nothing")
    assert found("") == ["a.jsonl"]
    names = "LICENSE, b.png, gone.jsonl, sub/c.tsv"
    assert caplog.messages == [f"--input {tmp_path}: not read: {names}"]
    caplog.clear()
    make(*(f"{n}.png" for n in range(2000)))
    found("")
    names = "0.png, 1.png, 10.png, 100.png, 1000.png"
    assert caplog.messages == [f"--input {tmp_path}: not read: {names} and 1,999 more"]


def test_what_describes_data_is_not_data(make, found, caplog, tmp_path):
    make("README.md", "license.txt", "dataset_infos.json", "data/a.jsonl", "data/readme.rst")
    make("docs/README.md", "docs/b.md")
    assert found("") == ["data/a.jsonl", "docs/README.md", "docs/b.md"]
    ignored = "README.md, data/readme.rst, dataset_infos.json, license.txt"
    assert caplog.messages == [f"--input {tmp_path}: not read: {ignored}"]
    assert found("docs") == ["docs/README.md", "docs/b.md"]  # documents, no data
    assert found("README.md", "dataset_infos.json") == ["README.md", "dataset_infos.json"]


def test_a_dataset_of_tokens_beside_its_text_is_not_text(make, found):
    make("a.jsonl", "a_text_document.json", "a_text_document.idx", "a_text_document.bin")
    make("b.json", "b_packed.json", "b_packed_labels_document.idx", "a.json", "other_packed.json")
    make("b_text_document.idx")
    assert found("") == ["a.json", "a.jsonl", "b.json", "other_packed.json"]


def test_directories_behind_links_are_read_once(make, found, tmp_path):
    make("far/a.jsonl", "near/b.jsonl")
    (tmp_path / "near" / "far").symlink_to(tmp_path / "far")
    (tmp_path / "near" / "loop").symlink_to(tmp_path / "near")
    assert found("near") == ["near/b.jsonl", "near/far/a.jsonl"]


def test_input_that_names_nothing_readable_is_refused(make, tmp_path):
    make("x.tsv", "empty/x.png", "noextension")
    for given, message in {
        "nothing": "no such file or directory",
        "*.jsonl": "no such file or directory",
        "empty": f"the directory holds no file to read {READ}",
        "x.tsv": f"not a file that can be read {READ}",
        "*.tsv": f"{re.escape(str(tmp_path))}/x.tsv: not a file that can be read {READ}",
        "noextension": f"not a file that can be read {READ}",
    }.items():
        path = str(tmp_path / given)
        with pytest.raises(UsageError, match=f"^--input {re.escape(path)}: {message}$"):
            find_files([path])


def test_a_saved_dataset_gives_its_files_in_its_order(make, found, caplog, tmp_path):
    names = [f"data-{n:05d}-of-00003.arrow" for n in (2, 0, 1)]
    save(tmp_path / "sets" / "one", names)
    (tmp_path / "sets" / "one" / "cache-1234.arrow").touch()  # what `datasets` leaves beside it
    make("sets/two.jsonl")
    assert found("sets/one") == [f"sets/one/{name}" for name in names]
    assert found("sets") == [*(f"sets/one/{name}" for name in names), "sets/two.jsonl"]
    assert found("sets/on*") == found("sets/one")
    assert caplog.messages == []


def test_of_a_saved_dataset_of_splits_train_is_read(found, caplog, tmp_path):
    for split in ("train", "test", "validation"):
        save(tmp_path / "all" / split, ["data-00000-of-00001.arrow"])
    about = tmp_path / "all" / "dataset_dict.json"
    about.write_text('{"splits": ["train", "test", "validation"]}')
    assert found("all") == ["all/train/data-00000-of-00001.arrow"]
    assert caplog.messages == [f"--input {tmp_path / 'all'}: not read: test, validation"]
    assert found("all/test") == ["all/test/data-00000-of-00001.arrow"]
    about.write_text('{"splits": ["test", "validation"]}')
    message = "all: a saved dataset with the splits test, validation and no train; give the "
    with pytest.raises(UsageError, match=message):
        found("all")


def test_a_saved_dataset_that_is_not_whole_is_refused(found, tmp_path):
    directory = tmp_path / "one"
    save(directory, ["a.arrow", "b.arrow"])
    (directory / "b.arrow").unlink()
    with pytest.raises(UsageError, match=r"one: a saved dataset without its file b\.arrow"):
        found("one")
    (directory / "state.json").write_text('{"_data_files": [')
    with pytest.raises(UsageError, match=r"state\.json: not valid JSON"):
        found("one")
    (directory / "state.json").write_text('{"_data_files": [1]}')
    with pytest.raises(UsageError, match=r"one/state\.json: _data_files is not a list of files"):
        found("one")
    save(tmp_path / "old", ["a.arrow"], _indices_data_files=[{"filename": "indices.arrow"}])
    with pytest.raises(UsageError, match="old: a dataset saved with indices beside its rows; save"):
        found("old")
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(UsageError, match="all: a saved dataset without its split train"):
        found("all")


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("a.parquet", "pyarrow", "arrow"),
        ("a.arrow", "pyarrow", "arrow"),
        ("a.csv.zst", "zstandard", "zstd"),
    ],
)
def test_a_missing_package_is_said_before_anything_is_read(
    make, found, monkeypatch, name, package, extra
):
    make("a.jsonl", name)
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"{name}: needs {package} \(pip install 'ml-data\[{extra}\]'\)"
    with pytest.raises(UsageError, match=message):
        found("a.jsonl", name)
    assert found("a.jsonl") == ["a.jsonl"]


def test_no_name_is_not_the_working_directory(make, tmp_path, monkeypatch):
    make("a.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"^--input '': names no file, directory or pattern$"):
        find_files(["a.jsonl", ""])
