"""Where the lines of a run appear: on a terminal above a line that shows how far it is."""

from __future__ import annotations

import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ml_train.throughput import StepMetrics

_REFRESH_S = 0.1


class Display:
    """Lines on a stream, one after the other."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def line(self, text: str) -> None:
        """Show a line."""
        self.stream.write(text + "\n")
        self.stream.flush()

    def progress(self, step: StepMetrics) -> None:
        """Show that a step is done."""

    def close(self) -> None:
        """End."""


class LiveDisplay(Display):
    """Lines on a terminal, and below them the last step, its loss, the speed and the time left."""

    def __init__(self, stream: TextIO, *, iteration: int, train_iters: int) -> None:
        super().__init__(stream)
        self._bar = Progress(
            TextColumn("iteration {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.fields[speed]}"),
            TextColumn("time left"),
            TimeRemainingColumn(),
            console=Console(file=stream, highlight=False, markup=False, emoji=False),
            auto_refresh=False,  # no thread beside the training
            transient=True,
        )
        self._task = self._bar.add_task("", completed=iteration, total=train_iters, speed="")
        self._refreshed = 0.0
        self._bar.start()

    def line(self, text: str) -> None:
        """Show a line above the progress."""
        self._bar.console.print(text, soft_wrap=True)

    def progress(self, step: StepMetrics) -> None:
        """Show that a step is done."""
        now = time.monotonic()
        due = now - self._refreshed >= _REFRESH_S or step.iteration == step.train_iters
        self._refreshed = now if due else self._refreshed
        speed = f"loss {step.loss:.4f}  {step.tokens_per_second_per_device:,.0f} tokens/s/device"
        self._bar.update(self._task, completed=step.iteration, speed=speed, refresh=due)

    def close(self) -> None:
        """Take the progress away, and leave the lines."""
        self._bar.stop()


def open_display(stream: TextIO, *, iteration: int, train_iters: int) -> Display:
    """Return the display for a stream; a run resumed after `iteration` begins there."""
    if stream.isatty():
        return LiveDisplay(stream, iteration=iteration, train_iters=train_iters)
    return Display(stream)
