"""The fastest a device multiplies matrices: what a model's FLOP/s are compared with.

Known accelerators have the number of their datasheet, dense. Everything else, a CPU above all, is
measured: the best of a few square matrices, once in a process.
"""

from __future__ import annotations

import functools
import math
import re
import time
from typing import NamedTuple

import torch

import ml_kernels

_CPU_SIZES = (512, 1024, 2048)
_DEVICE_SIZES = (2048, 4096, 8192)
_SECONDS = 0.3
"""How long one size is measured; there are three."""


class _Accelerator(NamedTuple):
    name: str
    """A regular expression that begins a word of torch's name of the device."""
    half_tflops: float
    """bfloat16 and float16, dense."""
    single_tflops: float | None
    """float32, and not TF32, which torch uses only when told to."""
    source: str

    def tflops(self, dtype: torch.dtype) -> float | None:
        """Return the peak for matrices of this dtype, if the datasheet says it."""
        if dtype in (torch.bfloat16, torch.float16):
            return self.half_tflops
        return self.single_tflops if dtype == torch.float32 else None


ACCELERATORS = (
    _Accelerator("B200", 2250.0, 75.0, "NVIDIA HGX B200 datasheet, 36 PFLOP/s sparse for 8 / 2"),
    _Accelerator("GH200", 989.4, 67.0, "NVIDIA GH200 datasheet, 1,979 sparse / 2"),
    _Accelerator("H200 NVL", 835.5, 60.0, "NVIDIA H200 datasheet, 1,671 sparse / 2"),
    _Accelerator("H200", 989.4, 67.0, "NVIDIA H200 datasheet, 1,979 sparse / 2"),
    _Accelerator("H100 NVL", 835.5, 60.0, "NVIDIA H100 NVL datasheet, 1,671 sparse / 2"),
    _Accelerator("H100 PCIe", 756.0, 51.0, "NVIDIA H100 PCIe datasheet, 1,513 sparse / 2"),
    _Accelerator("H[18]00", 989.4, 67.0, "NVIDIA H100 SXM datasheet, 1,979 sparse / 2"),
    _Accelerator("A[18]00", 312.0, 19.5, "NVIDIA A100 datasheet"),
    _Accelerator("L40S", 362.0, 91.6, "NVIDIA L40S datasheet"),
    # No datasheet, and the same for all its variants.
    _Accelerator("Ascend910B", 354.0, None, "FLOP/s / MFU of the clusters in ModelLink's README"),
)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the TFLOP/s of one device; of a CPU, with this process's number of threads."""
    if device.type != "cpu":
        name = str(torch.get_device_module(device).get_device_name(device))
        known = datasheet(name, dtype)
        if known is not None:
            return known
    return _measure(device, dtype, torch.get_num_threads())


def datasheet(device_name: str, dtype: torch.dtype) -> float | None:
    """Return the TFLOP/s of an accelerator by torch's name of it, if known."""
    for accelerator in ACCELERATORS:
        if re.search(rf"\b{accelerator.name}", device_name):
            return accelerator.tflops(dtype)
    return None


@functools.lru_cache(maxsize=16)
def _measure(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    del threads  # a key of the cache
    best = 0.0
    for size in _CPU_SIZES if device.type == "cpu" else _DEVICE_SIZES:
        seconds = _fastest_product(device, dtype, size)
        best = max(best, 2 * size**3 / seconds / 1e12)
        if seconds > _SECONDS:
            break  # a larger one would take eight times as long
    return best


def _fastest_product(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Return the seconds of the fastest of the products that fit in the time.

    The product is that of the model's layers, so that a peak is one that they could reach.
    """
    # A generator of its own: what is measured must not change the random numbers of the run.
    generator = torch.Generator(device).manual_seed(0)
    left, right = (
        torch.rand(size, size, generator=generator, device=device).to(dtype) for _ in range(2)
    )
    best, end = math.inf, time.perf_counter() + _SECONDS
    while math.isinf(best) or time.perf_counter() < end:
        _wait(device)
        start = time.perf_counter()
        ml_kernels.linear(left, right)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
