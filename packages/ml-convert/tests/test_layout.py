"""The proof that a layout stores every element once finds each kind of hole."""

import numpy as np
import pytest

from ml_convert.coverage import Box, check_cover
from ml_convert.errors import ConversionError
from ml_convert.layout import Layout, Place, Rectangle, Stored, check_complete
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


TOP, LEFT, RIGHT = (
    Rectangle(0, 0, 0, 0, 4, 4),
    Rectangle(1, 0, 4, 0, 4, 1),
    Rectangle(2, 0, 4, 1, 4, 3),
)


def stored(**changes):
    return [t._replace(**changes.get(t.name.replace(".", "_"), {})) for t in build().tensors]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"b": (Rectangle(3, 0, 0, 0, 5, 1), Rectangle(4, 0, 0, 0, 6, 1))},
            r"b: elements \[5:6\] are missing",
        ),
        ({"w": (TOP, LEFT)}, r"w: elements \[4:8, 1:4\] are missing"),
        ({"w": (TOP, LEFT, RIGHT, LEFT)}, r"w: elements \[4:8, 0:1\] are there twice"),
        (
            {"w": (TOP, Rectangle(0, 0, 2, 0, 4, 4))},
            r"w: elements \[2:4, 0:4\] are there twice",
        ),
        (
            {"w": (TOP, Rectangle(0, 0, 4, 0, 4, 4))},
            r"w.top: elements \[0:4, 0:4\] are there twice",
        ),
        (
            {"w": (TOP, Rectangle(1, 0, 4, 0, 5, 1), RIGHT)},
            r"w: elements \[4:9, 0:1\] of \[8, 4\] do",
        ),
        (
            {"w": (TOP, LEFT, RIGHT._replace(row=1))},
            r"w.right: elements \[1:5, 0:3\] of \[4, 3\] do not exist",
        ),
        ({"c": ()}, "c is not stored by the layout, or is no parameter"),
        (
            {"tensors": stored(b={"padding": 0})},
            r"b: elements \[6:8\] belong to no parameter",
        ),
        (
            {"tensors": stored(b={"padding": 3})},
            r"b: elements \[5:6\] are there twice",
        ),
        (
            {"tensors": stored(w_top={"shape": (4, 5)})},
            r"w.top: elements \[0:4, 4:5\] belong to no parameter",
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


def stack(*, first=0, rows=6, step=2, shape=(4, 5, 6), experts=4):
    """Matrices (rows, columns) of experts in one tensor (experts, columns, rows), interleaved."""
    view = (experts, 5, 6 // step, step)
    rectangles = {}
    for expert in range(experts):
        found = []
        for block in range(step):
            place = Place(view, (expert, 0, 0, first + block), 2, 1)
            found.append(Rectangle(0, 0, block * 6 // step, 0, rows // step, 5, place))
        rectangles[f"w{expert}"] = tuple(found)
    return Layout(tensors=(Stored("f", "stack", shape, "w0"),), rectangles=rectangles)


def experts(count=4):
    return [Parameter(name=f"w{n}", shape=(6, 5), split=None, init="normal") for n in range(count)]


def test_stacked_transposed_and_interleaved_matrices_are_proven():
    check_complete(stack(), experts())
    check_complete(stack(step=1), experts())


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (stack(rows=4), r"w0: elements \[2:3, 0:5\] are missing"),
        (stack(first=1), r"stack: .* do not exist"),
    ],
)
def test_holes_in_places_are_found(layout, message):
    with pytest.raises(ConversionError, match=message):
        check_complete(layout, experts())


def test_a_lost_expert_is_found():
    layout = stack()
    del layout.rectangles["w2"]
    with pytest.raises(
        ConversionError, match=r"stack: elements from \[2, 0, 0\] \(\d+ of them\) belo"
    ):
        check_complete(layout, [parameter for parameter in experts() if parameter.name != "w2"])


def test_whole_rows_and_another_view_of_one_tensor_are_proven_together():
    """The first expert as whole rows of (20, 6), the others by their place in the stack."""
    view = (4, 5, 6)
    rectangles = {
        f"w{n}": (Rectangle(0, 0, 0, 0, 5, 6, Place(view, (n, 0, 0), 1, 2)),) for n in range(1, 4)
    }
    rectangles["w0"] = (Rectangle(0, 0, 0, 0, 5, 6),)
    table = [Parameter(name=f"w{n}", shape=(5, 6), split=None, init="normal") for n in range(4)]
    layout = Layout(tensors=(Stored("f", "t", (20, 6), "w0"),), rectangles=rectangles)
    check_complete(layout, table)
    rectangles["w0"] = (Rectangle(0, 1, 0, 0, 5, 6),)
    with pytest.raises(
        ConversionError, match=r"t: elements from \[0, 0\] \(6 of them\) belong to no"
    ):
        check_complete(layout, table)


def test_any_boxes_are_counted_as_element_by_element():
    """Random boxes in random shapes, against an array that counts."""
    numbers = np.random.default_rng(0)
    views = [(24,), (4, 6), (2, 2, 6), (4, 2, 3), (2, 12), (1, 24, 1)]
    agreed = {True: 0, False: 0}
    for _ in range(3000):
        counts, boxes = np.zeros(24, int), []
        for _ in range(numbers.integers(1, 5)):
            view = views[numbers.integers(len(views))]
            ends = [sorted(numbers.choice(size + 1, 2, replace=False)) for size in view]
            box = Box(view, tuple(int(a) for a, _ in ends), tuple(int(b) for _, b in ends))
            counts.reshape(view)[tuple(slice(a, b) for a, b in ends)] += 1
            boxes.append(box)
        if numbers.integers(2):  # make it whole
            boxes += [Box((24,), (int(n),), (int(n) + 1,)) for n in np.flatnonzero(counts == 0)]
            counts = np.maximum(counts, 1)
        try:
            check_cover("x", (4, 6), boxes, missing="are missing")
            found = True
        except ConversionError:
            found = False
        assert found == bool((counts == 1).all()), boxes
        agreed[found] += 1
    assert min(agreed.values()) > 100
