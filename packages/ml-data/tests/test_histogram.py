from __future__ import annotations

import numpy as np

from ml_data.histogram import Histogram


def test_lengths_are_counted_by_powers_of_two():
    histogram = Histogram()
    histogram.add(np.array([0, 1, 2, 3, 4, 7, 8, 1024]))
    histogram.add(np.array([2047, 2048, 2**31 - 1]))
    counts = {bits: n for bits, n in enumerate(histogram.counts.tolist()) if n}
    assert counts == {0: 1, 1: 1, 2: 2, 3: 2, 4: 1, 11: 2, 12: 1, 31: 1}


def test_a_line_has_its_range_number_and_share():
    histogram = Histogram()
    histogram.add(np.array([700] * 3000 + [1500] * 1000 + [5000]))
    assert list(histogram.lines()) == [
        "  512-1,023 tokens 3,000  75.0% " + "#" * 40,
        "1,024-2,047 tokens 1,000  25.0% " + "#" * 14,
        "2,048-4,095 tokens     0   0.0%",
        "4,096-8,191 tokens     1   0.0% #",
    ]


def test_nothing_has_no_lines():
    assert list(Histogram().lines()) == []
