"""What a run reports while it trains: lines, TensorBoard scalars and a file of metrics.

Every rank has the same numbers, so one of them reports; on the others a `Reporter` does nothing.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from importlib.metadata import version
from types import TracebackType
from typing import Any, Protocol, TextIO

import torch

from ml_parallel.platform import Device
from ml_train.config import PretrainConfig
from ml_train.display import open_display
from ml_train.history import holds_evaluation
from ml_train.log import Log
from ml_train.metrics_file import MetricsFile
from ml_train.peak import matmul_peak
from ml_train.scalars import Scalars
from ml_train.state import Progress
from ml_train.step import StepResult
from ml_train.throughput import (
    StepMetrics,
    mfu,
    model_flops_per_iteration,
    tflops_per_device,
    tokens_per_second_per_device,
)

logger = logging.getLogger(__name__)

_VERSIONS = ("ml-train", "ml-models", "ml-parallel", "ml-kernels", "megatron-core", "torch")


class Output(Protocol):
    """Somewhere a run reports to."""

    def step(self, step: StepMetrics) -> None:
        """Take a step."""

    def evaluation(self, iteration: int, loss: float) -> None:
        """Take the loss on the validation data after a step."""

    def close(self) -> None:
        """End."""


class Reporter:
    """Reports one run; a context, in which its outputs are open.

    All of them must be there at the beginning; the run goes on without one that fails later.
    """

    def __init__(
        self,
        config: PretrainConfig,
        device: Device,
        *,
        active: bool,
        world_size: int,
        padded_vocab_size: int,
        iteration: int,
        stream: TextIO | None = None,
    ) -> None:
        """Prepare to report the steps after `iteration`.

        Args:
            config: The run's.
            device: What a rank computes on.
            active: Whether this rank is the one that reports.
            world_size: Number of ranks.
            padded_vocab_size: Rows of the embedding table.
            iteration: Steps done before.
            stream: Where lines go; standard output when None.
        """
        self._config = config
        self._device = device.torch
        self._active = active
        self._iteration = iteration
        self._stream = stream or sys.stdout
        self._log: Log | None = None
        self._outputs: list[Output] = []
        self._meter = Meter(config, self._device, world_size, padded_vocab_size) if active else None

    def __enter__(self) -> Reporter:
        with ExitStack() as opened:
            for output in self._open() if self._active else ():
                opened.callback(output.close)
                self._outputs.append(output)
            opened.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._tell(lambda output: output.close())
        self._outputs.clear()
        self._log = None

    def step(
        self,
        progress: Progress,
        result: StepResult,
        *,
        learning_rate: float,
        loss_scale: float,
        elapsed_seconds: float,
    ) -> None:
        """Report a step.

        Args:
            progress: Of the run, with this step.
            result: What happened in it.
            learning_rate: What it used.
            loss_scale: What it used.
            elapsed_seconds: From its beginning to its end.
        """
        if self._meter is None:
            return
        step = self._meter.measure(progress, result, learning_rate, loss_scale, elapsed_seconds)
        self._tell(lambda output: output.step(step))

    def evaluation(self, iteration: int, loss: float) -> None:
        """Report the loss on the validation data after a step."""
        self._tell(lambda output: output.evaluation(iteration, loss))

    def has_evaluation(self) -> bool:
        """Tell whether the file of metrics has the evaluation after the step resumed from.

        Only the rank that reports knows, while its outputs are open.
        """
        path = self._config.log.metrics_path(self._config.checkpoint.save)
        return path is not None and holds_evaluation(path, self._iteration)

    def note(self, text: str) -> None:
        """Show a line of text."""
        if self._log is not None:
            self._log.line(text)

    def _tell(self, tell: Callable[[Output], None]) -> None:
        for output in self._outputs.copy():
            try:
                tell(output)
            except OSError as error:
                self._outputs.remove(output)
                with suppress(OSError):
                    output.close()
                where, why = error.filename, error.strerror
                logger.warning("%s: %s; the run goes on without this output", where, why)

    def _open(self) -> Iterator[Output]:
        assert self._meter is not None
        log, iteration = self._config.log, self._iteration
        path = log.metrics_path(self._config.checkpoint.save)
        if path is not None:
            apart = log.metrics_file is not None  # the one in --save can only be this run's
            file = MetricsFile(path, iteration=iteration, set_aside=apart)
            yield file
            file.write("run", iteration=iteration, **self._meter.header())
        if log.tensorboard_dir is not None:
            yield Scalars(log.tensorboard_dir, iteration=iteration)
        display = open_display(
            self._stream, iteration=iteration, train_iters=self._config.training.train_iters
        )
        self._log = Log(log, display, self._device)
        yield self._log


class Meter:
    """Turns what happened in a step into its metrics."""

    def __init__(
        self,
        config: PretrainConfig,
        device: torch.device,
        world_size: int,
        padded_vocab_size: int,
    ) -> None:
        batch = config.training.global_batch_size
        assert batch is not None, "check_world fills it in"
        self._config = config
        self._device = device
        self._batch = batch
        self._world_size = world_size
        self._padded_vocab_size = padded_vocab_size
        self._peak = matmul_peak(device, getattr(torch, config.training.dtype))
        self._flops = self._flops_of(config.training.seq_length, config.training.seq_length)

    def _flops_of(self, seq_length: float, keys: float) -> float:
        """Return the FLOP of a step whose samples and sequences are so long, on average."""
        return model_flops_per_iteration(
            self._config.model,
            self._batch,
            seq_length=seq_length,
            padded_vocab_size=self._padded_vocab_size,
            keys=keys,
        )

    def measure(
        self,
        progress: Progress,
        result: StepResult,
        learning_rate: float,
        loss_scale: float,
        seconds: float,
    ) -> StepMetrics:
        """Return the metrics of a step; the arguments are those of `Reporter.step`."""
        world_size = self._world_size
        computed = self._config.training.seq_length * result.filled
        flops = self._flops_of(computed, result.keys)
        tflops = tflops_per_device(flops, world_size=world_size, seconds=seconds)
        tokens = tokens_per_second_per_device(
            self._batch, computed, world_size=world_size, seconds=seconds
        )
        return StepMetrics(
            iteration=progress.iteration,
            train_iters=self._config.training.train_iters,
            consumed_samples=progress.consumed_samples,
            consumed_tokens=progress.consumed_tokens,
            elapsed_seconds=seconds,
            learning_rate=learning_rate,
            global_batch_size=self._batch,
            loss=result.loss,
            loss_scale=loss_scale,
            grad_norm=result.grad_norm,
            skipped_iterations=int(not result.updated),
            nan_iterations=int(not math.isfinite(result.loss)),
            tokens_per_second_per_device=tokens,
            tflops_per_device=tflops,
            mfu=mfu(tflops, self._peak),
        )

    def header(self) -> dict[str, Any]:
        """Return what the metrics of a run depend on."""
        training = self._config.training
        return {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in _VERSIONS},
            "device": _name(self._device),
            "peak_tflops_per_device": self._peak,
            "threads": torch.get_num_threads(),
            "world_size": self._world_size,
            "topology": dataclasses.asdict(self._config.parallel),
            "model": dataclasses.asdict(self._config.model),
            "padded_vocab_size": self._padded_vocab_size,
            "dtype": training.dtype,
            "seq_length": training.seq_length,
            "global_batch_size": self._batch,
            "train_iters": training.train_iters,
            "model_flops_per_iteration": self._flops,
        }


def _name(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    return str(torch.get_device_module(device).get_device_name(device))
