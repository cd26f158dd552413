"""Standard output and error that a run does not depend on.

While a run lasts its terminal may be closed, the reader of its pipe end, or the disk with its log
fill up. What is written from then on goes nowhere, and the run goes on.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO

logger = logging.getLogger(__name__)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Let standard output and error take everything while this lasts, whatever becomes of them."""
    with ExitStack() as stack:
        # Nobody can be told that standard error is lost.
        error, output = _lasting(sys.stderr), _lasting(sys.stdout, name="standard output")
        stack.enter_context(redirect_stderr(error))
        stack.enter_context(redirect_stdout(output))
        stack.callback(error.flush)
        stack.callback(output.flush)
        yield


def _lasting(stream: TextIO | None, *, name: str | None = None) -> TextIO:
    """Return a stream to write to instead; `name` is for saying that it is lost."""
    if stream is None:  # the process was started without it, by `>&-`
        descriptor, encoding, errors = os.open(os.devnull, os.O_WRONLY), "utf-8", None
    else:
        try:
            descriptor, encoding, errors = stream.fileno(), stream.encoding, stream.errors
        except io.UnsupportedOperation:
            return stream  # in memory
    file = io.BufferedWriter(_LastingFile(descriptor, name))
    return io.TextIOWrapper(file, encoding=encoding, errors=errors, line_buffering=True)


class _LastingFile(io.FileIO):
    """An open file that drops what is written once it has failed to take something."""

    def __init__(self, descriptor: int, name: str | None) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self._name = name
        self._is_lost = False

    def write(self, data: Any, /) -> int:
        """Write what the file takes of some bytes, and return how many; dropped ones count, too."""
        if not self._is_lost:
            try:
                return super().write(data)
            except OSError as error:
                self._is_lost = True
                if self._name is not None:
                    reason = error.strerror
                    logger.warning("%s: %s; the run goes on without it", self._name, reason)
        return memoryview(data).nbytes
