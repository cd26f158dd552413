"""Whatever goes wrong is one line and an exit code; what was there before is there still, whole.

For every command that writes; what is special to one of them is tested with it.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ml_data.cli import main
from ml_data.indexed import IndexedDataset

RECORDS = [
    {
        "text": f"{n}. " + "So it goes. " * (n % 7),
        "instruction": f"Why {n}?",
        "output": f"{n} times",
    }
    | {"chosen": f"Because {n}", "rejected": "No", "input": ""}
    for n in range(60)
]
"""Records that every command can read."""

COMMANDS = {
    "pretrain": ["--append-eod"],
    "instruct": ["--handler-name", "AlpacaStyleInstructionHandler", "--prompt-type", "default"],
    "preference": ["--handler-name", "AlpacaStylePairwiseHandler", "--prompt-type", "default"],
}
COLUMN = {"pretrain": "text", "instruct": "instruction", "preference": "chosen"}
"""A column that a command needs."""

every_command = pytest.mark.parametrize("command", list(COMMANDS))


def lines(records: list[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def argv(command: str, source: Path | str, tokenizer: Path, out: Path, *flags: str) -> list[str]:
    common = ["--input", str(source), "--output-prefix", str(out / "data"), "--workers", "1"]
    tokenizer_flags = ["--tokenizer-name-or-path", str(tokenizer)]
    return [command, *common, *tokenizer_flags, *COMMANDS[command], *flags]


def files(directory: Path) -> dict[str, bytes]:
    """Return every file, hidden ones too."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def documents(out: Path) -> int:
    """Return how many documents each of the datasets has: all the same number."""
    (number,) = {len(IndexedDataset(path.with_suffix(""))) for path in out.glob("*.idx")}
    return number


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def source(tmp_path) -> Path:
    (tmp_path / "records.jsonl").write_text(lines(RECORDS))
    return tmp_path / "records.jsonl"


@pytest.fixture
def old(request, bpe, source, out) -> dict[str, bytes]:
    """The files of an earlier run of the command under test."""
    assert main(argv(request.getfixturevalue("command"), source, bpe, out)) == 0
    return files(out)


def fails(capsys, words: list[str], code: int = 2) -> str:
    """Run a command that fails; return its one line."""
    capsys.readouterr()
    assert main(words) == code
    error = capsys.readouterr().err
    assert error.startswith(f"ml-data {words[0]}: ")
    assert error.count("\n") == 1
    return error


# Records


BROKEN = {
    "not JSON": (b'{"text": "a', "not valid JSON"),
    "not an object": (b"[1, 2]", "not a JSON object"),
    "not UTF-8": (b'{"text": "\xff\xfe"}', "UTF-8"),
    "half of a surrogate": (rb'{"text": "\ud800"}', "half a character"),
}


@every_command
@pytest.mark.parametrize("kind", list(BROKEN))
def test_a_broken_record_is_named_or_counted(command, kind, bpe, tmp_path, out, capsys, caplog):
    content, message = BROKEN[kind]
    broken = tmp_path / "broken.jsonl"
    whole = lines(RECORDS).encode().splitlines(keepends=True)
    broken.write_bytes(b"".join([*whole[:7], content, b"\n", *whole[7:]]))
    error = fails(capsys, argv(command, broken, bpe, out))
    assert re.search(rf"broken\.jsonl:8: .*({message})", error)
    assert "--on-error skip" in error
    assert files(out) == {}
    caplog.set_level("INFO")
    assert main(argv(command, broken, bpe, out, "--on-error", "skip")) == 0
    assert documents(out) == 60
    account = [m for m in caplog.messages if "records read" in m]
    assert account[0].startswith("61 records read: 60 written; 1 failed")
    assert re.search(rf"broken\.jsonl:8: .*({message})", caplog.text)


@every_command
def test_a_missing_column_is_named_with_those_that_are_there(command, bpe, tmp_path, out, capsys):
    column = COLUMN[command]
    records = [dict(record) for record in RECORDS]
    del records[3][column]
    (tmp_path / "records.jsonl").write_text(lines(records))
    error = fails(capsys, argv(command, tmp_path / "records.jsonl", bpe, out))
    assert f"records.jsonl:4: no column '{column}'" in error
    assert all(f"'{name}'" in error for name in records[3])
    assert files(out) == {}


