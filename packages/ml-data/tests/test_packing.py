import numpy as np
import pytest

from ml_data.instruction.packing import Packer, first_fit_decreasing
from ml_data.instruction.ragged import Ragged


def textbook(lengths, capacity):
    """First-fit-decreasing as it is defined: every row is tried in turn."""
    rows, room = [], []
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        fitting = [row for row, free in enumerate(room) if free >= lengths[number]]
        if not fitting:
            rows.append([])
            room.append(capacity)
            fitting = [len(rows) - 1]
        rows[fitting[0]].append(number)
        room[fitting[0]] -= lengths[number]
    return sorted(sorted(row) for row in rows)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 63, 64, 65, 500])
def test_rows_are_those_of_first_fit_decreasing(count):
    lengths = np.random.default_rng(count).integers(1, 101, count)
    assert first_fit_decreasing(lengths, 100) == textbook(lengths.tolist(), 100)


def test_rows_are_full_but_for_almost_nothing():
    lengths = np.random.default_rng(1).gamma(2, 100, 5000).astype(np.int64).clip(1, 2048)
    rows = first_fit_decreasing(lengths, 2048)
    assert lengths.sum() / (len(rows) * 2048) > 0.99


def samples(rng, count, capacity):
    lengths = rng.integers(1, capacity + 1, count)
    ids = Ragged(rng.integers(0, 1000, int(lengths.sum()), dtype=np.int32), lengths)
    return {"input_ids": ids, "labels": Ragged(ids.tokens + 1000, lengths)}


def sequences(column):
    return [part.tolist() for part in np.split(column.tokens, np.cumsum(column.lengths)[:-1])]


def packed(parts, capacity, window):
    packer = Packer(capacity, window)
    found = [rows for part in parts for rows in packer.add(part)] + list(packer.rest())
    columns = {name: [s for done, _ in found for s in sequences(done[name])] for name in parts[0]}
    return columns, [int(count) for _, counts in found for count in counts]


@pytest.mark.parametrize("window", [1, 10_000, 1 << 22])
def test_every_sample_is_in_one_row_with_its_labels_and_no_row_is_too_long(window):
    rng = np.random.default_rng(0)
    parts = [samples(rng, 300, 100) for _ in range(5)]
    columns, rows = packed(parts, 100, window)
    whole = [s for part in parts for s in sequences(part["input_ids"])]
    assert sorted(columns["input_ids"]) == sorted(whole)
    assert [[token - 1000 for token in s] for s in columns["labels"]] == columns["input_ids"]
    lengths = np.array([len(s) for s in columns["input_ids"]])
    assert sum(rows) == len(lengths)
    assert np.add.reduceat(lengths, np.cumsum([0, *rows[:-1]])).max() <= 100


def test_the_last_rows_are_like_the_others():
    """A trainer takes them for validation."""
    lengths = np.random.default_rng(0).gamma(1, 200, 6000).astype(np.int64).clip(1, 2048)
    column = Ragged(np.zeros(int(lengths.sum()), np.int32), lengths)
    columns, rows = packed([{"input_ids": column}], 2048, 1)
    last = len(rows) // 5
    found = np.array([len(s) for s in columns["input_ids"]])[-sum(rows[-last:]) :]
    assert found.mean() == pytest.approx(lengths.mean(), rel=0.1)


def test_a_window_is_packed_before_the_corpus_ends():
    packer = Packer(100, 1)
    part = samples(np.random.default_rng(0), 1000, 100)
    assert len(list(packer.add(part))) == 1
    assert list(packer.rest()) == []
