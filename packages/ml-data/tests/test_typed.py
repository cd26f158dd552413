from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import pytest

from ml_data.typed import check_types


@dataclass(frozen=True)
class Part:
    size: int


@dataclass(frozen=True)
class Whole:
    name: str
    size: int | None
    share: float
    kind: Literal["a", "b"]
    packed: bool
    names: tuple[str, ...]
    counts: dict[str, int]
    parts: dict[str, Part]


WHOLE = Whole("x", None, 1, "a", True, ("y",), {"z": 1}, {"p": Part(2)})


def test_values_of_their_types_are_right():
    check_types(WHOLE)
    check_types(replace(WHOLE, size=3, share=0.5, names=(), counts={}, parts={}))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("name", [None, 5, ["x"]]),
        ("size", ["5", 5.0, True, []]),
        ("share", ["1", None, True]),
        ("kind", ["c", None, 1]),
        ("packed", [1, None, "true"]),
        ("names", [["y"], (1,), "y", None]),
        ("counts", [{"z": "1"}, [], None]),
        ("parts", [{"p": 2}, {"p": {"size": 2}}]),
    ],
)
def test_a_value_of_another_type_is_named(field, values):
    for value in values:
        with pytest.raises(TypeError, match=f"{field} cannot be "):
            check_types(replace(WHOLE, **{field: value}))


def test_a_wrong_value_inside_is_named():
    with pytest.raises(TypeError, match="size cannot be 'x'"):
        check_types(replace(WHOLE, parts={"p": Part("x")}))