@every_command
@pytest.mark.parametrize("value", [5, {"a": 1}])
def test_a_column_that_is_no_text_is_named(command, value, bpe, tmp_path, out, capsys):
    records = [*RECORDS[:2], {**RECORDS[2], COLUMN[command]: value}]
    (tmp_path / "records.jsonl").write_text(lines(records))
    error = fails(capsys, argv(command, tmp_path / "records.jsonl", bpe, out))
    assert "records.jsonl:3: " in error
    assert COLUMN[command] in error
    assert files(out) == {}


@pytest.mark.parametrize(
    ("command", "value"),
    [("pretrain", ""), ("pretrain", None), ("instruct", ""), ("preference", "")],
)
def test_records_without_text_are_counted(command, value, bpe, tmp_path, out, caplog):
    caplog.set_level("INFO")
    records = [*RECORDS[:5], {**RECORDS[5], COLUMN[command]: value}]
    (tmp_path / "records.jsonl").write_text(lines(records))
    assert main(argv(command, tmp_path / "records.jsonl", bpe, out)) == 0
    assert documents(out) == 5
    account = next(m for m in caplog.messages if "records read" in m)
    assert re.fullmatch(r"6 records read: 5 written; 1 skipped: \S.*", account)


@pytest.mark.parametrize(
    "roles", ["gpt human", "human human gpt", "human", "human gpt human", "human judge"]
)
def test_roles_out_of_order_are_named(roles, bpe, tmp_path, out, capsys):
    good = [{"from": role, "value": "x"} for role in ("human", "gpt")]
    wrong = [{"from": role, "value": "x"} for role in roles.split()]
    records = [{"conversations": good}, {"conversations": wrong}, {"conversations": good}]
    (tmp_path / "talks.jsonl").write_text(lines(records))
    words = argv("instruct", tmp_path / "talks.jsonl", bpe, out)
    words[words.index("AlpacaStyleInstructionHandler")] = "SharegptStyleInstructionHandler"
    assert "talks.jsonl:2: " in fails(capsys, words)
    assert files(out) == {}
    assert main([*words, "--on-error", "skip"]) == 0
    assert documents(out) == 2


# Files


@every_command
def test_a_directory_of_several_kinds_of_files_is_read_whole(command, bpe, tmp_path, out, caplog):
    directory = tmp_path / "mixed"
    directory.mkdir()
    (directory / "a.jsonl").write_text(lines(RECORDS[:10]))
    (directory / "b.json").write_text(json.dumps(RECORDS[10:30]))
    with gzip.open(directory / "c.jsonl.gz", "wt") as file:
        file.write(lines(RECORDS[30:45]))
    (directory / "d.csv").write_text(csv_of(RECORDS[45:]))
    (directory / "e.pdf").write_bytes(b"%PDF")
    assert main(argv(command, directory, bpe, out)) == 0
    assert documents(out) == 60
    assert "e.pdf" in caplog.text
    together = files(out)
    shutil.rmtree(directory)
    directory.mkdir()
    (directory / "a.jsonl").write_text(lines(RECORDS))
    assert main(argv(command, directory, bpe, out)) == 0
    assert {
        name: content for name, content in files(out).items() if not name.endswith(".json")
    } == {name: content for name, content in together.items() if not name.endswith(".json")}


def csv_of(records: list[dict]) -> str:
    import csv
    import io

    text = io.StringIO()
    writer = csv.DictWriter(text, records[0])
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


@every_command
def test_a_compressed_file_cut_off_is_an_error_whatever_is_skipped(
    command, bpe, tmp_path, out, capsys
):
    cut = gzip.compress(lines(RECORDS * 50).encode())[:-200]
    (tmp_path / "cut.jsonl.gz").write_bytes(cut)
    words = argv(command, tmp_path / "cut.jsonl.gz", bpe, out, "--on-error", "skip")
    assert "cut.jsonl.gz" in fails(capsys, words)
    assert files(out) == {}


@every_command
@pytest.mark.parametrize("content", ["\n", "[]"])
def test_nothing_to_write_is_an_error(command, content, bpe, tmp_path, out, capsys):
    (tmp_path / "empty.json").write_text(content)
    error = fails(capsys, argv(command, tmp_path / "empty.json", bpe, out))
    assert re.search("0 records read|no records", error)
    assert files(out) == {}


@every_command
def test_a_tokenizer_without_an_end_of_text_cannot_append_one(
    command, bpe, source, tmp_path, out, capsys
):
    (tmp_path / "bare").mkdir()
    shutil.copy(bpe / "tokenizer.json", tmp_path / "bare")
    flags = [] if command == "pretrain" else ["--append-eod"]
    error = fails(capsys, argv(command, source, tmp_path / "bare", out, *flags))
    assert re.search("end-of-text|ends a text", error)
    assert files(out) == {}


