"""Rotary position embedding on a GPU: sines and cosines are computed once for all heads of a token.

Its gradient is the rotation by the opposite angle, by the same kernel.

Shapes: `x` is seen as `(A, B, N, D)`, `N` being a dimension that shares its angles, if there is one
(the heads); `R` rotated channels, `P = R / 2` pairs.
"""

from __future__ import annotations

from typing import Any

import torch

from ml_kernels.cuda import launch
from ml_kernels.cuda.kernels import rotary as kernels
from ml_kernels.derivatives import once_differentiable
from ml_kernels.rotary import rotary_embedding_reference

_NUMBERS = 1024
"""Of a tile: the pairs of a few heads."""


def rotary_embedding(
    x: torch.Tensor, angles: torch.Tensor, interleaved: bool, scale: float
) -> torch.Tensor:
    """See `ml_kernels.rotary_embedding`."""
    if launch.is_left_to_torch(x):
        return rotary_embedding_reference(x, angles, interleaved, scale)
    out: torch.Tensor = _Rotary.apply(x, angles, interleaved, scale)  # type: ignore[no-untyped-call]
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, angles: torch.Tensor, interleaved: bool, scale: float
    ) -> torch.Tensor:
        ctx.save_for_backward(angles)
        ctx.interleaved, ctx.scale = interleaved, scale
        return _rotated(x, angles, interleaved, scale, backwards=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (angles,) = ctx.saved_tensors
        found = _rotated(gradient, angles, ctx.interleaved, ctx.scale, backwards=True)
        return found, None, None, None


def _rotated(
    x: torch.Tensor, angles: torch.Tensor, interleaved: bool, scale: float, *, backwards: bool
) -> torch.Tensor:
    out = torch.empty_like(x, memory_format=torch.preserve_format)
    heads = max((d for d in range(3) if angles.shape[d] == 1), key=lambda d: x.shape[d], default=2)
    order = [*(d for d in range(3) if d != heads), heads, 3]
    source, target, turns = (t.permute(order) for t in (x, out, angles))
    strides = (0 if size == 1 else by for size, by in zip(turns.shape, turns.stride(), strict=True))
    pairs, passed = angles.shape[-1] // 2, x.shape[-1] - angles.shape[-1]
    rows = launch.tile_of(max(pairs, passed), _NUMBERS, 8).rows
    rows, columns = min(rows, launch.power_of_2(source.shape[2])), launch.power_of_2(pairs)
    with launch.on(x):
        kernels.rotate[(source.shape[0] * source.shape[1],)](
            *(source, target, turns, *source.shape[1:3], pairs, passed),
            *(*source.stride(), *target.stride(), *strides),
            SCALE=scale,
            INTERLEAVED=interleaved,
            BACKWARDS=backwards,
            SHARED=turns.shape[2] == 1,
            HEADS=rows,
            PAIRS=columns,
            PASSED=launch.power_of_2(passed) if passed else 0,
            WIDE=launch.wide(x.dtype),
            num_warps=min(8, max(1, rows * columns // 256)),
        )
    return out
