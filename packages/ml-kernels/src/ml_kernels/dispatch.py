"""The table from (operator, device) to implementation.

A dict look-up costs about a microsecond; registering torch custom operators costs ten to thirty.
Implementations are named as "module:function" and imported when first used, so that no back end
is loaded on a machine that lacks it. `available()` shows the table, and why anything is missing.

Where a device has no implementation of its own, or that lacks a package, the reference runs unless
a backend is named: a named one runs or is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ml_kernels.device import why_unavailable

if TYPE_CHECKING:
    import torch

Backend = Literal["reference", "npu", "cuda", "cpu"]

DEVICES: tuple[Literal["npu", "cuda", "cpu"], ...] = ("cpu", "cuda", "npu")

IMPLEMENTATIONS: dict[tuple[str, str], str] = {
    ("adamw", "cpu"): "ml_kernels.fused:adamw",
    ("adamw", "cuda"): "ml_kernels.fused:adamw",
    ("adamw", "npu"): "ml_kernels.fused:adamw",
    ("adamw", "reference"): "ml_kernels.optimizer:adamw_reference",
    ("add_rms_norm", "cpu"): "ml_kernels.cpu.norm:add_rms_norm",
    ("add_rms_norm", "cuda"): "ml_kernels.cuda.norm:add_rms_norm",
    ("add_rms_norm", "npu"): "ml_kernels.npu.norm:add_rms_norm",
    ("add_rms_norm", "reference"): "ml_kernels.norm:add_rms_norm_reference",
    ("all_gather_matmul", "cpu"): "ml_kernels.overlapped:all_gather_matmul",
    ("all_gather_matmul", "cuda"): "ml_kernels.overlapped:all_gather_matmul",
    ("all_gather_matmul", "npu"): "ml_kernels.npu.collective_matmul:all_gather_matmul",
    ("all_gather_matmul", "reference"): "ml_kernels.collective_matmul:all_gather_matmul_reference",
    ("cross_entropy", "cpu"): "ml_kernels.cpu.loss:cross_entropy",
    ("cross_entropy", "cuda"): "ml_kernels.cuda.loss:cross_entropy",
    ("cross_entropy", "npu"): "ml_kernels.npu.loss:cross_entropy",
    ("cross_entropy", "reference"): "ml_kernels.loss:cross_entropy_reference",
    ("flash_attention", "cpu"): "ml_kernels.cpu.attention:flash_attention",
    ("flash_attention", "cuda"): "ml_kernels.cuda.attention:flash_attention",
    ("flash_attention", "npu"): "ml_kernels.npu.attention:flash_attention",
    ("flash_attention", "reference"): "ml_kernels.attention:attention_reference",
    ("flash_attention_backward", "cpu"): "ml_kernels.cpu.attention:flash_attention_backward",
    ("flash_attention_backward", "cuda"): "ml_kernels.cuda.attention:flash_attention_backward",
    ("flash_attention_backward", "npu"): "ml_kernels.npu.attention:flash_attention_backward",
    (
        "flash_attention_backward",
        "reference",
    ): "ml_kernels.attention_backward:attention_backward_reference",
    ("geglu", "cpu"): "ml_kernels.cpu.activation:geglu",
    ("geglu", "cuda"): "ml_kernels.cuda.activation:geglu",
    ("geglu", "npu"): "ml_kernels.npu.activation:geglu",
    ("geglu", "reference"): "ml_kernels.activation:geglu_reference",
    ("gelu", "cpu"): "ml_kernels.fused:gelu",
    ("gelu", "cuda"): "ml_kernels.cuda.activation:gelu",
    ("gelu", "npu"): "ml_kernels.fused:gelu",
    ("gelu", "reference"): "ml_kernels.activation:gelu_reference",
    ("grouped_matmul", "cpu"): "ml_kernels.cpu.moe:grouped_matmul",
    ("grouped_matmul", "cuda"): "ml_kernels.cuda.moe:grouped_matmul",
    ("grouped_matmul", "npu"): "ml_kernels.npu.moe:grouped_matmul",
    ("grouped_matmul", "reference"): "ml_kernels.moe:grouped_matmul_reference",
    ("layer_norm", "cpu"): "ml_kernels.fused:layer_norm",
    ("layer_norm", "cuda"): "ml_kernels.cuda.norm:layer_norm",
    ("layer_norm", "npu"): "ml_kernels.fused:layer_norm",
    ("layer_norm", "reference"): "ml_kernels.norm:layer_norm_reference",
    ("linear", "cpu"): "ml_kernels.cpu.linear:linear",
    ("linear", "cuda"): "ml_kernels.fused:linear",
    ("linear", "npu"): "ml_kernels.fused:linear",
    ("linear", "reference"): "ml_kernels.linear_layer:linear_reference",
    ("linear_cross_entropy", "cpu"): "ml_kernels.chunked_loss:linear_cross_entropy",
    ("linear_cross_entropy", "cuda"): "ml_kernels.cuda.linear_loss:linear_cross_entropy",
    ("linear_cross_entropy", "npu"): "ml_kernels.chunked_loss:linear_cross_entropy",
    ("linear_cross_entropy", "reference"): "ml_kernels.loss:linear_cross_entropy_reference",
    ("matmul_all_reduce", "cpu"): "ml_kernels.overlapped:matmul_all_reduce",
    ("matmul_all_reduce", "cuda"): "ml_kernels.overlapped:matmul_all_reduce",
    ("matmul_all_reduce", "npu"): "ml_kernels.npu.collective_matmul:matmul_all_reduce",
    ("matmul_all_reduce", "reference"): "ml_kernels.collective_matmul:matmul_all_reduce_reference",
    ("matmul_reduce_scatter", "cpu"): "ml_kernels.overlapped:matmul_reduce_scatter",
    ("matmul_reduce_scatter", "cuda"): "ml_kernels.overlapped:matmul_reduce_scatter",
    ("matmul_reduce_scatter", "npu"): "ml_kernels.npu.collective_matmul:matmul_reduce_scatter",
    (
        "matmul_reduce_scatter",
        "reference",
    ): "ml_kernels.collective_matmul:matmul_reduce_scatter_reference",
    ("moe_permute", "cuda"): "ml_kernels.cuda.moe:moe_permute",
    ("moe_permute", "npu"): "ml_kernels.npu.moe:moe_permute",
    ("moe_permute", "reference"): "ml_kernels.moe:moe_permute_reference",
    ("moe_unpermute", "cuda"): "ml_kernels.cuda.moe:moe_unpermute",
    ("moe_unpermute", "npu"): "ml_kernels.npu.moe:moe_unpermute",
    ("moe_unpermute", "reference"): "ml_kernels.moe:moe_unpermute_reference",
    ("rms_norm", "cpu"): "ml_kernels.cpu.norm:rms_norm",
    ("rms_norm", "cuda"): "ml_kernels.cuda.norm:rms_norm",
    ("rms_norm", "npu"): "ml_kernels.npu.norm:rms_norm",
    ("rms_norm", "reference"): "ml_kernels.norm:rms_norm_reference",
    ("rotary_embedding", "cpu"): "ml_kernels.cpu.rotary:rotary_embedding",
    ("rotary_embedding", "cuda"): "ml_kernels.cuda.rotary:rotary_embedding",
    ("rotary_embedding", "npu"): "ml_kernels.npu.rotary:rotary_embedding",
    ("rotary_embedding", "reference"): "ml_kernels.rotary:rotary_embedding_reference",
    ("scaled_masked_softmax", "cuda"): "ml_kernels.cuda.softmax:scaled_masked_softmax",
    ("scaled_masked_softmax", "npu"): "ml_kernels.npu.softmax:scaled_masked_softmax",
    ("scaled_masked_softmax", "reference"): "ml_kernels.softmax:scaled_masked_softmax_reference",
    ("swiglu", "cpu"): "ml_kernels.cpu.activation:swiglu",
    ("swiglu", "cuda"): "ml_kernels.cuda.activation:swiglu",
    ("swiglu", "npu"): "ml_kernels.npu.activation:swiglu",
    ("swiglu", "reference"): "ml_kernels.activation:swiglu_reference",
    ("topk_gating", "npu"): "ml_kernels.npu.moe:topk_gating",
    ("topk_gating", "reference"): "ml_kernels.moe:topk_gating_reference",
}

WITHOUT: dict[tuple[str, str], str] = {
    ("moe_permute", "cpu"): "one sort and one gather of torch: there is nothing to fuse",
    ("moe_unpermute", "cpu"): "one gather and one sum of torch: there is nothing to fuse",
    ("scaled_masked_softmax", "cpu"): "torch's masked_fill and softmax: flash_attention needs none",
    ("topk_gating", "cpu"): "tensors of a few numbers per token: nothing to gain",
    ("topk_gating", "cuda"): "tensors of a few numbers per token: nothing to gain",
}
"""Why a device goes through the reference, where it has no implementation of its own."""

_MODULES_OF_TRITON = tuple(
    f"ml_kernels.cuda.{module}:" for module in ("activation", "loss", "norm", "rotary", "softmax")
)
OF_TRITON = frozenset(t for t in IMPLEMENTATIONS.values() if t.startswith(_MODULES_OF_TRITON))
"""Implementations that need the package triton. Others of CUDA ask for it where they need it."""


class _Slot:
    """For an implementation, once it is imported."""

    function: Callable[..., Any]


# Not one dict that grows: torch.compile would see it as it was when a graph's first operator did.
_slots: dict[str, _Slot] = {target: _Slot() for target in IMPLEMENTATIONS.values()}

_Function = TypeVar("_Function", bound=Callable[..., Any])


class BackendUnavailableError(ValueError):
    """An implementation was asked for and cannot run here, or not with these arguments."""


def constant(function: _Function) -> _Function:
    """Let `torch.compile` call a function while it traces, and keep the answer.

    It is `torch.compiler.assume_constant_result`, without importing torch for a look at the table.
    """
    function.__dict__["_dynamo_marked_constant"] = True
    return function


def _load(target: str) -> Callable[..., Any]:
    _import(target)
    return _slots[target].function


@constant
def _import(target: str) -> None:
    slot = _slots[target]
    if not hasattr(slot, "function"):
        module, _, function = target.partition(":")
        slot.function = getattr(import_module(module), function)


@constant
def has_triton() -> bool:
    """Say whether the package triton is installed, to which torch compiles for a GPU."""
    return _is_installed("triton")


@cache
def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


def _lack(target: str) -> str | None:
    """Say which package an implementation lacks, None if it has all."""
    if target in OF_TRITON and not has_triton():
        return "the package triton is not installed"
    return None


def operators() -> list[str]:
    """List the operators of the table."""
    return sorted({operator for operator, _ in IMPLEMENTATIONS})


@constant
def why_not(operator: str, backend: Backend) -> str | None:
    """Say why `backend` cannot run `operator` here, or None when it can."""
    if (operator, "reference") not in IMPLEMENTATIONS:
        return f"there is no operator {operator!r}; there are {', '.join(operators())}"
    if backend == "reference":
        return None
    if backend not in DEVICES:
        return f"there is no backend {backend!r}; there are reference, {', '.join(DEVICES)}"
    if (operator, backend) not in IMPLEMENTATIONS:
        reason = WITHOUT[operator, backend]
        return f"{operator} has no {backend} implementation ({reason})"
    return why_unavailable(backend) or _lack(IMPLEMENTATIONS[operator, backend])


def available() -> None:
    """Print which operator has an implementation of its own on which device, and why not."""
    sys.stdout.write("\n".join(_table()) + "\n")


def _table() -> Iterator[str]:
    yield f"{'operator':26}" + "".join(f"{device:11}" for device in DEVICES).rstrip()
    missing = {device: why_unavailable(device) for device in DEVICES}
    lacks: dict[tuple[str, str], str] = {}
    for operator in operators():
        row = ""
        for device in DEVICES:
            target = IMPLEMENTATIONS.get((operator, device))
            reason = missing[device] or (target and _lack(target))
            if target and reason and not missing[device]:
                lacks[operator, device] = reason
            row += f"{'no' if target and reason else 'yes' if target else 'reference':11}"
        yield f"{operator:26}{row}".rstrip()
    yield from (f"no {device}: {reason}" for device, reason in missing.items() if reason)
    for (operator, lacking), reason in {**lacks, **WITHOUT}.items():
        yield f"reference for {operator} on {lacking}: {reason}"


def implementation(
    operator: str, tensor: torch.Tensor, backend: Backend | None = None
) -> Callable[..., Any]:
    """Pick the implementation of `operator` for the device of `tensor`.

    Raises:
        BackendUnavailableError: `backend` was named and cannot run; there is no silent fallback.
    """
    if backend is None:
        target = IMPLEMENTATIONS.get((operator, tensor.device.type))
        if target is None or _lack(target):
            target = IMPLEMENTATIONS[operator, "reference"]
        return _load(target)
    reason = why_not(operator, backend)
    if reason is None and backend not in ("reference", tensor.device.type):
        reason = f"the tensors are on {tensor.device.type}"
    if reason:
        raise BackendUnavailableError(f"{operator}: backend={backend!r}: {reason}")
    return _load(IMPLEMENTATIONS[operator, backend])