# Output


@every_command
def test_an_output_that_exists_is_replaced(command, bpe, source, out, old, tmp_path):
    (tmp_path / "other.jsonl").write_text(lines(RECORDS[:9]))
    assert main(argv(command, tmp_path / "other.jsonl", bpe, out)) == 0
    assert documents(out) == 9
    assert files(out).keys() == old.keys()
    assert main(argv(command, source, bpe, out)) == 0
    assert {name for name, content in files(out).items() if content != old[name]} == set()


@every_command
@pytest.mark.parametrize("name", ["file/data", "dir/"])
def test_an_output_that_cannot_be_is_named(command, name, bpe, source, out, capsys):
    (out / "file").touch()
    words = argv(command, source, bpe, out)
    words[words.index("--output-prefix") + 1] = f"{out}/{name}"
    fails(capsys, words)
    assert files(out) == {"file": b""}


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """As far as a process can tell: no file grows beyond `size`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@every_command
@pytest.mark.parametrize("size", [1, 700])
def test_a_full_disk_leaves_the_old_files(command, size, bpe, source, out, old, capsys):
    with full_disk(size):
        error = fails(capsys, argv(command, source, bpe, out), 1)
    assert re.search(rf": File too large: {out}/data_\S+\n", error)
    assert files(out) == old


@pytest.mark.parametrize("size", [1, 700])
def test_a_full_disk_leaves_the_old_files_of_a_merge(size, bpe, source, tmp_path, out, capsys):
    (tmp_path / "parts").mkdir()
    for part in ("one", "two"):
        assert main(argv("pretrain", source, bpe, tmp_path / "parts")) == 0
        for path in (tmp_path / "parts").glob("data*"):
            path.rename(path.with_name(path.name.replace("data", part)))
    words = ["merge", "--input", str(tmp_path / "parts"), "--output-prefix", str(out / "data")]
    assert main(words) == 0
    assert documents(out) == 120
    old = files(out)
    with full_disk(size):
        assert f": File too large: {out}/data_" in fails(capsys, words, 1)
    assert files(out) == old


# Dying


@pytest.fixture(scope="module")
def long_source(tmp_path_factory) -> Path:
    """Some seconds of work for every command."""
    path = tmp_path_factory.mktemp("long") / "records.jsonl"
    path.write_text(lines([{**record, "text": record["text"] * 30} for record in RECORDS * 1500]))
    return path


def start(words: list[str]) -> subprocess.Popen[str]:
    """Start a command in a process group of its own, and wait until it is at work."""
    more = ["--workers", "2", "--log-interval", "1"]
    command = [sys.executable, "-m", "ml_data", *words, *more]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for line in job.stderr:
        if line.startswith("Processed "):
            return job
    raise AssertionError(f"{words[0]} ended with {job.wait()} before it began to work")


def below(pid: int) -> list[int]:
    """Return the processes that `pid` started, and those that they started: the workers last."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [child for child, parent in parents.items() if parent == pid]
    return found + [child for child, parent in parents.items() if parent in found]


@pytest.mark.parametrize("command", ["instruct", "preference"])
def test_a_killed_worker_ends_the_job(command, bpe, long_source, out, old):
    job = start(argv(command, long_source, bpe, out))
    victim = below(job.pid)[-1]
    os.kill(victim, signal.SIGKILL)
    begin = time.monotonic()
    last = job.communicate(timeout=60)[1].splitlines()[-1]
    assert time.monotonic() - begin < 30
    assert job.returncode == 1
    assert last.startswith(f"ml-data {command}: worker process {victim} was killed by SIGKILL")
    assert files(out) == old


@pytest.mark.parametrize("command", ["instruct", "preference"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_job_quietly(command, number, code, bpe, long_source, out, old):
    job = start(argv(command, long_source, bpe, out))
    workers = below(job.pid)
    os.killpg(job.pid, number)  # as a terminal does
    errors = job.communicate(timeout=60)[1]
    assert all(line.startswith("Processed ") for line in errors.splitlines())
    assert job.returncode == code
    assert files(out) == old
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize("command", ["instruct", "pretrain"])
def test_after_a_kill_the_old_files_are_whole_and_the_next_run_is_right(
    command, bpe, source, long_source, out, old
):
    job = start(argv(command, long_source, bpe, out))
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate(timeout=60)
    left = files(out)
    assert {name: left[name] for name in old} == old
    assert all(name.startswith(".") for name in left.keys() - old.keys())
    assert main(argv(command, source, bpe, out)) == 0
    assert files(out) == old
