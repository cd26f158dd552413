"""Stop at the end of the step when asked to, rather than in the middle of it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Remembers that SIGTERM, SIGINT or SIGHUP came.

    The first one interrupts at once (KeyboardInterrupt) until `defer`, for there is nothing to save
    before the first step; from then on only a second SIGINT does. Use it as a context manager in
    the main thread; on leaving, the old handlers are back.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.deferred = False
        self.began = False
        """Whether all ranks have agreed to train, which is for the caller to note."""
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in self.SIGNALS:
            if signal.getsignal(number) is signal.SIG_IGN:  # nohup, or a job in the background
                continue
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """From now on remember a signal instead of being interrupted by it."""
        self.deferred = True

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Let signals end the process, as while it waits in code that never looks at them."""
        handled = list(self._previous)
        for number in handled:
            signal.signal(number, signal.SIG_DFL)
        try:
            yield
        finally:
            for number in handled:
                signal.signal(number, self._receive)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        first = self.received is None
        again = number == signal.SIGINT == self.received
        self.received = signal.Signals(number)
        if again or (first and not self.deferred):
            raise KeyboardInterrupt
