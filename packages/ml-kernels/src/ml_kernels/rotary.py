"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

Shapes: `S` sequence, `B` batch, `N` heads, `D` head dimension, `R <= D` the rotated part.
"""

from __future__ import annotations

import torch

from ml_kernels.dispatch import Backend, implementation


def apply_rotary(
    x: torch.Tensor,
    angles: torch.Tensor,
    *,
    interleaved: bool = False,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Rotate pairs of the first `R` channels of each head by position-dependent angles.

    Args:
        x: `(S, B, N, D)`.
        angles: `(S, 1, 1, R)` float32, in radians, one per channel: both channels of a pair hold
            the same angle.
        interleaved: Pairs are channels `(2i, 2i + 1)` (GPT-J, ChatGLM) instead of `(i, i + R/2)`
            (GPT-NeoX, Hugging Face Llama).
        backend: Force an implementation by name.

    Returns:
        `(S, B, N, D)` in the dtype of `x`.
    """
    return implementation("rotary", x, backend)(x, angles, interleaved)


def apply_rotary_reference(
    x: torch.Tensor, angles: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """The formula: `x * cos + rotate(x) * sin` on the rotated channels, the rest passed through."""
    width = angles.shape[-1]
    rotated, passed = x[..., :width], x[..., width:]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    out = rotated * cos + _rotate(rotated, interleaved) * sin
    return out if width == x.shape[-1] else torch.cat((out, passed), dim=-1)


def _rotate(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
