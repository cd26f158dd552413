"""Rotary position embedding by `npu_rotary_mul`. Shapes as in `ml_kernels.rotary`.

The kernel's documented range of cosines and sines is [-1, 1]. Yarn's scale, up to about 1.4, is
multiplied into them all the same, as MindSpeed does: the formula is linear in them.
"""

from __future__ import annotations

import math

import torch
import torch_npu

from ml_kernels.npu.limits import check_dtype, refuse
from ml_kernels.rotary import cosine_and_sine, rotary_embedding_reference

# Limits from the operator's documentation (torch_npu 2.13).
_MAX_WIDTH = 896  # exclusive
_MAX_BATCH_OR_HEADS = 1000  # exclusive; interleaved of their product
_VARYING: dict[bool, tuple[set[int], ...]] = {
    False: ({0}, {1}, {2}, {0, 1}, {0, 2}, {0, 1, 2}),
    True: ({0}, {1}, {2}),
}
"""Along which of the first three dimensions the angles may vary, by `interleaved`.

The sequence, or batch and sequence, for `x` in the order (B, N, S), (B, S, N) or (S, B, N).
"""


def rotary_embedding(
    x: torch.Tensor, angles: torch.Tensor, interleaved: bool, scale: float
) -> torch.Tensor:
    """See `ml_kernels.rotary_embedding`; the derivative is torch_npu's.

    Raises:
        BackendUnavailableError: `x` is float64, 896 channels or more are to be rotated, the angles
            vary along other dimensions than the kernel knows, or those along which they do not
            are too large: batch or heads from 1000 on, interleaved batch times heads.
    """
    check_dtype("rotary_embedding", "x", x)
    if not x.numel():
        return rotary_embedding_reference(x, angles, interleaved, scale)
    _check_limits(x, angles, interleaved)
    width = angles.shape[-1]
    cos, sin = cosine_and_sine(angles, scale, x.dtype)
    mode = "interleave" if interleaved else "half"
    out = torch_npu.npu_rotary_mul(x[..., :width], cos, sin, mode)
    return out if width == x.shape[-1] else torch.cat((out, x[..., width:]), dim=-1)


def _check_limits(x: torch.Tensor, angles: torch.Tensor, interleaved: bool) -> None:
    operator, given = "rotary_embedding", f"{tuple(angles.shape)} for x {tuple(x.shape)}"
    if angles.shape[-1] >= _MAX_WIDTH:
        refuse(operator, "angles", given, f"must have fewer than {_MAX_WIDTH} channels")
    varying = {i for i in range(3) if angles.shape[i] > 1}
    either = {i for i in range(3) if x.shape[i] == 1}
    if not any(varying <= known <= varying | either for known in _VARYING[interleaved]):
        others = "" if interleaved else ", or along it and the batch,"
        refuse(operator, "angles", given, f"must vary along the sequence{others} and nothing else")
    sizes = [x.shape[i] for i in range(3) if i not in varying]
    if (math.prod(sizes) if interleaved else max(sizes, default=1)) >= _MAX_BATCH_OR_HEADS:
        what = "batch times heads" if interleaved else "batch and heads"
        refuse(operator, "x", tuple(x.shape), f"{what} must be below {_MAX_BATCH_OR_HEADS}")
