"""The orders of dimensions in which attention takes its tensors, as views of one: heads first.

Shapes: `S` sequence, `B` batch, `N` heads, `D` head dimension, `H = N D`, `T` the tokens of all
sequences of a batch, one after the other.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch.nn import functional as F

Layout = Literal["SBND", "SBH", "BSH", "BSND", "BNSD", "TND"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


def heads_first(x: torch.Tensor, layout: Layout, heads: int) -> torch.Tensor:
    """View `x` as `(B, N, S, D)`, `(1, N, T, D)` for TND; `heads` matters to SBH and BSH only."""
    if layout == "BNSD":
        return x
    if layout == "TND":
        return x.transpose(0, 1)[None]
    if layout in ("SBH", "BSH"):
        x = x.view(*x.shape[:2], heads, x.shape[2] // heads)
    return x.permute(1, 2, 0, 3) if layout[0] == "S" else x.transpose(1, 2)


def from_heads_first(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Undo `heads_first`; a copy only if the heads of SBH or BSH are not next to each other."""
    if layout == "BNSD":
        return x
    if layout == "TND":
        return x[0].transpose(0, 1)
    x = x.permute(2, 0, 1, 3) if layout[0] == "S" else x.transpose(1, 2)
    return x.flatten(2) if layout in ("SBH", "BSH") else x


def rows_of_numbers(x: torch.Tensor) -> torch.Tensor:
    """Return `x` with its channels side by side, which torch's kernels take for granted."""
    return x if x.stride(-1) == 1 else x.contiguous()


def of_equal_width(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Widen query and key, or value, with channels of zeros, which add nothing."""
    width = max(query.shape[-1], value.shape[-1])
    return widened(query, width), widened(key, width), widened(value, width)


def widened(x: torch.Tensor, width: int) -> torch.Tensor:
    """Return `x` with channels of zeros after its own, itself if it is wide enough."""
    missing = width - x.shape[-1]
    return F.pad(x, (0, missing)) if missing > 0 else x
