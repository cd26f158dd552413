"""What is known about a checkpoint that was opened for reading."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ml_convert.plan import Checkpoint
from ml_models.architecture import Architecture
from ml_models.families.family import Family


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
