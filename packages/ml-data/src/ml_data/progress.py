"""How far a long job is: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

logger = logging.getLogger(__name__)


class Done(NamedTuple):
    """What has been done since the report before."""

    consumed: int
    """Bytes of the input files."""
    documents: int
    text_bytes: int
    """UTF-8 size of the documents' text."""


Progress = Callable[[Done], None]


def silent(done: Done) -> None:
    """Show nothing."""


@contextmanager
def show_progress(total: int, log_interval: int) -> Iterator[Progress]:
    """Show a bar of `total` bytes of input, or without a terminal a line each `log_interval`."""
    if not sys.stderr.isatty():
        yield _Lines(log_interval)
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    rate = TextColumn("{task.fields[rate]}")
    columns = (BarColumn(), TaskProgressColumn(), rate, TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total, rate="starting workers")
        count = _Count()
        yield lambda done: bar.update(task, advance=done.consumed, rate=count.add(done))


class _Count:
    """Sums and speeds, in the words of ModelLink's progress line."""

    def __init__(self) -> None:
        self.documents = self.text_bytes = 0
        self._begin = time.perf_counter()

    def add(self, done: Done) -> str:
        self.documents += done.documents
        self.text_bytes += done.text_bytes
        seconds = time.perf_counter() - self._begin
        documents, megabytes = self.documents / seconds, self.text_bytes / 1e6 / seconds
        return f"{self.documents:,} documents ({documents:,.0f} docs/s, {megabytes:.2f} MB/s)"


class _Lines:
    """A line whenever another `interval` documents are done."""

    def __init__(self, interval: int) -> None:
        self._interval = self._next = interval
        self._count = _Count()

    def __call__(self, done: Done) -> None:
        line = self._count.add(done)
        if self._count.documents >= self._next:
            logger.info("Processed %s", line)
            self._next = (self._count.documents // self._interval + 1) * self._interval
