"""One tensor of a model, and how tensor parallelism cuts it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Init = Literal["normal", "scaled_normal", "ones", "zeros"]


class Split(NamedTuple):
    """A cut along one dimension: `blocks` equal blocks, each cut in one part for every rank."""

    dim: int
    blocks: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One tensor of the model, as it is without parallelism."""

    name: str
    """Megatron-Core name with the global numbers of layer and expert."""
    shape: tuple[int, ...]
    """Shape on a single device, with the true vocabulary."""
    split: Split | None
    """How tensor parallelism cuts it; None = every rank holds all of it."""
    padded: bool = False
    """Whether dim 0 is the vocabulary, which is padded before it is cut."""
    layer: int | None = None
    """Global layer number; None outside the layers."""
    expert: int | None = None
    """Global number of the expert it belongs to; None outside the experts."""
    float32: bool = False
    """Whether it stays in float32 whatever the dtype of the model."""
    init: Init
    """How it starts; scaled_normal divides the standard deviation by sqrt(2 * num_layers)."""
