"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

Pairs of channels are rotated by an angle that grows with the position; `ml_kernels.frequencies`
makes the angles. Only the first `R <= D` channels of a head are rotated (ChatGLM, GPT-NeoX).

Shapes: `S` sequence, `B` batch, `N` heads, `D` head dimension, `R` rotated channels.
"""

from __future__ import annotations

import torch

from ml_kernels.autocast import without_autocast
from ml_kernels.checks import check_finite, check_floating, check_same_device
from ml_kernels.dispatch import Backend, implementation


def rotary_embedding(
    x: torch.Tensor,
    angles: torch.Tensor,
    *,
    interleaved: bool = False,
    scale: float = 1.0,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Rotate pairs of the first `R` channels of each head by position-dependent angles.

    Args:
        x: Four dimensions, the last of them the channels of a head: `(S, B, N, D)`, or any other
            order of the first three.
        angles: Four dimensions, the last `R` even and at most `D`, the others those of `x` or 1:
            `(S, 1, 1, R)`. Float32 or float64, in radians, one per channel: both channels of a pair
            must hold the same angle, as `rotary_angles` makes them. They are constants and get no
            gradient.
        interleaved: Pairs are channels `(2i, 2i + 1)` (GPT-J, ChatGLM) instead of `(i, i + R/2)`
            (GPT-NeoX, Hugging Face Llama).
        scale: Multiplies sine and cosine, and so the rotated channels: yarn's `mscale`.
        backend: Force an implementation by name.

    Returns:
        The shape and dtype of `x`; channels from `R` on are unchanged.

    Raises:
        ValueError: The shapes do not fit together, the tensors are on different devices, or the
            scale is not finite.
        TypeError: `x` is not floating point, or the angles are neither float32 nor float64.
    """
    _check(x, angles)
    check_finite("rotary_embedding", scale=scale)
    return implementation("rotary_embedding", x, backend)(x, angles, interleaved, scale)


def _check(x: torch.Tensor, angles: torch.Tensor) -> None:
    check_floating("rotary_embedding", "x", x)
    check_floating("rotary_embedding", "angles", angles)
    # In half precision the positions from 256 or 2048 on would fall together.
    if angles.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"rotary_embedding: angles is {angles.dtype}: must be torch.float32 or torch.float64"
        )
    given, wanted = angles.shape, x.shape
    if len(given) != 4 or len(wanted) != 4:
        raise ValueError(
            f"rotary_embedding: x {tuple(wanted)} and angles {tuple(given)}: both must have four "
            "dimensions"
        )
    if not all(a in (1, b) for a, b in zip(given[:3], wanted, strict=False)):
        raise ValueError(
            f"rotary_embedding: angles {tuple(given)}: the first three dimensions must be 1 or "
            f"those of x {tuple(wanted)}"
        )
    if given[3] % 2 or not 0 < given[3] <= wanted[3]:
        raise ValueError(
            f"rotary_embedding: angles {tuple(given)}: the last dimension must be even, above 0 "
            f"and at most the {wanted[3]} channels of x"
        )
    check_same_device("rotary_embedding", "angles", angles, x)


def cosine_and_sine(
    angles: torch.Tensor, scale: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scaled cosine and sine of constant angles, rounded once, to `dtype`."""
    angles = angles.detach()
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def rotary_embedding_reference(
    x: torch.Tensor, angles: torch.Tensor, interleaved: bool, scale: float
) -> torch.Tensor:
    """The formula: `x * cos + rotate(x) * sin` on the rotated channels, the rest passed through."""
    width = angles.shape[-1]
    rotated, passed = x[..., :width], x[..., width:]
    cos, sin = cosine_and_sine(angles, scale, x.dtype)
    with without_autocast(x):
        out = rotated * cos + _rotate(rotated, interleaved) * sin
        return out if width == x.shape[-1] else torch.cat((out, passed), dim=-1)


def _rotate(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Turn every pair of channels by a quarter: `(a, b)` becomes `(-b, a)`."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
