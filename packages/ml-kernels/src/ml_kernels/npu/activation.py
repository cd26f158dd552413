"""Gated activations of torch_npu. Shapes: `x` `(..., 2 * F)`, gate first, then up."""

from __future__ import annotations

import torch
import torch_npu

from ml_kernels.activation import Approximation, biased, geglu_reference, swiglu_reference
from ml_kernels.npu.limits import check_dtype


def swiglu(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """See `ml_kernels.swiglu`; the derivative is torch_npu's.

    Raises:
        BackendUnavailableError: `x` is float64.
    """
    check_dtype("swiglu", "x", x)
    if not x.numel():
        return swiglu_reference(x, bias)
    return torch_npu.npu_swiglu(biased(x, bias), dim=-1)


def geglu(x: torch.Tensor, bias: torch.Tensor | None, approximate: Approximation) -> torch.Tensor:
    """See `ml_kernels.geglu`; the derivative is torch_npu's.

    torch_npu 2.13 describes that derivative wrongly to FakeTensor, so that `torch.compile` cannot
    trace it; running it is not affected.

    Raises:
        BackendUnavailableError: `x` is float64.
    """
    check_dtype("geglu", "x", x)
    if not x.numel():
        return geglu_reference(x, bias, approximate)
    # By default the kernel activates the second half.
    return torch_npu.npu_geglu(
        biased(x, bias), dim=-1, approximate=int(approximate == "tanh"), activate_left=True
    )[0]
