"""LoRA adapters: what they are, and merging them into the weights they belong to.

Merging adds `scale * B @ A` in float32 to a band of the weight when the band is read, and rounds
once, to the dtype of the weight. So it takes no memory to speak of, works for every pair of
formats, and is verified like any other conversion.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ml_convert.casting import cast
from ml_convert.errors import ConversionError
from ml_convert.execute import check_copies, gather
from ml_convert.files import Buffers, Files
from ml_convert.layout import check_complete, matrix
from ml_convert.lora_table import names
from ml_convert.plan import Band, Checkpoint
from ml_convert.source import Source
from ml_convert.tensor import DTYPES, Dtype
from ml_models.weights import Parameter

_FLOAT32 = DTYPES["float32"]
_MERGED = ("float32", "float16", "bfloat16")
# What ModelLink calls the modules of Megatron-Legacy, and Megatron-Core.
LEGACY_MODULES = {
    "query_key_value": "linear_qkv",
    "dense": "linear_proj",
    "dense_h_to_4h": "linear_fc1",
    "dense_4h_to_h": "linear_fc2",
}


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter that was opened."""

    path: Path
    """Its file or directory."""
    rank: int
    """Rows of every A."""
    scale: float
    """What B @ A is multiplied by: alpha / r."""
    weights: tuple[Parameter, ...]
    """The weights it belongs to."""
    table: tuple[Parameter, ...]
    """A and B of all of them."""
    checkpoint: Checkpoint
    """Where they are."""

    @property
    def alpha(self) -> float:
        """The numerator of the scale, a whole number where it can be one."""
        alpha = self.scale * self.rank
        return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * alpha else alpha


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is said about an adapter, on the command line or beside it; None = nothing."""

    rank: int | None = None
    alpha: float | None = None
    modules: tuple[str, ...] | None = None
    """Names of the modules it belongs to."""

    def agreeing_with(self, stored: Settings, where: Path) -> Settings:
        """Fill in what a checkpoint says.

        Raises:
            ConversionError: It says something else.
        """
        for name, flag in (("rank", "--lora-r"), ("alpha", "--lora-alpha")):
            given, found = getattr(self, name), getattr(stored, name)
            if None not in (given, found) and given != found:
                raise ConversionError(f"{flag} {given:g}: {where} says {found:g}")
        return Settings(
            rank=self.rank or stored.rank,
            alpha=self.alpha or stored.alpha,
            modules=self.modules or stored.modules,
        )

    def check_rank(self, rank: int, where: Path) -> None:
        """Check the rank that the tensors have.

        Raises:
            ConversionError: Something else was said.
        """
        if self.rank not in (None, rank):
            raise ConversionError(
                f"{where}: its tensors are of rank {rank}, but r is said to be {self.rank}"
            )

    def scale(self, rank: int, where: Path) -> float:
        """Return alpha / r.

        Raises:
            ConversionError: Nobody says what alpha is.
        """
        if self.alpha is None:
            raise ConversionError(f"{where}: does not say what alpha is; give --lora-alpha")
        return self.alpha / rank

    def check_modules(self, found: set[str], where: Path) -> None:
        """Check that an adapter belongs to the modules it is said to belong to.

        Raises:
            ConversionError: It does not.
        """
        if self.modules is None:
            return
        said = {LEGACY_MODULES.get(name.rpartition(".")[2], name) for name in self.modules}
        if said != found:
            raise ConversionError(
                f"{where}: is an adapter of {', '.join(sorted(found))}, but "
                f"--lora-target-modules are said to be {', '.join(sorted(said))}"
            )


def of_args(args: Namespace) -> Settings:
    """Read what the args of a training say."""
    said = vars(args)
    rank, alpha, modules = (said.get(f"lora_{name}") for name in ("r", "alpha", "target_modules"))
    return Settings(
        rank=rank if isinstance(rank, int) else None,
        alpha=alpha if isinstance(alpha, (int, float)) else None,
        modules=tuple(map(str, modules))
        if isinstance(modules, (list, tuple)) and modules
        else None,
    )


def merged(source: Source, adapter: Adapter) -> Source:
    """Return a source whose weights have the adapter in them.

    Raises:
        ConversionError: The adapter is not whole, or a weight is of a dtype that is not added to.
    """
    check_complete(adapter.checkpoint.layout, adapter.table)
    updates, buffers = {}, Buffers()  # of each thread, the same for all weights
    for weight in adapter.weights:
        dtype = source.checkpoint.dtypes[weight.name]
        if dtype.name not in _MERGED:
            raise ConversionError(
                f"{source.path}: {weight.name} is {dtype.name}; adapters are merged into "
                f"{', '.join(_MERGED)}"
            )
        updates[weight.name] = _Merge(adapter, weight.name, dtype, buffers)
    kept = {
        name: value for name, value in vars(source.args).items() if not name.startswith("lora_")
    }
    checkpoint = replace(source.checkpoint, updates=updates)
    return replace(source, checkpoint=checkpoint, args=Namespace(**kept), merged=adapter)


class _Merge:
    """Adds an adapter to bands of one weight."""

    def __init__(self, adapter: Adapter, weight: str, dtype: Dtype, buffers: Buffers) -> None:
        self._checkpoint, self._rank, self._scale = adapter.checkpoint, adapter.rank, adapter.scale
        self._a, self._b = names(weight)
        self._weight, self._dtype, self._buffers = weight, dtype, buffers

    def apply(self, data: np.ndarray, band: Band, files: Files) -> None:
        """Add in place; see `plan.Update`."""
        b = self._read(Band(self._b, band.row, band.rows, self._rank), "B", files)
        used = np.flatnonzero(b.any(axis=0))  # stacked adapters are mostly zeros
        if not used.size:
            return
        first, count = int(used[0]), int(used[-1] - used[0]) + 1
        part = Band(self._a, first, count, band.columns, band.column)
        a = self._read(part, "A", files)
        shape = (band.rows, band.columns)
        total = self._buffers.take("sum", band.rows, 4 * band.columns).view(np.float32)
        np.matmul(b[:, first : first + count], a, out=total.reshape(shape))
        total *= np.float32(self._scale)
        total += cast(data, self._dtype, _FLOAT32).view(np.float32)
        try:
            data[...] = cast(total.view(np.uint8), _FLOAT32, self._dtype)
        except ConversionError as error:
            raise ConversionError(f"{self._weight}: with its adapter, {error}") from None

    def _read(self, band: Band, buffer: str, files: Files) -> np.ndarray:
        data = gather(self._checkpoint, band, files, self._buffers, buffer=buffer)
        check_copies(self._checkpoint, band, data, files, self._buffers)
        dtype = self._checkpoint.dtypes[band.parameter]
        if dtype.name not in _MERGED:
            raise ConversionError(f"{band.parameter} is {dtype.name}, not {', '.join(_MERGED)}")
        return cast(data, dtype, _FLOAT32).view(np.float32)


def check_fits(weight: Parameter, shapes: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """Check that A and B go with each other and with their weight.

    Args:
        weight: The weight.
        shapes: Shape of each tensor by name: A's, then B's.
        where: Their file.

    Raises:
        ConversionError: They do not.
    """
    (a, shape_a), (b, shape_b) = shapes.items()
    rows, columns = matrix(weight.shape)
    rank = shape_a[0] if shape_a else 0
    if shape_a != (rank, columns) or shape_b != (rows, rank) or rank < 1:
        raise ConversionError(
            f"{where}: {a} of shape {list(shape_a)} and {b} of shape {list(shape_b)} do not fit "
            f"a weight of shape {[rows, columns]}"
        )
