"""The weights of a checkpoint one by one, in Hugging Face names, whatever its format.

    for name, array in ml_convert.tensors("ckpt/llama2-7b"):
        engine.load(name, array)

Only one tensor is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ml_convert import huggingface
from ml_convert.execute import check_copies, converted_to, gather, steps_from
from ml_convert.files import Buffers, Files
from ml_convert.input import open_source
from ml_convert.plan import Checkpoint, Plan, overlapping, plan
from ml_convert.request import Request
from ml_convert.target import family_of
from ml_convert.tensor import Dtype, Extent

_MEMORY = Path("(memory)")


def tensors(load_dir: str | Path, **options: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Read a checkpoint of any format as a Hugging Face model.

    Args:
        load_dir: The checkpoint.
        options: Fields of `Request` that say how to read it, such as `iteration`, `model_type_hf`,
            `hf_config` or `params_dtype`.

    Yields:
        Name and content of each tensor. NumPy knows no bfloat16: those are uint16 words.

    Raises:
        ConversionError: It cannot be read, or is damaged.
    """
    for name, dtype, array in _tensors(load_dir, options):
        yield name, array.view(np.uint16 if dtype.name == "bfloat16" else dtype.name)


def _tensors(load_dir: str | Path, options: Any) -> Iterator[tuple[str, Dtype, np.ndarray]]:
    """Yield name, dtype, and content as words of that size."""
    request = Request(load_dir=Path(load_dir), save_dir=Path(load_dir), save_format="hf", **options)
    source = open_source(request)
    layout = huggingface.layout(family_of(source), source.arch, {})
    kept = source.checkpoint.dtypes
    exempt = {parameter.name for parameter in source.table if parameter.float32}
    extents = tuple(
        Extent(
            _MEMORY,
            0,
            kept[s.parameter] if s.parameter in exempt else request.dtype or kept[s.parameter],
            s.shape,
        )
        for s in layout.tensors
    )
    target = Checkpoint(layout=layout, extents=extents)
    work = plan(source.arch, source.checkpoint, target, source.table)
    with Files() as files:
        yield from _Reader(work, files).tensors()


class _Reader:
    def __init__(self, work: Plan, files: Files) -> None:
        self._plan, self._files, self._buffers = work, files, Buffers()
        self._holds: dict[int, list[str]] = {}
        for name, rectangles in work.target.layout.rectangles.items():
            for index in dict.fromkeys(rectangle.tensor for rectangle in rectangles):
                self._holds.setdefault(index, []).append(name)

    def tensors(self) -> Iterator[tuple[str, Dtype, np.ndarray]]:
        table = {parameter.name: parameter for parameter in self._plan.table}
        for index, stored in enumerate(self._plan.target.layout.tensors):
            dtype = self._plan.target.extents[index].dtype
            words = np.empty(math.prod(stored.shape), f"u{dtype.itemsize}")
            part = replace(self._plan, table=tuple(table[name] for name in self._holds[index]))
            self._fill(index, part, words)
            yield stored.name, dtype, words.reshape(stored.shape)

    def _fill(self, index: int, part: Plan, words: np.ndarray) -> None:
        """Fill in everything that this tensor holds, given its elements as a vector."""
        target, shape = part.target, part.target.layout.tensors[index].shape
        for band in part.bands():
            rectangles = target.layout.rectangles[band.parameter]
            places = [p for p in overlapping(rectangles, band) if p.rectangle.tensor == index]
            if not places:
                continue
            data = gather(part.source, band, self._files, self._buffers)
            check_copies(part.source, band, data, self._files, self._buffers)
            data = converted_to(target.dtypes[band.parameter], data, part, band).view(words.dtype)
            for place in places:
                top, left = place.row - band.row, place.column - band.column
                found = data[top : top + place.rows, left : left + place.columns]
                first, row, column = steps_from(place, shape)
                step = (row * words.itemsize, column * words.itemsize)
                np.lib.stride_tricks.as_strided(words[first:], found.shape, step)[...] = found
