"""Which kinds of device this process can use, asked and never assumed.

Nothing is detected, and torch not imported, before a question is asked: command lines need the
names only. `torch_npu` is touched only when an NPU is asked for or when "auto" finds the package
installed: merely importing it changes torch for the whole process.
"""

from __future__ import annotations

import importlib.util
from typing import Literal, get_args

DeviceType = Literal["npu", "cuda", "cpu"]
DeviceChoice = Literal["npu", "cuda", "cpu", "auto"]

COLLECTIVES: dict[DeviceType, str] = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}
"""The torch.distributed backend that belongs to each device."""


def why_unavailable(device: DeviceType) -> str | None:
    """Say why `device` cannot be used here, or None when it can."""
    if device == "cpu":
        return None
    if device == "cuda":
        import torch

        if torch.version.cuda is None:
            return f"this torch ({torch.__version__}) is built without CUDA"
        return None if torch.cuda.is_available() else "torch finds no CUDA device"
    if importlib.util.find_spec("torch_npu") is None:
        return "the package torch_npu is not installed (pip install 'ml-kernels[npu]')"
    from ml_kernels.npu import runtime

    return runtime.why_unavailable()


def resolve(choice: DeviceChoice) -> DeviceType:
    """Turn a device choice into a device that works.

    Raises:
        ValueError: The device is unknown, or cannot be used; the message says why.
    """
    if choice == "auto":
        return next(device for device in get_args(DeviceType) if why_unavailable(device) is None)
    if choice not in get_args(DeviceType):
        raise ValueError(f"--device {choice} is unknown: use {', '.join(get_args(DeviceChoice))}")
    reason = why_unavailable(choice)
    if reason:
        raise ValueError(f"--device {choice} cannot be used: {reason}; use --device cpu or auto")
    return choice
