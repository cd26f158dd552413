"""What is known about a checkpoint that was opened for reading."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ml_convert.plan import Checkpoint
from ml_models.architecture import Architecture
from ml_models.families.family import Family
from ml_models.weights import Parameter, parameters

if TYPE_CHECKING:
    from ml_convert.lora import Adapter
    from ml_convert.rank_files import RankFiles


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint of any format, opened: its description was read, and all tensors found."""

    path: Path
    """Its directory."""
    arch: Architecture
    """The model."""
    family: Family | None
    """The model's family, if the checkpoint says it."""
    checkpoint: Checkpoint
    """Its tensors."""
    args: Namespace = field(default_factory=Namespace)
    """Args of a Megatron checkpoint."""
    config: Mapping[str, object] = field(default_factory=dict)
    """config.json of a Hugging Face model."""
    is_hugging_face: bool = False
    """Whether it is a Hugging Face model."""
    rank_files: RankFiles | None = None
    """What the ranks of a Megatron checkpoint stored, if there is an adapter among it."""
    merged: Adapter | None = None
    """The adapter that is merged into the weights when they are read."""
    adapter: Adapter | None = None
    """The adapter whose tensors these are, and not the model's."""

    @property
    def table(self) -> tuple[Parameter, ...]:
        """All parameters that the checkpoint stores."""
        return parameters(self.arch) if self.adapter is None else self.adapter.table
