"""Positioned reads and writes on many open files, from many threads."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

import numpy as np

from ml_convert.errors import ConversionError

T = TypeVar("T")


class Files:
    """Open files by path, each opened once; a context manager that closes them all."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

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
        self._descriptors[path] = descriptor
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

    def read(self, path: Path, offset: int, target: np.ndarray) -> None:
        """Fill a contiguous array from a file."""
        descriptor, view = self.descriptor(path), target.data.cast("B")
        while view:
            count = os.preadv(descriptor, [view], offset)
            if count == 0:
                raise ConversionError(f"{path}: torn, it ends at byte {offset}")
            view, offset = view[count:], offset + count

    def write(self, path: Path, offset: int, content: np.ndarray) -> None:
        """Write a contiguous array to a file."""
        descriptor, view = self.descriptor(path), content.data.cast("B")
        try:
            while view:
                count = os.pwrite(descriptor, view, offset)
                view, offset = view[count:], offset + count
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None

    def _open(self, path: Path, flags: int) -> int:
        try:
            return os.open(path, flags | os.O_CLOEXEC, 0o644)
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
        _allow_more_open_files()
        return os.open(path, flags | os.O_CLOEXEC, 0o644)


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


def for_each(items: Iterable[T], work: Callable[[T], None], *, workers: int) -> None:
    """Call `work` for every item on several threads; the first exception stops all of them.

    The items may be many: they are drawn one by one. Ctrl-C stops after the items in progress.
    """
    stop, lock, remaining = threading.Event(), threading.Lock(), iter(items)

    def loop() -> None:
        while not stop.is_set():
            with lock:
                item = next(remaining, _END)
            if isinstance(item, _End):
                return
            work(item)

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(loop) for _ in range(workers)]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
    for future in done:
        future.result()


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


class _End:
    """Marks that no item is left."""


_END = _End()
