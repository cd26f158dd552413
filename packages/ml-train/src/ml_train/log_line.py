"""The lines of a run's log, spelled as Megatron and ModelLink spell them, for those who parse them.

Fields, their order and their formats are those of Megatron-LM's `training_log`; what is ours
follows at the end.
"""

from __future__ import annotations

import math
import resource
import sys
from pathlib import Path

import torch

from ml_train.throughput import StepMetrics

_MEGABYTE = 1024.0 * 1024.0


def step_line(step: StepMetrics, *, log_throughput: bool) -> str:
    """Return the line of a step."""
    fields = [
        f" iteration {step.iteration:8d}/{step.train_iters:8d}",
        f"consumed samples: {step.consumed_samples:12d}",
        f"elapsed time per iteration (ms): {step.elapsed_seconds * 1000.0:.1f}",
        *([_throughput(step.tflops_per_device)] if log_throughput else []),
        f"learning rate: {step.learning_rate:.6E}",
        f"global batch size: {step.global_batch_size:5d}",
        f"lm loss: {step.loss:.6E}",
        f"loss scale: {step.loss_scale:.1f}",
        f"grad norm: {step.grad_norm:.3f}",
        f"number of skipped iterations: {step.skipped_iterations:3d}",
        f"number of nan iterations: {step.nan_iterations:3d}",
        f"tokens per second per device: {step.tokens_per_second_per_device:.1f}",
        f"MFU: {step.mfu:.1%}",
    ]
    return " | ".join(fields) + " |"


def evaluation_line(iteration: int, loss: float, *, data: str = "validation") -> str:
    """Return the line of an evaluation on some data."""
    return (
        f" {data} loss at iteration {iteration} | lm loss value: {loss:.6E} | "
        f"lm loss PPL: {perplexity(loss):.6E} | "
    )


def perplexity(loss: float) -> float:
    """Return e^loss, of at most e^20 as in Megatron."""
    return math.exp(min(20.0, loss))


def memory_line(device: torch.device, *, rank: int, iteration: int) -> str:
    """Return the memory a rank uses: of its device, or of its process if that is a CPU."""
    used = _process_memory() if device.type == "cpu" else _device_memory(device)
    fields = "".join(f" | {name}: {size / _MEGABYTE:.1f}" for name, size in used.items())
    return f"[Rank {rank}] (after {iteration} iterations) memory (MB){fields}"


def _throughput(tflops: float) -> str:
    digits = 1 if tflops >= 10 else 4  # a CPU's are a fraction of one
    return f"throughput per GPU (TFLOP/s/GPU): {tflops:.{digits}f}"


def _device_memory(device: torch.device) -> dict[str, int]:
    module = torch.get_device_module(device)
    return {
        "allocated": module.memory_allocated(device),
        "max allocated": module.max_memory_allocated(device),
        "reserved": module.memory_reserved(device),
        "max reserved": module.max_memory_reserved(device),
    }


def _process_memory() -> dict[str, int]:
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return {"max allocated": peak}
    return {
        "allocated": int(statm.read_text().split()[1]) * resource.getpagesize(),
        "max allocated": peak,
    }
