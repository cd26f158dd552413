"""A LoRA adapter as a small model of its own: its parameters, and where ranks keep them.

An adapter adds `scale * B @ A` to the weight of a linear layer. Like a weight, A (r, inputs) and B
(outputs, r) are parameters of the whole model; formats store rectangles of them. With tensor
parallelism a rank keeps what goes with its part of the weight: of a layer whose outputs are cut all
of A and some rows of B, in the order of the weight's; of one whose inputs are cut some columns of A
and all of B. So where a checkpoint keeps weights tells where it keeps their adapters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from ml_convert.errors import ConversionError
from ml_convert.layout import Layout, Rectangle, Stored, matrix
from ml_models.weights import Parameter


def names(weight: str, kind: str = "") -> tuple[str, str]:
    """Return the names of A and B of a weight; `kind` is what ModelLink puts before `.weight`."""
    module = weight.removesuffix(".weight")
    return f"{module}.lora_A{kind}.weight", f"{module}.lora_B{kind}.weight"


def parameters_of(adapted: Iterable[Parameter], rank: int) -> tuple[Parameter, ...]:
    """List A and B of these weights."""
    found: list[Parameter] = []
    for weight in adapted:
        a, b = names(weight.name)
        rows, columns = matrix(weight.shape)
        found.append(replace(weight, name=a, shape=(rank, columns), split=None, padded=False))
        found.append(replace(weight, name=b, shape=(rows, rank), split=None, padded=False))
    return tuple(found)


def layout(base: Layout, adapted: Collection[str], rank: int, kind: str = "") -> Layout:
    """Tell where a checkpoint keeps the adapters of these weights.

    Args:
        base: Where it keeps the weights.
        adapted: The weights.
        rank: Of the adapters.
        kind: What stands before `.weight` in their names.

    Raises:
        ConversionError: A weight is packed with others, so it can have no adapter of its own.
    """
    held = dict(base.by_tensor())
    building = _Building(rank, kind)
    for index, stored in enumerate(base.tensors):
        found = {name for name, _ in held.get(index, ())}
        if found.isdisjoint(adapted):
            continue
        rectangles_of_it = [rectangle for _, rectangle in held[index]]
        if len(found) > 1 or any(rectangle.place is not None for rectangle in rectangles_of_it):
            raise ConversionError(
                f"{stored.name} holds several weights, which cannot have adapters of their own"
            )
        building.add(stored, next(iter(found)), rectangles_of_it)
    return building.layout()


class _Building:
    """A layout that grows weight by weight."""

    def __init__(self, rank: int, kind: str) -> None:
        self._rank, self._kind = rank, kind
        self._tensors: list[Stored] = []
        self._rectangles: dict[str, list[Rectangle]] = {}
        self._originals: dict[tuple[str, tuple[tuple[int, int], ...]], int] = {}

    def add(self, stored: Stored, weight: str, rectangles: Sequence[Rectangle]) -> None:
        """Add A and B beside a stored part of a weight."""
        rank, (rows, columns) = self._rank, matrix(stored.shape)
        stored_a, stored_b = names(stored.name, self._kind)
        a, b = names(weight)
        first = rectangles[0].parameter_column
        part_a = Rectangle(0, 0, 0, first, rank, columns)
        self._add(stored._replace(name=stored_a, shape=(rank, columns), padding=0), a, [part_a])
        parts_b = [r._replace(parameter_column=0, columns=rank) for r in rectangles]
        self._add(stored._replace(name=stored_b, shape=(rows, rank)), b, parts_b)

    def layout(self) -> Layout:
        """Finish."""
        rectangles = {name: tuple(found) for name, found in self._rectangles.items()}
        return Layout(tensors=tuple(self._tensors), rectangles=rectangles)

    def _add(self, stored: Stored, parameter: str, parts: Sequence[Rectangle]) -> None:
        """Add a tensor; if another one holds the same part, it is a copy."""
        index = len(self._tensors)
        key = (parameter, tuple((r.parameter_row, r.parameter_column) for r in parts))
        original = self._originals.setdefault(key, index)
        copy_of = None if original == index else original
        self._tensors.append(stored._replace(parameter=parameter, copy_of=copy_of))
        found = self._rectangles.setdefault(parameter, [])
        found += (part._replace(tensor=index) for part in parts)
