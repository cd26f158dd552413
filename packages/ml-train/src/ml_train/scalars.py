"""TensorBoard scalars of a run, under the names that Megatron gives them."""

from __future__ import annotations

from pathlib import Path

from ml_train.log_line import perplexity
from ml_train.throughput import StepMetrics


class Scalars:
    """A directory of TensorBoard, open for a run that continues after `iteration`.

    What an earlier run wrote of later steps is hidden.
    """

    def __init__(self, directory: Path, *, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # only its users wait for it

        self._writer = SummaryWriter(str(directory), purge_step=iteration + 1)

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
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step.iteration)

    def evaluation(self, iteration: int, loss: float) -> None:
        """Write an evaluation."""
        self._writer.add_scalar("lm loss validation", loss, iteration)
        self._writer.add_scalar("lm loss validation ppl", perplexity(loss), iteration)

    def close(self) -> None:
        """Write what is not written yet."""
        self._writer.close()
