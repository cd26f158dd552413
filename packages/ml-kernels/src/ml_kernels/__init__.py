"""Fused operators for large language models: one signature each, on NPU, CUDA and CPU.

Every public function runs wherever its tensors are: the accelerated version of that device where
one exists, else the reference, which is also the oracle of the tests. They are loaded when first
used, so that importing the package, or asking `ml_kernels.device`, does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ml_kernels.activation import swiglu
    from ml_kernels.attention import dot_product_attention
    from ml_kernels.dispatch import BackendUnavailableError, available
    from ml_kernels.loss import cross_entropy
    from ml_kernels.norm import layer_norm, rms_norm
    from ml_kernels.rotary import apply_rotary

__all__ = [
    "BackendUnavailableError",
    "apply_rotary",
    "available",
    "cross_entropy",
    "dot_product_attention",
    "layer_norm",
    "rms_norm",
    "swiglu",
]

_MODULES = {
    "BackendUnavailableError": "dispatch",
    "apply_rotary": "rotary",
    "available": "dispatch",
    "cross_entropy": "loss",
    "dot_product_attention": "attention",
    "layer_norm": "norm",
    "rms_norm": "norm",
    "swiglu": "activation",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
