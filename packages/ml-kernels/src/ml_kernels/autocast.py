"""What `torch.autocast` does to an operator of ours: to cast as it does, or to be left alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def as_autocast_has(tensor: torch.Tensor) -> torch.Tensor:
    """Cast a factor of a product as autocast does: all but float64."""
    if not isinstance(tensor, torch.Tensor):
        return tensor  # and refuse it later
    if not _is_on(tensor.device.type):
        return tensor
    narrow = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype(tensor.device.type)) if narrow else tensor


def without_autocast(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Let what runs on the device of a tensor keep its dtype: autocast would narrow float32."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if _is_on(device) else nullcontext()


def _is_on(device: str) -> bool:
    # There is none for meta tensors.
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
