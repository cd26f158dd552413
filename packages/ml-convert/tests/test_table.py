"""What is kept as columns of numbers comes back as the tuples it was."""

import random
from typing import NamedTuple

from ml_convert.layout import Layout, Place, Rectangle, Rectangles, Stored, stored_tensors
from ml_convert.table import Table


class Row(NamedTuple):
    name: str
    shape: tuple[int, ...]
    number: int
    other: int | None = None


ROWS = [Row(f"n{i % 3}", (i % 2, 7), i * 1_000_000_007, i if i % 2 else None) for i in range(50)]


def test_a_table_is_a_sequence_of_its_rows():
    table = Table(Row, ROWS[:20], numbers=("number",))
    for row in ROWS[20:]:
        table.append(row)
    assert list(table) == ROWS
    assert len(table) == len(ROWS)
    assert [table[index] for index in range(len(ROWS))] == ROWS
    assert (table[-1], table[3:9]) == (ROWS[-1], ROWS[3:9])
    assert type(table[0]) is Row


def test_equal_values_are_one_object():
    table = Table(Row, (Row(f"{i}"[:0] + "same", (1, i - i), 0) for i in range(3)))
    assert table[0].name is table[2].name
    assert table[0].shape is table[2].shape


def rectangle(numbers, tensor):
    place = Place((2, 3), (0, numbers.randrange(3)), 0, 1) if numbers.random() < 0.3 else None
    return Rectangle(tensor, *(numbers.randrange(1 << 40) for _ in range(5)), place)


def test_rectangles_are_listed_by_parameter_and_by_tensor_in_the_order_they_came():
    numbers = random.Random(0)
    found, expected, by_tensor = Rectangles(), {}, {}
    for _ in range(5000):
        name, r = f"p{numbers.randrange(300)}", rectangle(numbers, numbers.randrange(700))
        found.add(name, r)
        expected.setdefault(name, []).append(r)
    assert list(found) == list(expected)
    for name, held in expected.items():
        assert found[name] == tuple(held)
        for r in held:
            by_tensor.setdefault(r.tensor, []).append((name, r))
    assert "p" not in found
    for index, held in found.by_tensor():
        assert sorted(held) == sorted(by_tensor.pop(index))
    assert not by_tensor


def test_a_layout_of_plain_tuples_is_listed_by_tensor_too():
    a, b = Rectangle(1, 0, 0, 0, 2, 3), Rectangle(0, 0, 0, 0, 1, 3)
    tensors = stored_tensors([Stored("f", "x", (1, 3), "q"), Stored("f", "y", (2, 3), "p")])
    layout = Layout(tensors=tensors, rectangles={"p": (a,), "q": (b,)})
    assert list(layout.by_tensor()) == [(0, [("q", b)]), (1, [("p", a)])]
