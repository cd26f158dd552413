"""Positioned reads and writes on many open files, from many threads."""

from __future__ import annotations

import errno
import os
import resource
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import TypeGuard, TypeVar

import numpy as np

from ml_convert.errors import ConversionError
from ml_convert.tensor import ZEROS

# Larger writes get larger pages, which a virtual machine may have to get from its host: up to three
# times the system time. Where it need not, smaller ones take 7% more CPU time (docs/benchmarks.md).
_WRITTEN_AT_ONCE = 256 << 10  # bytes
_LONGEST_NAME = 255  # bytes, on all usual file systems
_POLL_S = 0.01

T = TypeVar("T")


class Files:
    """Open files by path, each opened once; a context manager that closes them all."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._locks: dict[Path, threading.Lock] = {}
        self._writing: dict[Path, threading.Lock] = {}

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def create(self, path: Path, size: int) -> None:
        """Create a file of zeros, with room on the disk for all of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = self._open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        self._descriptors[path], self._writing[path] = descriptor, threading.Lock()
        try:
            _allocate(descriptor, size)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None

    def descriptor(self, path: Path) -> int:
        """Return the file's descriptor; files that were not created are opened for reading."""
        found = self._descriptors.get(path)
        if found is not None:
            return found
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = self._open(path, os.O_RDONLY)
            return self._descriptors[path]

    def lock(self, path: Path) -> threading.Lock:
        """Return the lock to hold while a part of the file is read and written back."""
        with self._lock:
            return self._locks.setdefault(path, threading.Lock())

    def read(self, path: Path, offset: int, target: np.ndarray) -> None:
        """Fill a contiguous array from a file; `tensor.ZEROS` is endless zeros."""
        if path is ZEROS:
            target.fill(0)
            return
        descriptor, view = self.descriptor(path), target.data.cast("B")
        while view:
            count = os.preadv(descriptor, [view], offset)
            if count == 0:
                raise ConversionError(f"{path}: torn, it ends at byte {offset}")
            view, offset = view[count:], offset + count

    def write(self, path: Path, offset: int, content: np.ndarray) -> None:
        """Write a contiguous array to a file that was created.

        File systems let one thread write to a file at a time; those that wait there do so in a
        loop, which takes as many CPU seconds again.
        """
        descriptor, view = self.descriptor(path), content.data.cast("B")
        try:
            with self._writing[path]:
                while view:
                    count = os.pwrite(descriptor, view[:_WRITTEN_AT_ONCE], offset)
                    view, offset = view[count:], offset + count
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None

    def _open(self, path: Path, flags: int) -> int:
        try:
            return os.open(path, flags | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
        _allow_more_open_files()
        return os.open(path, flags | os.O_CLOEXEC, 0o666)


def _allocate(descriptor: int, size: int) -> None:
    """Give a file its size, and reserve the room for it where system and file system can."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except AttributeError:  # macOS has none
        os.ftruncate(descriptor, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, size)


def _allow_more_open_files() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def is_file_name(value: object) -> TypeGuard[str]:
    """Tell whether something that a checkpoint says is the name of a file beside it."""
    return (
        isinstance(value, str)
        and Path(value).name == value
        and value not in ("", ".", "..")
        and "\0" not in value
        and len(os.fsencode(value)) <= _LONGEST_NAME
    )


Work = Callable[[], "Iterable[Work] | None"]
"""Something to do; returns what can be done now that it is done."""


def for_each(
    items: Iterable[T], work: Callable[[T], Iterable[Work] | None], *, workers: int
) -> None:
    """Call `work` for every item on several threads; the first exception stops all of them.

    The items may be many: they are drawn one by one. What a call returns is done before the next
    item is drawn. Ctrl-C stops after the items in progress; pressed again, it changes nothing.
    """
    queue = _Queue(partial(work, item) for item in items)

    def loop() -> None:
        while (job := queue.take()) is not None:
            more: Iterable[Work] = ()
            try:
                more = job() or ()
            finally:
                queue.done(more)

    with ThreadPoolExecutor(workers) as pool:
        try:
            futures = [pool.submit(loop) for _ in range(workers)]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            queue.stop()
    for future in done:
        future.result()


class _Queue:
    """Hands out work to threads, what was added later first."""

    def __init__(self, work: Iterable[Work]) -> None:
        self._items, self._added = iter(work), list[Work]()
        self._in_progress, self._stopped = 0, False
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)

    def take(self) -> Work | None:
        """Return something to do; None if there is nothing left."""
        with self._changed:
            while not self._stopped:
                job = self._added.pop() if self._added else next(self._items, None)
                if job is not None:
                    self._in_progress += 1
                    return job
                if not self._in_progress:
                    break
                self._changed.wait()
            return None

    def done(self, more: Iterable[Work]) -> None:
        """Note that something was done, and what can be done now."""
        with self._changed:
            self._in_progress -= 1
            self._changed.notify_all()
            self._added.extend(more)

    def stop(self) -> None:
        """Hand out nothing any more; return when nothing is in progress, Ctrl-C or not.

        Whoever goes on earlier closes files that threads still write to. Joining the threads does
        not do: interrupted in that, Python before 3.13 takes a thread for ended that is not.
        """
        self._stopped = True  # threads that wait for an item in progress see it when that is done
        try:
            while self._is_busy():
                time.sleep(_POLL_S)
        except BaseException:
            self.stop()
            raise

    def _is_busy(self) -> bool:
        with self._lock:  # not the condition: an interrupt on the way into that leaves it locked
            return self._in_progress > 0


class Buffers(threading.local):
    """Memory of a thread, used again for every band."""

    def __init__(self) -> None:
        self._buffers: dict[str, np.ndarray] = {}

    def take(self, name: str, rows: int, row_bytes: int) -> np.ndarray:
        """Return bytes of shape (rows, row bytes), the same memory for the same name."""
        size = rows * row_bytes
        found = self._buffers.get(name)
        if found is None or found.size < size:
            found = self._buffers[name] = np.empty(size, np.uint8)
        return found[:size].reshape(rows, row_bytes)
