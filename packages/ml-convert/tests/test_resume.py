"""An interrupted conversion is continued where it was, and only if it is the same conversion."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ml_convert import ConversionError, Request, VerificationError, convert
from ml_convert.cli import main
from ml_convert.journal import JOURNAL
from ml_parallel import checkpoint

SLOW = """
import contextlib, sys, time
from ml_convert import cli

def progress(what, nbytes, total):
    if what == "hashing":
        print("ready", flush=True)
        time.sleep(float(sys.argv[1]))

cli._progress_bar = lambda: contextlib.nullcontext(progress)
sys.exit(cli.main(sys.argv[2:]))
"""


def request(hf, tmp_path, **options):
    options = {"target_tensor_parallel_size": 2, "target_pipeline_parallel_size": 2, **options}
    return Request(load_dir=hf.path, save_dir=tmp_path / "out", save_format="mcore", **options)


def interrupted(hf, tmp_path, how, *more):
    """Stop a conversion when its first file is done; returns what is left."""
    words = ["--load-dir", hf.path, "--save-dir", tmp_path / "out", "--save-format", "mcore"]
    words += ["--target-tensor-parallel-size", 2, "--target-pipeline-parallel-size", 2]
    seconds = "60" if how == signal.SIGKILL else "2"  # Ctrl-C lets threads end what they do
    command = [sys.executable, "-c", SLOW, seconds, *map(str, words), "--workers", "1", *more]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout.readline() == "ready\n"
        run.send_signal(how)
        run.wait(90)
    return sorted(path for path in tmp_path.rglob("*.tmp-*") if path.is_dir())


def append(path, text):
    with path.open("a") as file:
        file.write(text)


def contents(root):
    files = (path for path in root.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def times(directory):
    return {path.relative_to(directory).parent.name: path.stat().st_mtime_ns
            for path in directory.rglob("*.pt")}  # fmt: skip


@pytest.fixture
def whole(tmp_path, make_hf):
    """A model, and what its conversion gives without an interruption."""
    hf = make_hf()
    convert(request(hf, tmp_path / "whole"))
    return hf, contents(tmp_path / "whole" / "out")


def test_finished_files_of_a_killed_conversion_are_kept(tmp_path, whole):
    hf, expected = whole
    (left,) = interrupted(hf, tmp_path, signal.SIGKILL)
    for load_dir in (tmp_path / "out", left):
        with pytest.raises(ConversionError):
            convert(Request(load_dir=load_dir, save_dir=tmp_path / "x", save_format="hf"))
    first, *lines = (left / JOURNAL).read_text().splitlines()
    assert set(json.loads(first)) == {"plan"}
    (done,) = (json.loads(line)["file"] for line in lines)
    append(left / JOURNAL, '{"file": "mp_rank_01_')  # torn by the kill
    before = times(left)
    read = []
    report = convert(
        request(hf, tmp_path, resume=True),
        progress=lambda what, nbytes, _: read.append(nbytes) if what == "hashing" else None,
    )
    assert report.verified
    assert contents(tmp_path / "out") == expected
    after = times(tmp_path / "out" / "release")
    assert [rank for rank in after if after[rank] == before[rank]] == [Path(done).parent.name]
    assert len(read) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out", "whole"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "latest_checkpointed_iteration.txt",
        "release",
    ]


def test_without_the_flag_it_is_reported_and_done_again(tmp_path, whole, caplog):
    hf, expected = whole
    (left,) = interrupted(hf, tmp_path, signal.SIGKILL)
    convert(request(hf, tmp_path))
    assert f"removing {left}, left over by an interrupted conversion (1 files were d" in caplog.text
    assert contents(tmp_path / "out") == expected
    assert not left.exists()


def test_ctrl_c_keeps_what_is_done_only_with_the_flag(tmp_path, whole):
    hf, expected = whole
    assert interrupted(hf, tmp_path, signal.SIGINT) == []
    assert not (tmp_path / "out").exists()
    (left,) = interrupted(hf, tmp_path, signal.SIGINT, "--resume")
    before = times(left)
    convert(request(hf, tmp_path, resume=True))
    assert contents(tmp_path / "out") == expected
    assert set(before.values()) & set(times(tmp_path / "out").values())


@pytest.mark.parametrize("change", ["flags", "source", "size"])
def test_another_conversion_begins_anew(tmp_path, whole, change):
    hf, expected = whole
    (left,) = interrupted(hf, tmp_path, signal.SIGKILL)
    options = {}
    if change == "flags":
        options = {"pad_vocab": "last-row"}
    elif change == "source":
        os.utime(hf.path / "model.safetensors", (1, 1))
    else:
        for path in left.rglob("*.pt"):
            append(path, "x")
    convert(request(hf, tmp_path, resume=True, **options))
    found = contents(tmp_path / "out")
    assert (found == expected) == (change != "flags")
    if change != "flags":
        assert not left.exists()
    assert JOURNAL not in {path.rpartition("/")[2] for path in found}
    convert(request(hf, tmp_path, verify_only=True, **options))


def test_what_was_found_wrong_is_not_gone_on_with(tmp_path, whole):
    hf, expected = whole

    def damage(what, _nbytes, _total):
        if what == "verifying":
            (path,) = (tmp_path / "out").rglob("mp_rank_01_001/*.pt")
            path.write_bytes(bytes(path.stat().st_size))

    with pytest.raises(VerificationError):
        convert(request(hf, tmp_path, resume=True, workers=1), progress=damage)
    assert not (tmp_path / "out").exists()
    convert(request(hf, tmp_path, resume=True))
    assert contents(tmp_path / "out") == expected


def test_a_manifest_that_finds_no_room_costs_nothing_else(tmp_path, whole, monkeypatch):
    hf, expected = whole

    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_manifest", full)
        with pytest.raises(OSError, match="No space left"):
            convert(request(hf, tmp_path, resume=True))
    (left,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    before = times(left)
    assert convert(request(hf, tmp_path, resume=True)).resumed == len(before) == 4
    assert contents(tmp_path / "out") == expected
    assert sorted(times(tmp_path / "out").values()) == sorted(before.values())


def test_what_is_there_already_needs_no_room(tmp_path, whole, monkeypatch):
    hf, expected = whole
    interrupted(hf, tmp_path, signal.SIGKILL)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert convert(request(hf, tmp_path, resume=True)).resumed == 1
    assert contents(tmp_path / "out") == expected


def test_the_command_says_what_it_took_over(tmp_path, whole, capsys):
    hf, _ = whole
    interrupted(hf, tmp_path, signal.SIGKILL)
    words = ["--load-dir", hf.path, "--save-dir", tmp_path / "out", "--save-format", "mcore"]
    words += ["--target-tensor-parallel-size", 2, "--target-pipeline-parallel-size", 2]
    assert main([*map(str, words), "--resume"]) == 0
    assert capsys.readouterr().out.endswith(" s, files done before: 1, verified bit by bit\n")


def test_files_that_nobody_finished_are_no_part_of_the_result(tmp_path, whole):
    hf, expected = whole
    (left,) = interrupted(hf, tmp_path, signal.SIGKILL)
    (left / f"{JOURNAL}.tmp-host-1").write_text("{")
    (left / "mp_rank_00_000" / "other").write_text("")
    convert(request(hf, tmp_path, resume=True))
    assert contents(tmp_path / "out") == expected
