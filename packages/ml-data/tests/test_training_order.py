"""The order of a run: every sample equally often, spread like chance, and the same for ever."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from ml_data.training.order import Permutation, RunOrder, shares


def chi_square(counts: np.ndarray) -> float:
    """Return how far counts are from equal, in standard deviations of the statistic."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


def places(order: RunOrder) -> np.ndarray:
    """Return datasets and samples of the whole run, (samples, 2)."""
    return np.array([order[position] for position in range(order.samples)])


# Permutations


@pytest.mark.parametrize("size", [1, 2, 3, 10, 1023, 1024, 1025, 1089, 4097, 65_536, 99_991])
def test_a_permutation_has_every_number_once(size: int) -> None:
    found = Permutation(size, "a key")(np.arange(size))
    assert found.dtype == np.int64
    np.testing.assert_array_equal(np.sort(found), np.arange(size))


def test_a_permutation_of_billions_takes_no_memory() -> None:
    size = 10_000_000_019
    numbers = np.array([0, 1, size // 2, size - 1])
    found = Permutation(size, "a key")(numbers)
    assert len({*found.tolist()}) == 4
    assert (found < size).all()
    assert (found >= 0).all()


def test_the_parts_of_a_permutation_are_those_of_the_whole() -> None:
    shuffle = Permutation(5000, "a key")
    whole = shuffle(np.arange(5000))
    for numbers in (np.array([7]), np.arange(4990, 5000), np.array([3, 3, 0])):
        np.testing.assert_array_equal(shuffle(numbers), whole[numbers])


def test_small_permutations_are_all_of_them_equally_often() -> None:
    for size in (3, 4, 5):
        found = Counter(tuple(Permutation(size, f"{n}")(np.arange(size))) for n in range(9600))
        assert len(found) == math.factorial(size)
        assert abs(chi_square(np.array([*found.values()]))) < 4


def test_large_permutations_leave_nothing_where_it_was_or_beside_its_neighbour() -> None:
    size, bins = 1500, 15
    found = np.array([Permutation(size, f"{n}")(np.arange(size)) for n in range(600)])
    for number in (0, 1, 749, 1499):  # where one number goes
        assert abs(chi_square(np.bincount(found[:, number] * bins // size, minlength=bins))) < 4
    for gap in (1, 39, 750):  # how far apart two go: the digits of the network are 39 and 39
        apart = (found[:, gap:] - found[:, :-gap]) % size
        assert abs(chi_square(np.bincount(apart[apart > 0] % bins, minlength=bins))) < 4
        halves = np.bincount((apart * bins // size).ravel(), minlength=bins)
        assert halves.max() / halves.min() < 1.03
    at_home = (found == np.arange(size)).sum(axis=1)
    assert at_home.mean() == pytest.approx(1.0, abs=0.2)
    assert at_home.var() == pytest.approx(1.0, abs=0.3)


def test_the_order_of_a_seed_is_the_same_for_ever() -> None:
    """A run may be resumed with another version of numpy, or of this package."""
    small = Permutation(8, "0 run")(np.arange(8)).tolist()
    large = Permutation(100_000, "0 run")(np.arange(8)).tolist()
    order = places(RunOrder([3, 5], (1.0, 1.0), samples=8, seed=42)).tolist()
    assert small == SMALL
    assert large == LARGE
    assert order == ORDER


SMALL = [0, 5, 7, 1, 6, 4, 3, 2]
LARGE = [20704, 22220, 29357, 49051, 78776, 55210, 72619, 18034]
ORDER = [[1, 0], [1, 3], [0, 2], [1, 1], [0, 0], [0, 0], [0, 1], [1, 2]]


# Runs


def test_every_sample_is_read_equally_often_give_or_take_one() -> None:
    for samples in (1, 9, 40, 41, 100, 437):
        order = RunOrder([40], None, samples=samples, seed=3)
        counts = np.bincount(places(order)[:, 1], minlength=40)
        assert counts.sum() == samples
        assert counts.max() - counts.min() <= 1


def test_an_epoch_that_is_not_whole_is_of_random_samples() -> None:
    read = np.zeros(40, np.int64)
    for seed in range(400):
        order = RunOrder([40], None, samples=50, seed=seed)
        read += np.bincount(places(order)[:, 1], minlength=40) - 1
    assert read.sum() == 400 * 10
    assert abs(chi_square(read)) < 4


def test_the_whole_run_is_one_shuffle_without_steps_at_the_ends_of_epochs() -> None:
    """How often a sample was read before grows steadily; with epochs it would jump by one."""
    size, epochs = 2000, 5
    order = RunOrder([size], None, samples=size * epochs, seed=1)
    before: Counter[int] = Counter()
    seen = []
    for _, sample in places(order):
        seen.append(before[int(sample)])
        before[int(sample)] += 1
    means = np.array(seen).reshape(50, -1).mean(axis=1)  # of each tenth of an epoch
    expected = (np.arange(50) + 0.5) / 50 * (epochs - 1)
    assert np.abs(means - expected).max() < 0.25


def test_weights_are_kept_exactly_and_everywhere() -> None:
    sizes, weights = [300, 10, 5000], (2.0, 1.0, 7.0)
    order = RunOrder(sizes, weights, samples=10_000, seed=5)
    found = places(order)
    assert np.bincount(found[:, 0]).tolist() == [2000, 1000, 7000]
    for part in found.reshape(10, 1000, 2):
        assert np.abs(np.bincount(part[:, 0]) / 1000 - (0.2, 0.1, 0.7)).max() < 0.06
    for dataset, size in enumerate(sizes):
        counts = np.bincount(found[found[:, 0] == dataset][:, 1], minlength=size)
        assert counts.max() - counts.min() <= 1


def test_without_weights_every_sample_of_all_datasets_counts_alike() -> None:
    order = RunOrder([300, 100], None, samples=800, seed=5)
    found = places(order)
    assert {*Counter(map(tuple, found.tolist())).values()} == {2}


def test_a_position_is_the_same_whatever_was_asked_before() -> None:
    sizes, weights = [70, 9000], (1.0, 2.0)
    order = RunOrder(sizes, weights, samples=9000, seed=8)
    forward = [order[position] for position in range(9000)]
    resumed = RunOrder(sizes, weights, samples=9000, seed=8)
    assert [resumed[position] for position in (8999, 5, 4100)] == [
        forward[position] for position in (8999, 5, 4100)
    ]
    assert [forward[p] for p in range(100)] != [
        RunOrder(sizes, weights, samples=9000, seed=9)[p] for p in range(100)
    ]


def test_positions_outside_of_the_run_are_refused() -> None:
    order = RunOrder([3], None, samples=5, seed=1)
    for position in (-1, 5):
        with pytest.raises(IndexError, match=f"position {position} of a run of 5 samples"):
            order[position]


@pytest.mark.parametrize(
    ("weights", "total", "expected"),
    [
        ((1.0,), 7, (7,)),
        ((1.0, 1.0, 1.0), 10, (4, 3, 3)),
        ((0.7, 0.3), 10, (7, 3)),
        ((1e-9, 1.0), 10, (0, 10)),
        ((5.0, 3.0, 2.0), 0, (0, 0, 0)),
        ((1.0, 2.0, 4.0), 5, (1, 1, 3)),
    ],
)
def test_samples_are_divided_by_weight(
    weights: tuple[float, ...], total: int, expected: tuple[int, ...]
) -> None:
    assert shares(weights, total) == expected
