"""Replacing names in another library: listed, reasoned, and loud when a name is gone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch


class EngineMismatchError(RuntimeError):
    """megatron-core or torch is not what a patch was written for."""


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One name to replace."""

    module: str
    """The module to import."""

    name: str
    """The attribute, dotted where it belongs to a class."""

    replace: Callable[[Any], Any]
    """Takes the object found under the name and returns what to put there."""

    reason: str
    """Why; shown in the documentation and in errors."""

    @property
    def target(self) -> str:
        """The dotted name."""
        return f"{self.module}.{self.name}"


def apply(patches: Iterable[Patch]) -> None:
    """Replace each name, after checking that all of them exist.

    Raises:
        EngineMismatchError: A name is gone; nothing has been replaced then.
    """
    found = [(patch, *_find(patch)) for patch in patches]
    # At its first use torch notes which functions `with torch.device(...)` acts on. They must be
    # the originals: a replacement calls those, so "meta" would make tensors on the CPU.
    with torch.device("cpu"):
        torch.empty(0)
    for patch, owner, attribute in found:
        setattr(owner, attribute, patch.replace(getattr(owner, attribute)))


def _find(patch: Patch) -> tuple[Any, str]:
    owner: Any = import_module(patch.module)
    *classes, attribute = patch.name.split(".")
    try:
        for name in classes:
            owner = getattr(owner, name)
        getattr(owner, attribute)
    except AttributeError:
        raise EngineMismatchError(
            f"{patch.target} is gone from megatron-core {version('megatron-core')} / torch "
            f"{torch.__version__}; ml-parallel replaces it because: {patch.reason}"
        ) from None
    return owner, attribute


EVERYWHERE: tuple[Patch, ...] = (
    Patch(
        module="megatron.core.optimizer",
        name="USING_PYTORCH_OPTIMIZER",
        replace=lambda _original: True,
        reason="checkpoints hold the state of torch's AdamW; Apex and Transformer Engine differ",
    ),
)
"""Patches for every device."""
