"""Fused operators for large language models: one signature each, on NPU, CUDA and CPU.

Every public function runs wherever its tensors are: the accelerated version of that device where
one exists, else the reference, which is also the oracle of the tests. They are loaded when first
used, so that importing the package, or asking `ml_kernels.device`, does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ml_kernels.activation import geglu, gelu, swiglu
    from ml_kernels.alibi import alibi_bias, alibi_slopes
    from ml_kernels.attention import flash_attention
    from ml_kernels.attention_backward import flash_attention_backward
    from ml_kernels.collective_matmul import (
        all_gather_matmul,
        matmul_all_reduce,
        matmul_reduce_scatter,
    )
    from ml_kernels.determinism import deterministic
    from ml_kernels.dispatch import BackendUnavailableError, available, why_not
    from ml_kernels.frequencies import (
        RotaryFrequencies,
        dynamic_ntk_frequencies,
        linear_frequencies,
        llama3_frequencies,
        rotary_angles,
        rotary_frequencies,
        yarn_frequencies,
        yarn_mscale,
    )
    from ml_kernels.linear_layer import linear
    from ml_kernels.loss import cross_entropy, linear_cross_entropy
    from ml_kernels.modules import GEGLU, GELU, LayerNorm, RMSNorm, SwiGLU
    from ml_kernels.moe import grouped_matmul, moe_permute, moe_unpermute, topk_gating
    from ml_kernels.norm import add_rms_norm, layer_norm, rms_norm
    from ml_kernels.optimizer import adamw
    from ml_kernels.precision import join_float32, split_float32
    from ml_kernels.profiling import profiler
    from ml_kernels.rotary import rotary_embedding
    from ml_kernels.softmax import scaled_masked_softmax

_MODULES = {
    "GEGLU": "modules",
    "GELU": "modules",
    "BackendUnavailableError": "dispatch",
    "LayerNorm": "modules",
    "RMSNorm": "modules",
    "RotaryFrequencies": "frequencies",
    "SwiGLU": "modules",
    "adamw": "optimizer",
    "add_rms_norm": "norm",
    "alibi_bias": "alibi",
    "alibi_slopes": "alibi",
    "all_gather_matmul": "collective_matmul",
    "available": "dispatch",
    "cross_entropy": "loss",
    "deterministic": "determinism",
    "dynamic_ntk_frequencies": "frequencies",
    "flash_attention": "attention",
    "flash_attention_backward": "attention_backward",
    "geglu": "activation",
    "gelu": "activation",
    "grouped_matmul": "moe",
    "join_float32": "precision",
    "layer_norm": "norm",
    "linear": "linear_layer",
    "linear_cross_entropy": "loss",
    "linear_frequencies": "frequencies",
    "llama3_frequencies": "frequencies",
    "matmul_all_reduce": "collective_matmul",
    "matmul_reduce_scatter": "collective_matmul",
    "moe_permute": "moe",
    "moe_unpermute": "moe",
    "profiler": "profiling",
    "rms_norm": "norm",
    "rotary_angles": "frequencies",
    "rotary_embedding": "rotary",
    "rotary_frequencies": "frequencies",
    "scaled_masked_softmax": "softmax",
    "split_float32": "precision",
    "swiglu": "activation",
    "topk_gating": "moe",
    "why_not": "dispatch",
    "yarn_frequencies": "frequencies",
    "yarn_mscale": "frequencies",
}

__all__ = [
    "GEGLU",
    "GELU",
    "BackendUnavailableError",
    "LayerNorm",
    "RMSNorm",
    "RotaryFrequencies",
    "SwiGLU",
    "adamw",
    "add_rms_norm",
    "alibi_bias",
    "alibi_slopes",
    "all_gather_matmul",
    "available",
    "cross_entropy",
    "deterministic",
    "dynamic_ntk_frequencies",
    "flash_attention",
    "flash_attention_backward",
    "geglu",
    "gelu",
    "grouped_matmul",
    "join_float32",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_frequencies",
    "llama3_frequencies",
    "matmul_all_reduce",
    "matmul_reduce_scatter",
    "moe_permute",
    "moe_unpermute",
    "profiler",
    "rms_norm",
    "rotary_angles",
    "rotary_embedding",
    "rotary_frequencies",
    "scaled_masked_softmax",
    "split_float32",
    "swiglu",
    "topk_gating",
    "why_not",
    "yarn_frequencies",
    "yarn_mscale",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
