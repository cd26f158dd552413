"""Metrics of steps to report in tests."""

from __future__ import annotations

from typing import Any

from ml_train.throughput import StepMetrics


def make_step(iteration: int = 7, **changes: Any) -> StepMetrics:
    """Return a step of 100; its numbers are none that a formula made."""
    values: dict[str, Any] = {
        "iteration": iteration,
        "train_iters": 100,
        "consumed_samples": 16 * iteration,
        "consumed_tokens": 16 * 512 * iteration,
        "elapsed_seconds": 0.25,
        "learning_rate": 3.0e-4,
        "global_batch_size": 16,
        "loss": 8.5,
        "loss_scale": 1.0,
        "grad_norm": 2.345678,
        "skipped_iterations": 0,
        "nan_iterations": 0,
        "tokens_per_second_per_device": 16384.0,
        "tflops_per_device": 12.34,
        "mfu": 0.4567,
    }
    return StepMetrics(**{**values, **changes})
