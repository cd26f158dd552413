"""A directory of the cache is complete or absent, for whoever looks at whatever moment."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ml_models.flags import UsageError
from ml_train.index_cache import open_cache


def fill(directory: Path) -> None:
    (directory / "index").write_text("content")


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_it_is_found_once_it_is_published(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "cache"
    building = open_cache(root, "key")
    fill(building.directory)
    assert not (root / "key").exists()
    building.publish()
    assert names(root) == ["key"]
    found = open_cache(root, "key")
    assert (found.directory, found.final) == (root / "key", None)
    found.publish()
    found.discard()
    assert (root / "key" / "index").read_text() == "content"


def test_what_is_discarded_leaves_nothing(tmp_path: Path) -> None:
    building = open_cache(tmp_path, "key")
    fill(building.directory)
    building.discard()
    assert names(tmp_path) == []


def test_a_faster_run_wins_and_open_files_stay_readable(tmp_path: Path) -> None:
    slow = open_cache(tmp_path, "key")
    fill(slow.directory)
    fast = tmp_path / "key"
    fast.mkdir()
    (fast / "index").write_text("the same")
    with (slow.directory / "index").open() as file:
        slow.publish()
        assert file.read() == "content"
    assert names(tmp_path) == ["key"]
    assert (fast / "index").read_text() == "the same"


def test_what_a_killed_process_left_is_removed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    killed = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        here = socket.gethostname()
        left = [f"key.tmp-{here}-{killed.pid}", f"other.tmp-{here}-{killed.pid}"]
        kept = [
            f"key.tmp-{here}-{living.pid}",
            f"key.tmp-elsewhere-{killed.pid}",
            f"key.tmp-{here}-notes",
            "other",
        ]
        for name in left + kept:
            (tmp_path / name).mkdir()
            fill(tmp_path / name)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        open_cache(tmp_path, "key").discard()
        assert names(tmp_path) == sorted(kept)
    finally:
        for process in (killed, living):
            process.kill()
            process.communicate()


def test_a_place_that_cannot_hold_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError) as caught:
        open_cache(tmp_path / "file" / "cache", "key")
    assert str(caught.value) == (
        f"cannot keep the order of the samples in {tmp_path}/file/cache (Not a directory): "
        "--data-cache-path names another directory"
    )


def test_a_failed_write_names_the_place(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, "key")
    with pytest.raises(OSError, match="order of the samples in") as caught, cache.naming():
        raise OSError("1000 requested and 24 written")
    assert f"in {tmp_path} (1000 requested and 24 written)" in str(caught.value)
    with pytest.raises(ZeroDivisionError), cache.naming():
        raise ZeroDivisionError  # what is no failed write is not touched
