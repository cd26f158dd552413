"""Devices are asked for, never assumed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ml_kernels import device


def test_auto_always_finds_a_device_that_works():
    assert device.why_unavailable(device.resolve("auto")) is None


def test_a_missing_accelerator_is_refused_with_its_reason():
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"--device cuda cannot be used: .*CUDA.*--device cpu"):
            device.resolve("cuda")
    with pytest.raises(ValueError, match=r"--device npu cannot be used: .*torch_npu"):
        device.resolve("npu")


def test_an_unknown_device_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="tpu is unknown: use npu, cuda, cpu, auto"):
        device.resolve("tpu")


def test_asking_for_device_names_does_not_load_torch():
    script = "import sys, ml_kernels.device; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
