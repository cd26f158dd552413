"""Reading, writing and sharing work between threads."""

import errno
import os
import resource
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ml_convert.errors import ConversionError
from ml_convert.files import Buffers, Files, for_each


def test_bytes_go_to_their_place_and_come_back(tmp_path):
    path = tmp_path / "deep" / "file"
    content = np.arange(100, dtype=np.uint8).reshape(10, 10)
    with Files() as files:
        files.create(path, 1000)
        files.write(path, 300, content)
        found = np.empty((10, 10), np.uint8)
        files.read(path, 300, found)
    np.testing.assert_array_equal(found, content)
    assert path.stat().st_size == 1000
    assert path.read_bytes()[:300] == bytes(300)


@pytest.mark.parametrize("missing", ["on this system", "on this file system"])
def test_files_get_their_size_where_room_cannot_be_reserved(tmp_path, monkeypatch, missing):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    if missing == "on this system":
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    with Files() as files:
        files.create(tmp_path / "file", 1000)
    assert (tmp_path / "file").read_bytes() == bytes(1000)


def test_files_have_the_usual_permissions(tmp_path):
    old = os.umask(0o027)
    try:
        with Files() as files:
            files.create(tmp_path / "file", 10)
    finally:
        os.umask(old)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_file_that_ends_too_early_is_named(tmp_path):
    path = tmp_path / "short"
    path.write_bytes(b"12345")
    with Files() as files, pytest.raises(ConversionError, match="short: torn, it ends at byte 5"):
        files.read(path, 2, np.empty(10, np.uint8))


def test_an_existing_file_is_not_overwritten(tmp_path):
    (tmp_path / "file").write_bytes(b"precious")
    with Files() as files, pytest.raises(FileExistsError):
        files.create(tmp_path / "file", 10)
    assert (tmp_path / "file").read_bytes() == b"precious"


def test_more_files_than_the_soft_limit_can_be_open(tmp_path):
    for number in range(300):
        (tmp_path / str(number)).write_bytes(bytes([number % 251]))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, limits[1]))
    try:
        with Files() as files:
            buffer = np.empty(1, np.uint8)
            for number in range(300):
                files.read(tmp_path / str(number), 0, buffer)
                assert buffer[0] == number % 251
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("workers", [1, 4])
def test_every_item_is_worked_on_once(workers):
    done = []
    for_each(range(1000), done.append, workers=workers)
    assert sorted(done) == list(range(1000))


def test_the_first_error_stops_all_threads_and_is_raised():
    done = []

    def work(item):
        if item == 10:
            raise ConversionError("item 10")
        done.append(item)

    with pytest.raises(ConversionError, match="item 10"):
        for_each(range(10**9), work, workers=4)
    assert len(done) < 10**6


def test_an_interrupt_stops_the_threads():
    started = threading.Event()

    def items():
        yield 1
        started.wait(10)
        raise KeyboardInterrupt
        yield 2

    with pytest.raises(KeyboardInterrupt):
        for_each(items(), lambda _: started.set(), workers=2)
    assert started.is_set()


def test_an_interrupt_while_threads_are_started_stops_them(monkeypatch):
    class Interrupted(ThreadPoolExecutor):
        def submit(self, *args):
            super().submit(*args)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("ml_convert.files.ThreadPoolExecutor", Interrupted)
    done = []

    def work(item):
        time.sleep(0.001)
        done.append(item)

    with pytest.raises(KeyboardInterrupt):
        for_each(range(2000), work, workers=2)
    assert len(done) < 1000


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("interrupts", [1, 2, 5])
def test_items_in_progress_end_before_an_interrupt_arrives(interrupts, fails):
    """Else the files would be closed under threads that write to them."""
    begun, ended = [], []
    both_work = threading.Barrier(2)

    def work(item):
        begun.append(item)
        both_work.wait(10)
        if item == 0:
            for _ in range(interrupts):
                time.sleep(0.1)
                os.kill(os.getpid(), signal.SIGINT)
        elif fails:
            raise ConversionError("item 1")
        time.sleep(0.3)
        ended.append(item)

    with pytest.raises(KeyboardInterrupt):
        for_each(range(2), work, workers=2)
    assert sorted(begun) == [0, 1]
    assert sorted(ended) == ([0] if fails else [0, 1])


def test_a_threads_memory_is_used_again():
    buffers = Buffers()
    first = buffers.take("a", 4, 10)
    assert buffers.take("a", 2, 10).base is first.base
    assert buffers.take("b", 4, 10).base is not first.base
    assert buffers.take("a", 8, 10).shape == (8, 10)
    others = []
    thread = threading.Thread(target=lambda: others.append(buffers.take("a", 4, 10)))
    thread.start()
    thread.join()
    assert others[0].base is not buffers.take("a", 4, 10).base
