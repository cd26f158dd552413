"""TensorBoard scalars of a run, under the names that Megatron gives them.

TensorBoard's own writer has a thread, whose traceback would be all one sees of a full disk; a file
of events is simple enough to be written here.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from ml_parallel import durable
from ml_train.log_line import perplexity
from ml_train.throughput import StepMetrics


class Scalars:
    """A directory of TensorBoard, open for a run that continues after `iteration`.

    What an earlier run wrote of later steps is hidden.
    """

    def __init__(self, directory: Path, *, iteration: int) -> None:
        # Only its users wait for it.
        from tensorboard.compat.proto import event_pb2  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import (  # type: ignore[import-untyped]
            RecordWriter,
        )

        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._event = event_pb2.Event
        self._path = directory / name
        self._file = self._path.open("wb")
        self._records = RecordWriter(self._file)
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(file_version="brain.Event:2")
        self._write(step=iteration + 1, session_log=start)

    def step(self, step: StepMetrics) -> None:
        """Write a step."""
        scalars = {
            "lm loss": step.loss,
            "learning-rate": step.learning_rate,
            "grad-norm": step.grad_norm,
            "loss-scale": step.loss_scale,
            "batch-size": step.global_batch_size,
            "iteration-time": step.elapsed_seconds,
            "throughput": step.tflops_per_device,
            "tokens per second per device": step.tokens_per_second_per_device,
            "mfu": step.mfu,
        }
        self._scalars(step.iteration, scalars)

    def evaluation(self, iteration: int, loss: float) -> None:
        """Write an evaluation."""
        scalars = {"lm loss validation": loss, "lm loss validation ppl": perplexity(loss)}
        self._scalars(iteration, scalars)

    def close(self) -> None:
        """Close the file."""
        with durable.naming(self._path):
            self._file.close()

    def _scalars(self, iteration: int, scalars: dict[str, float]) -> None:
        values = [{"tag": tag, "simple_value": value} for tag, value in scalars.items()]
        self._write(step=iteration, summary={"value": values})

    def _write(self, **content: Any) -> None:
        event = self._event(wall_time=time.time(), **content)
        with durable.naming(self._path):
            self._records.write(event.SerializeToString())
            self._file.flush()
