"""Many named tuples in little memory.

A tuple and the numbers in it take some hundred bytes, and a mixture of experts on many ranks has
some hundred thousand tensors. Here they are columns, and a tuple is made when somebody looks at it.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar, overload

Row = TypeVar("Row", bound=NamedTuple)


class Table(Sequence[Row], Generic[Row]):
    """A sequence of named tuples of one type that only grows."""

    def __init__(
        self, kind: type[Row], rows: Iterable[Row] = (), *, numbers: Sequence[str] = ()
    ) -> None:
        """Fill in rows.

        Args:
            kind: Their type.
            rows: The first ones.
            numbers: Fields that are whole numbers of up to 64 bits in all rows.
        """
        self._make: Any = kind._make
        self._columns: list[Any] = [array("q") if name in numbers else [] for name in kind._fields]
        self._known: dict[Any, Any] = {}
        for row in rows:
            self.append(row)

    def append(self, row: Row) -> None:
        """Add a row."""
        for column, value in zip(self._columns, row, strict=True):
            column.append(value if type(value) in (int, type(None)) else self._same(value))

    def __len__(self) -> int:
        return len(self._columns[0])

    def __iter__(self) -> Iterator[Row]:
        return map(self._make, zip(*self._columns, strict=True))

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        found = [column[index] for column in self._columns]
        if isinstance(index, slice):
            return [self._make(row) for row in zip(*found, strict=True)]
        row: Row = self._make(found)
        return row

    def _same(self, value: Any) -> Any:
        """Return an equal value that is there already, if there is one."""
        return sys.intern(value) if type(value) is str else self._known.setdefault(value, value)
