from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ml_data.atomic import FileSet, naming
from ml_models.flags import UsageError


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def publish(directory: Path, content: bytes) -> None:
    with FileSet() as files:
        for suffix in ("bin", "json", "idx"):
            files.create(directory / f"data.{suffix}").write(content)
        files.publish()


def test_files_appear_only_when_published(tmp_path):
    with FileSet() as files:
        files.create(tmp_path / "new" / "data.bin").write(b"1")
        assert not (tmp_path / "new" / "data.bin").exists()
        files.publish()
    assert names(tmp_path / "new") == ["data.bin"]
    assert (tmp_path / "new" / "data.bin").read_bytes() == b"1"


def test_what_was_not_published_leaves_nothing_and_changes_nothing(tmp_path):
    publish(tmp_path, b"old")
    with FileSet() as files:
        files.create(tmp_path / "data.bin").write(b"new")
        files.create(tmp_path / "data.more").write(b"new")
    assert names(tmp_path) == ["data.bin", "data.idx", "data.json"]
    assert (tmp_path / "data.bin").read_bytes() == b"old"


def test_a_crash_while_publishing_never_leaves_an_index_of_another_run(tmp_path):
    """The process dies before each of its steps in turn; what `.idx` describes is always whole."""

    class Crash(BaseException):
        pass

    steps = 0

    def counted(method):
        def step(self: Path, *args, **options):
            nonlocal steps
            steps -= 1
            if steps < 0:
                raise Crash
            return method(self, *args, **options)

        return step

    outcomes = set()
    for survive in range(7):
        directory = tmp_path / str(survive)
        directory.mkdir()
        publish(directory, b"old")
        with pytest.MonkeyPatch.context() as patch:
            steps = survive
            patch.setattr(Path, "unlink", counted(Path.unlink))
            patch.setattr(Path, "replace", counted(Path.replace))
            files = FileSet()
            for suffix in ("bin", "json", "idx"):
                files.create(directory / f"data.{suffix}").write(b"new")
            try:
                files.publish()
            except Crash:
                files._close()  # as the end of the process would
        found = {
            path.suffix: path.read_bytes()
            for path in directory.iterdir()
            if path.suffix in SUFFIXES
        }
        outcomes.add(found.get(".idx"))
        if ".idx" in found:
            assert found == dict.fromkeys(SUFFIXES, found[".idx"])
    assert outcomes == {b"old", None, b"new"}


SUFFIXES = (".bin", ".json", ".idx")


def test_a_file_that_another_process_writes_is_left_alone(tmp_path):
    with FileSet() as files:
        first = files.create(tmp_path / "data.bin")
        first.write(b"first")
        first.flush()
        with (
            pytest.raises(UsageError, match=r"another process is writing .*data\.bin"),
            FileSet() as other,
        ):
            other.create(tmp_path / "data.bin")
        files.publish()
    assert (tmp_path / "data.bin").read_bytes() == b"first"
    assert names(tmp_path) == ["data.bin"]


def test_left_overs_of_a_killed_writer_are_used_up(tmp_path):
    script = (
        "import sys, time; from ml_data.atomic import FileSet\n"
        "file = FileSet().create(sys.argv[1]); file.write(b'half a run'); file.flush()\n"
        "print('written', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "data.bin")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        writer.kill()
    assert names(tmp_path) == [".data.bin.partial"]
    publish(tmp_path, b"whole")
    assert names(tmp_path) == ["data.bin", "data.idx", "data.json"]
    assert (tmp_path / "data.bin").read_bytes() == b"whole"


def test_an_interrupt_waits_until_everything_is_published(tmp_path, monkeypatch):
    replace = Path.replace

    def interrupted(self, target):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path, b"new")
    assert names(tmp_path) == ["data.bin", "data.idx", "data.json"]


def test_a_directory_that_is_a_file_is_named(tmp_path):
    (tmp_path / "out").write_text("")
    with FileSet() as files, pytest.raises(UsageError, match=r"/out: not a directory$"):
        files.create(tmp_path / "out" / "data.bin")


def test_a_failed_write_names_its_file(tmp_path):
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*data\.bin'"),
        naming(tmp_path / "data.bin"),
    ):
        raise OSError(28, "No space left on device")
