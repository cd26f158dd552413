"""Softmax by `npu_scaled_masked_softmax`. Shapes as in `ml_kernels.softmax`."""

from __future__ import annotations

import torch
import torch_npu

from ml_kernels.npu.limits import check_dtype, refuse
from ml_kernels.softmax import scaled_masked_softmax_reference

# From the operator's documentation (torch_npu 2.13).
_MULTIPLE = 32
_LONGEST = 4096


def scaled_masked_softmax(x: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """See `ml_kernels.scaled_masked_softmax`; the derivative is torch_npu's.

    The kernel replaces hidden scores by -10000. A row whose keys are all hidden comes out uniform
    and is set to 0 here; in other rows hidden keys get 0 as long as a visible score is well above.

    Raises:
        BackendUnavailableError: `x` is float64, or a length is no multiple of 32 up to 4096. Unless
            this backend was named, the public function then takes torch's formula.
    """
    check_dtype("scaled_masked_softmax", "x", x)
    if not x.numel():
        return scaled_masked_softmax_reference(x, mask, scale)
    queries, keys = x.shape[-2:]
    if queries % _MULTIPLE or keys % _MULTIPLE or max(queries, keys) > _LONGEST:
        rule = f"queries and keys must be multiples of {_MULTIPLE} up to {_LONGEST}"
        refuse("scaled_masked_softmax", "x", tuple(x.shape), rule)
    if mask is None:
        nothing = torch.zeros(1, 1, queries, keys, dtype=torch.bool, device=x.device)
        return torch_npu.npu_scaled_masked_softmax(x, nothing, scale, False)
    # The kernel repeats a mask over batch and heads only.
    mask = mask.view(*(1,) * (4 - mask.dim()), *mask.shape)
    mask = mask.expand(*mask.shape[:2], queries, keys)
    out = torch_npu.npu_scaled_masked_softmax(x, mask, scale, False)
    return out.masked_fill(mask.all(dim=-1, keepdim=True), 0)
