"""The table from (operator, device) to implementation.

A dict look-up costs about a microsecond; registering torch custom operators costs ten to thirty.
Implementations are named as "module:function" and imported when first used, so that no back end
is loaded on a machine that lacks it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, Literal

import torch

from ml_kernels.device import why_unavailable

Backend = Literal["reference", "npu", "cuda", "cpu"]

IMPLEMENTATIONS: dict[tuple[str, str], str] = {
    ("attention", "cpu"): "ml_kernels.cpu.attention:dot_product_attention",
    ("attention", "cuda"): "ml_kernels.fused:dot_product_attention",
    ("attention", "reference"): "ml_kernels.attention:attention_reference",
    ("cross_entropy", "cpu"): "ml_kernels.cpu.loss:cross_entropy",
    ("cross_entropy", "reference"): "ml_kernels.loss:cross_entropy_reference",
    ("layer_norm", "reference"): "ml_kernels.norm:layer_norm_reference",
    ("rms_norm", "cpu"): "ml_kernels.cpu.norm:rms_norm",
    ("rms_norm", "cuda"): "ml_kernels.fused:rms_norm",
    ("rms_norm", "reference"): "ml_kernels.norm:rms_norm_reference",
    ("rotary", "reference"): "ml_kernels.rotary:apply_rotary_reference",
    ("swiglu", "reference"): "ml_kernels.activation:swiglu_reference",
}


class BackendUnavailableError(ValueError):
    """An implementation was asked for by name and cannot run here."""


@cache
def _load(target: str) -> Callable[..., Any]:
    module, _, function = target.partition(":")
    return getattr(import_module(module), function)


def available(operator: str, backend: Backend) -> str | None:
    """Say why `backend` cannot run `operator` here, or None when it can."""
    if (operator, "reference") not in IMPLEMENTATIONS:
        return f"there is no operator {operator!r}"
    if backend == "reference":
        return None
    if (operator, backend) not in IMPLEMENTATIONS:
        return f"{operator} has no {backend} implementation"
    return why_unavailable(backend)


def implementation(
    operator: str, tensor: torch.Tensor, backend: Backend | None = None
) -> Callable[..., Any]:
    """Pick the implementation of `operator` for the device of `tensor`.

    Raises:
        BackendUnavailableError: `backend` was named and cannot run; there is no silent fallback.
    """
    if backend is None:
        target = IMPLEMENTATIONS.get((operator, tensor.device.type))
        return _load(target or IMPLEMENTATIONS[operator, "reference"])
    reason = available(operator, backend)
    if reason:
        raise BackendUnavailableError(f"backend={backend!r}: {reason}")
    return _load(IMPLEMENTATIONS[operator, backend])
