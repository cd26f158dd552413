"""The log of a run: a line for every few steps, and one for each evaluation."""

from __future__ import annotations

import torch

from ml_train.display import Display
from ml_train.log_line import evaluation_line, memory_line, step_line
from ml_train.settings import LogConfig
from ml_train.throughput import StepMetrics, average


class Log:
    """Writes lines to a display."""

    def __init__(self, config: LogConfig, display: Display, device: torch.device) -> None:
        self._config = config
        self._display = display
        self._device = device
        self._steps: list[StepMetrics] = []
        self._memory_is_shown = False

    def step(self, step: StepMetrics) -> None:
        """Show a step; at the end of an interval, and of the run, with a line."""
        self._steps.append(step)
        is_last = step.iteration == step.train_iters
        if step.iteration % self._config.log_interval == 0 or is_last:
            mean = average(self._steps)
            self._steps.clear()
            self.line(step_line(mean, log_throughput=self._config.log_throughput))
            self._show_memory(step.iteration)
        self._display.progress(step)

    def evaluation(self, iteration: int, loss: float) -> None:
        """Show an evaluation."""
        self.line(evaluation_line(iteration, loss))

    def line(self, text: str) -> None:
        """Show a line."""
        self._display.line(text)

    def close(self) -> None:
        """End."""
        self._display.close()

    def _show_memory(self, iteration: int) -> None:
        if not self._memory_is_shown:
            self.line(memory_line(self._device, rank=0, iteration=iteration))
            self._memory_is_shown = True
