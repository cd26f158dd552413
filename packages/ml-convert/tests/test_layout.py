"""The proof that a layout stores every element once finds each kind of hole."""

import pytest

from ml_convert.errors import ConversionError
from ml_convert.layout import Layout, Rectangle, Stored, check_complete
from ml_models.weights import Parameter

TABLE = (
    Parameter(name="w", shape=(8, 4), split=None, init="normal"),
    Parameter(name="b", shape=(6,), split=None, init="zeros"),
)


def build(*, w=None, b=None, tensors=None, **more):
    stored = [
        Stored("f", "w.top", (4, 4), "w"),
        Stored("f", "w.left", (4, 1), "w"),
        Stored("f", "w.right", (4, 3), "w"),
        Stored("f", "b", (8,), "b", padding=2),
        Stored("f", "b.copy", (6,), "b", copy_of=3),
    ]
    w = w or (Rectangle(0, 0, 0, 0, 4, 4), Rectangle(1, 0, 4, 0, 4, 1), Rectangle(2, 0, 4, 1, 4, 3))
    b = b or (Rectangle(3, 0, 0, 0, 6, 1), Rectangle(4, 0, 0, 0, 6, 1))
    return Layout(tensors=tuple(tensors or stored), rectangles={"w": w, "b": b, **more})


def test_rows_columns_padding_and_copies_that_fit_are_accepted():
    check_complete(build(), TABLE)


def test_copies_are_told_from_originals():
    layout = build()
    assert [r.tensor for r in layout.primary("b")] == [3]
    assert [r.tensor for r in layout.copies("b")] == [4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b": (Rectangle(3, 0, 0, 0, 5, 1), Rectangle(4, 0, 0, 0, 6, 1))}, "b: rows from 5"),
        (
            {"w": (Rectangle(0, 0, 0, 0, 4, 4), Rectangle(1, 0, 4, 0, 4, 1))},
            "w: columns from 1 of row 4 are missing",
        ),
        (
            {"w": (Rectangle(0, 0, 0, 0, 4, 4), Rectangle(0, 0, 4, 0, 4, 4))},
            "w.top: indices 0 to 4 are there twice",
        ),
        (
            {"w": (Rectangle(0, 0, 0, 0, 4, 4), Rectangle(0, 0, 2, 0, 4, 4))},
            "w: indices 2 to 4 are there twice",
        ),
        (
            {"w": (Rectangle(0, 0, 1, 0, 4, 4),)},
            "w: indices 0 to 1 are missing",
        ),
        ({"c": ()}, "c is not stored by the layout, or is no parameter"),
        (
            {
                "tensors": [
                    Stored("f", "w.top", (4, 4), "w"),
                    Stored("f", "w.left", (4, 1), "w"),
                    Stored("f", "w.right", (4, 3), "w"),
                    Stored("f", "b", (8,), "b"),
                    Stored("f", "b.copy", (6,), "b", copy_of=3),
                ]
            },
            "b: rows from 6 belong to no parameter",
        ),
        (
            {
                "tensors": [
                    Stored("f", "w.top", (4, 5), "w"),
                    Stored("f", "w.left", (4, 1), "w"),
                    Stored("f", "w.right", (4, 3), "w"),
                    Stored("f", "b", (8,), "b", padding=2),
                    Stored("f", "b.copy", (6,), "b", copy_of=3),
                ]
            },
            "w.top: part of a row is unused",
        ),
    ],
)
def test_gaps_overlaps_and_unused_elements_are_found_and_named(changes, message):
    with pytest.raises(ConversionError, match=message):
        check_complete(build(**changes), TABLE)


def test_a_parameter_that_is_not_stored_at_all_is_found():
    layout = build()
    del layout.rectangles["b"]
    with pytest.raises(ConversionError, match="b is not stored"):
        check_complete(layout, TABLE)
